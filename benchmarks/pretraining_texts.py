"""The texts that the tiny T5 learns from, and its vocabulary.

Read are training files only. Left out are all test and dev files, SUBJ, which has no file of its own for training, and
SNLI, SciTail and TweetEval, of which there are only dev and test files; of the few-shot gym, the target tasks of the
partition ``metaicl``, `WRITTEN_TARGETS`, and every task that is built from the same dataset as one of them.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from pats_jax.data import partitions
from pats_jax.data.tables import JsonObject, json_lines, read_csv, read_text, read_tsv, split_lines
from pats_jax.errors import InputError

WRITTEN_TARGETS = ("wikisql", "squad-with_context")  # of the gym; the tasks that the small T5 is tried on
SENTINELS = 100


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of texts.

    Attributes:
      path: below the data folder.
      columns: of the texts; the texts of a row become one. Without columns, a text is a line without its first word.
      header: the columns of a TSV file without a header.
    """

    path: str
    columns: tuple[str, ...] = ()
    header: tuple[str, ...] | None = None

    def read(self, folder: pathlib.Path) -> list[str]:
        """The texts of all rows.

        Raises:
          InputError: if the file cannot be read, or has other columns.
        """
        path = folder / self.path
        if not self.columns:
            return [line.partition(" ")[2] for line in split_lines(read_text(path))]
        if path.suffix == ".csv":
            table = read_csv(path, self.columns)
        else:
            table, _ = read_tsv(path, self.columns, header=self.header, broken_rows=0.01)
        missing = [name for name in self.columns if name not in table.columns]
        if missing:
            raise InputError(f"{path}: no column {missing[0]}")
        return [" ".join(row) for row in zip(*(table.columns[name] for name in self.columns), strict=True)]


_PAIR = ("sentence1", "sentence2")
FILES = (
    TextFile("glue/CoLA/train.tsv", ("sentence",), ("source", "label", "mark", "sentence")),
    TextFile("glue/SST-2/train.tsv", ("sentence",)),
    TextFile("glue/MRPC/train.tsv", ("#1 String", "#2 String")),
    TextFile("glue/STS-B/train.tsv", _PAIR),
    TextFile("glue/RTE/train.tsv", _PAIR),
    TextFile("glue/WNLI/train.tsv", _PAIR),
    TextFile("glue/MNLI/train_sample.csv", ("premise", "hypothesis")),
    TextFile("ood_nli/SICK/SICK_train.txt", ("sentence_A", "sentence_B")),
    TextFile("text_classification/SST-5/stsa.fine.train"),
    TextFile("text_classification/TREC/TREC.train"),
    TextFile("text_classification/ag_news/dev_from_train.tsv", ("text",), ("text", "label")),
    TextFile("text_classification/clinc150/train.tsv", ("text",), ("label", "text")),
)


def read_texts(folder: pathlib.Path) -> dict[str, list[str]]:
    """The different texts of each file and of each task of the gym; what the folder lacks is left out.

    Raises:
      InputError: if there is nothing to read, or a file is damaged.
    """
    found = {file.path: file.read(folder) for file in FILES if (folder / file.path).is_file()}
    gym = folder / "gym"
    for task in gym_tasks(gym):
        paths = sorted(path for split in ("train", "dev") for path in gym.glob(f"{task}/{task}_*_{split}.jsonl"))
        found[f"gym/{task}"] = [text for path in paths for text in _gym_texts(path)]
    seen: set[str] = set()
    different = {name: list(_first_met(texts, seen)) for name, texts in found.items()}
    if not seen:
        raise InputError(f"{folder}: none of the files to learn from, such as {FILES[0].path} or gym/TASK")
    return different


def gym_tasks(gym: pathlib.Path) -> list[str]:
    """The tasks of a gym that are neither a target nor built from the same dataset as one."""
    targets = (*partitions.read_partition(partitions.FOLDER / "metaicl.json").test, *WRITTEN_TARGETS)
    sources = {partitions.source_set(name) for name in targets}
    names = sorted(path.name for path in gym.iterdir() if path.is_dir()) if gym.is_dir() else []
    return [name for name in names if partitions.source_set(name) not in sources]


def _gym_texts(path: pathlib.Path) -> Iterator[str]:
    """The inputs, with the output where it is written and not chosen."""
    for number, row in json_lines(path, read_text(path)):
        row.check(f"{path}:{number}", ("input", "output"))
        yield row["input"] if row.get("options") else _joined(row)


def _joined(row: JsonObject) -> str:
    return f"{row['input']} {row['output']}"


def _first_met(texts: Sequence[str], seen: set[str]) -> Iterator[str]:
    for text in (" ".join(text.split()) for text in texts):
        if text and text not in seen:
            seen.add(text)
            yield text


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """Learns a unigram vocabulary and gives it the form of T5's: padding 0, end 1, unknown 2, sentinels at the end.

    Args:
      texts: to learn from.
      vocab_size: of all tokens, the 100 sentinels among them; ``<extra_id_0>`` is the last token.

    Returns:
      Transformers' ``T5TokenizerFast``. It has fewer tokens than asked for if the texts are too few.
    """
    import tokenizers
    import transformers

    special = ["<pad>", "</s>", "<unk>"]
    learner = tokenizers.Tokenizer(tokenizers.models.Unigram())
    learner.pre_tokenizer = transformers.T5TokenizerFast().backend_tokenizer.pre_tokenizer
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=vocab_size - SENTINELS,
        special_tokens=special,
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    pieces = [(piece, score) for piece, score in _pieces(learner) if piece not in special]
    sentinels = [(f"<extra_id_{number}>", 0.0) for number in reversed(range(SENTINELS))]
    return transformers.T5TokenizerFast(vocab=[*((name, 0.0) for name in special), *pieces, *sentinels])


def _pieces(learner: Any) -> list[tuple[str, float]]:
    return [(piece, score) for piece, score in json.loads(learner.to_str())["model"]["vocab"]]
