"""The division of a gym into tasks for the upstream stage, tasks to choose its settings by, and target tasks.

A partition is a JSON file in CrossFit's layout (``train_classification_test_classification.json`` there): an object
with the lists of task names ``train`` (upstream), ``dev`` (to choose settings of the upstream stage by) and ``test``
(the targets); CrossFit's additional list ``all`` is ignored. These partitions come with the project: ``builtin`` of the
built-in gym; ``metaicl`` of the 46 tasks that MetaICL has among the few-shot tasks of CrossFit with options; and
CrossFit's own eight, ``CROSSFIT``, under their names there. Where CrossFit lists the targets as ``dev`` and leaves
``test`` empty, they are targets here.

A task must not be on two lists. Nor may two tasks that are built from the same dataset, such as glue-rte and
superglue-rte: the upstream stage would already have seen the target's data. CrossFit's partitions break the second
rule, and one breaks the first: ``train_non_nli_test_nli`` has sick both upstream and among the targets. Its file names
this leak in a list ``leaks``: these tasks are targets only, and whoever loads the partition is told.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pats_jax.core.files import checked_name, parse_json
from pats_jax.data.few_shot import FewShotTask
from pats_jax.data.gym import SHOTS, load_gym, task_names
from pats_jax.data.tables import JsonObject, listed, read_text
from pats_jax.errors import InputError, shown

LISTS = ("train", "dev", "test")
CROSSFIT = (
    "random",
    "train_classification_test_classification",
    "train_halfhalf_test_classification",
    "train_non_mrc_qa_test_mrc",
    "train_non_multiple_choice_qa_test_multiple_choice",
    "train_non_nli_test_nli",
    "train_nonclassification_test_classification",
    "train_nonparaphrase_classification_test_paraphrase",
)
FOLDER = Path(__file__).parent

# Source set of the tasks for which it is not what precedes the first hyphen of the name.
SOURCES = {
    # GLUE and SuperGLUE are collections; some of their tasks are one set, or made of a set that other tasks hold too.
    "glue-cola": "cola",
    "glue-mnli": "multinli",
    "glue-mrpc": "mrpc",
    "glue-qnli": "squad",
    "glue-qqp": "qqp",
    "glue-rte": "rte",
    "glue-sst2": "rotten_tomatoes",  # SST is made of the sentences of rotten_tomatoes (Pang and Lee 2005)
    "glue-wnli": "winograd",
    "superglue-cb": "commitment_bank",
    "superglue-copa": "copa",
    "superglue-multirc": "multirc",
    "superglue-record": "record",
    "superglue-rte": "rte",
    "superglue-wic": "wic",
    "superglue-wsc": "winograd",
    # Sets made of others.
    "adversarialqa": "squad",
    "cos_e": "commonsense_qa",
    "hellaswag": "swag",  # both continue captions of ActivityNet
    "kilt_fever": "fever",
    "kilt_hotpotqa": "hotpot_qa",
    "kilt_nq": "natural_questions",
    "boolq": "natural_questions",  # its questions come from the same stream of queries
    "yelp_polarity": "yelp",
    "yelp_review_full": "yelp",
}


def source_set(task: str) -> str:
    """The dataset that a task is built from.

    Examples:
      >>> [source_set(task) for task in ("superglue-rte", "glue-rte", "quartz-no_knowledge", "paws")]
      ['rte', 'rte', 'quartz', 'paws']
    """
    return SOURCES.get(task, task.split("-")[0])


@dataclass(frozen=True)
class Partition:
    """The three lists of task names.

    Attributes:
      train: upstream tasks.
      dev: tasks to choose settings of the upstream stage by; may be empty.
      test: target tasks.
      leaks: targets that the partition's authors also have upstream; they are not in ``train``.
    """

    train: tuple[str, ...]
    dev: tuple[str, ...]
    test: tuple[str, ...]
    leaks: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.train, *self.dev, *self.test)


def load_partitioned_gym(
    source: str | Path, name_or_path: str | Path, *, shots: int = SHOTS, share_sources: bool = False
) -> tuple[dict[str, FewShotTask], Partition]:
    """Reads a partition and the tasks of a gym that it names; other tasks of the gym are ignored.

    Args:
      source: as for `load_gym`.
      name_or_path: as for `load_partition`.
      shots: as for `load_gym`.
      share_sources: as for `load_partition`.

    Raises:
      InputError: as from `load_gym` and `load_partition`.
    """
    named = set(read_partition(_file(name_or_path)).names)
    gym = load_gym(source, tasks=sorted(named.intersection(task_names(source, shots=shots))), shots=shots)
    return gym, load_partition(name_or_path, gym, share_sources=share_sources)


def load_partition(
    name_or_path: str | Path, tasks: Mapping[str, FewShotTask], *, share_sources: bool = False
) -> Partition:
    """Reads a partition and checks it against a gym.

    Args:
      name_or_path: ``"builtin"``, ``"metaicl"``, one of ``CROSSFIT`` or a JSON file.
      tasks: the gym.
      share_sources: whether two lists may have tasks built from the same dataset, as in CrossFit's own partitions.

    Raises:
      InputError: as from `read_partition`; or if the gym lacks a task, a dev or test task has no test rows, or tasks of
        one source set are on two lists; the message names file and line.
    """
    path = _file(name_or_path)
    partition = read_partition(path)
    missing = [name for name in partition.names if name not in tasks]
    if missing:
        raise InputError(f"{_place(path, missing[0])}: the gym has no task {listed(missing)}")
    for name in (*partition.dev, *partition.test):
        if not all(sample.test for sample in tasks[name].samples):
            raise InputError(f"{_place(path, name)}: {name} has no test rows, so it can only be a train task")
    if not share_sources:
        _check_sources(path, partition)
    return partition


def _file(name_or_path: str | Path) -> Path:
    """The file of one of our own partitions by its name, else the path itself."""
    path = FOLDER / f"{name_or_path}.json"
    return path if path in FOLDER.glob("*.json") else Path(name_or_path)


def read_partition(path: Path) -> Partition:
    """Reads a partition's file.

    Raises:
      InputError: if it is missing, is not JSON or not an object with the three lists of names; if the list of train or
        test tasks is empty; or if a task is named twice, or its name cannot be part of a file's name; or if a leak is
        not on the lists train and test.
    """
    lists = _read_lists(path)
    leaks = lists.get("leaks", [])
    for name in leaks:
        if name not in lists["train"] or name not in lists["test"]:
            raise InputError(f"{_place(path, name)}: the leak {shown(name)} must be listed in 'train' and in 'test'")
    lists["train"] = [name for name in lists["train"] if name not in leaks]
    train, dev, test = (tuple(lists[key]) for key in LISTS)
    partition = Partition(train, dev, test, tuple(leaks))
    for key in ("train", "test"):
        if not lists[key]:
            raise InputError(f"{_place(path, key)}: the list {key!r} is empty")
    seen: dict[str, str] = {}
    for key in LISTS:
        for name in lists[key]:
            checked_name(name, _place(path, name))
            if name in seen:
                where = f"twice in {key!r}" if seen[name] == key else f"in {seen[name]!r} and in {key!r}"
                raise InputError(f"{_place(path, name, occurrence=1)}: the task {name} is listed {where}; remove one")
            seen[name] = key
    return partition


def _read_lists(path: Path) -> dict[str, list[str]]:
    lists = parse_json(read_text(path), str(path), JsonObject)
    if not isinstance(lists, JsonObject):
        raise InputError(f"{path}:1: expected a JSON object with the lists {listed(LISTS)}")
    lists.check(f"{path}:1", LISTS)
    unknown = [key for key in lists if key not in (*LISTS, "all", "leaks")]
    if unknown:
        raise InputError(f"{_place(path, unknown[0])}: unknown list {shown(unknown[0])}; the lists are {listed(LISTS)}")
    missing = [key for key in LISTS if key not in lists]
    if missing:
        raise InputError(f"{path}:1: no list {listed(missing)}; add it, as [] if it has no tasks")
    for key in (*LISTS, *({"leaks"} & lists.keys())):
        if not (isinstance(lists[key], list) and all(isinstance(name, str) for name in lists[key])):
            raise InputError(f"{_place(path, key)}: {key!r} is not a list of task names")
    return lists


def _check_sources(path: Path, partition: Partition) -> None:
    """Checks that each source set is on one list only; the error names all that are on two, at the line of the first.

    Raises:
      InputError: if a source set is on two lists.
    """
    list_of = {name: key for key in LISTS for name in getattr(partition, key)}
    tasks_on: dict[str, list[str]] = {}
    for name in list_of:
        tasks_on.setdefault(source_set(name), []).append(name)
    shared = {source: names for source, names in tasks_on.items() if len({list_of[name] for name in names}) > 1}
    if shared:
        told = "; ".join(
            f"{source}: {', '.join(f'{name} ({list_of[name]})' for name in names)}" for source, names in shared.items()
        )
        place = _place(path, next(iter(shared.values()))[-1])
        raise InputError(f"{place}: two lists have tasks built from the same dataset ({told}); put them in one")


def _place(path: Path, name: str, occurrence: int = 0) -> str:
    """``file:line`` of a name in the file, at its first or a later occurrence."""
    text = read_text(path)
    begins = [match.start() for match in re.finditer(re.escape(json.dumps(name, ensure_ascii=False)), text)]
    begin = begins[min(occurrence, len(begins) - 1)] if begins else 0
    return f"{path}:{text.count(chr(10), 0, begin) + 1}"
