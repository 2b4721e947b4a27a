"""Option scoring: an encoder answers a row of a few-shot task by scoring each of its options.

``HEADS`` lists the heads by name. All but ``classes`` use one head for all tasks, so that what an upstream stage learns
on some tasks carries over to others. Heads differ in how they encode a batch of rows and compute scores from it; loss
and decision are the same.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pats_jax import models
from pats_jax.data import batches
from pats_jax.data.few_shot import FewShotTask, Row
from pats_jax.errors import InputError
from pats_jax.models import peft
from pats_jax.models.config import HEAD_PARTS
from pats_jax.train_state import Batch, LossFn, model_inputs, weighted_mean

# Sizes of a batch are rounded up to one of these doubled some times (lengths also to 3/2 of one), so that few shapes
# are compiled.
SHORTEST_TEXT, SHORTEST_OPTION, FEWEST_OPTIONS = 16, 8, 3
# Scores of options that a row does not have; finite, so that no gradient is nan.
NO_OPTION = -1e9


class Head(abc.ABC):
    """A way to score options.

    Attributes:
      trains: the parts of the model's own parameters that belong to the head, of "classifier" and "pooler".
      for_all_tasks: whether all tasks share the head, so that it can be primed.
    """

    trains: tuple[str, ...] = ()
    for_all_tasks = True

    def slots(self, options: int) -> int:
        """The number of option slots in a batch whose rows have at most ``options`` options."""
        return options

    @abc.abstractmethod
    def encode(
        self, rows: Sequence[Row], tokenizer: Any, max_length: int, share_options: bool = False
    ) -> dict[str, np.ndarray]:
        """Encodes rows as the arrays that `scores` reads, (rows, ...), padded to few shapes; see `encode_rows`."""

    @abc.abstractmethod
    def scores(self, model: models.SequenceClassifier, params: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
        """Scores, (rows, options) float32; the key is for dropout, None for no dropout."""


class EmbeddingHead(Head):
    """Embeds input and option separately: score = 20 cos(e(input), e(option)), e the mean of the last hidden states.

    Sentence encoders such as all-MiniLM-L6-v2 are trained with this similarity and scale (Reimers and Gurevych 2019,
    arXiv 1908.10084). It adds no parameters.
    """

    def slots(self, options):
        return padded(options, FEWEST_OPTIONS)  # short texts: those too many cost little, a shape more costs seconds

    def encode(self, rows, tokenizer, max_length, share_options=False):
        inputs = _pad(_ids(tokenizer, [row.input for row in rows], max_length), SHORTEST_TEXT, max_length)
        if share_options and len({row.options for row in rows}) == 1:
            rows = rows[:1]
        choices = _pad(_ids(tokenizer, _options(rows, self), max_length), SHORTEST_OPTION, max_length)
        return inputs | {f"option_{name}": x.reshape(len(rows), -1, x.shape[1]) for name, x in choices.items()}

    def scores(self, model, params, batch, key):
        keys = (None, None) if key is None else jax.random.split(key)
        inputs = _embed(model, params, batch["input_ids"], batch["attention_mask"], keys[0])
        ids, mask = batch["option_input_ids"], batch["option_attention_mask"]
        length = ids.shape[-1]
        options = _embed(model, params, ids.reshape(-1, length), mask.reshape(-1, length), keys[1])
        options = options.reshape(*ids.shape[:2], -1)
        return 20.0 * jnp.sum(inputs[:, None, :] * options, axis=2)  # options (rows, ...) or (1, ...)


class PairHead(Head):
    """Reads input and option as a sentence pair: score = the only logit of a classification head."""

    trains = ("classifier", "pooler")

    def encode(self, rows, tokenizer, max_length, share_options=False):
        encoded = _pairs(rows, _options(rows, self), tokenizer, max_length)
        return {name: x.reshape(len(rows), -1, x.shape[1]) for name, x in encoded.items()}

    def scores(self, model, params, batch, key):
        rows, options, length = batch["input_ids"].shape
        flat = {name: x.reshape(-1, length) for name, x in model_inputs(batch).items()}
        logits = model.apply({"params": params}, **flat, deterministic=key is None, rngs=_rngs(key))
        return logits[:, 0].reshape(rows, options)


class MaskedLanguageModelHead(Head):
    """Masks the option: score = mean of log p(token) over the option's tokens, by the model's own head.

    The text is the input followed, as second sentence, by as many masks as the option has tokens. The mean makes
    options of different lengths comparable (ours; a sum would favor short ones). The head itself is not trained, but
    it uses the model's current word embeddings.
    """

    def encode(self, rows, tokenizer, max_length, share_options=False):
        spelt = _tokenize(tokenizer, _options(rows, self), add_special_tokens=False, max_length=max_length)
        spelt = [ids or [tokenizer.unk_token_id] for ids in spelt["input_ids"]]
        targets = _pad(spelt, SHORTEST_OPTION, max_length)
        encoded = _pairs(rows, [tokenizer.mask_token * len(ids) for ids in spelt], tokenizer, max_length)
        is_mask, ends = encoded["input_ids"] == tokenizer.mask_token_id, encoded["attention_mask"].sum(axis=1) - 1
        places = np.zeros_like(targets["input_ids"])
        for place, asked, masked, end in zip(places, targets["attention_mask"], is_mask, ends, strict=True):
            # the last ones in a row: the text may hold masks, too, and long options lose some to truncation
            count = np.cumprod(masked[:end][::-1]).sum()
            asked[count:] = 0
            place[:count] = np.arange(end - count, end)
        encoded |= {
            "target_ids": targets["input_ids"],
            "target_mask": targets["attention_mask"],
            "target_places": places,
        }
        return {name: x.reshape(len(rows), -1, x.shape[1]) for name, x in encoded.items()}

    def scores(self, model, params, batch, key):
        flat = {name: x.reshape(-1, x.shape[2]) for name, x in batch.items() if x.ndim == 3}
        hidden = _last_states(model, params, model_inputs(flat), key)
        hidden = jnp.take_along_axis(hidden, flat["target_places"][:, :, None], axis=1)
        table = model.config.word_embeddings(params)
        logits = models.mlm_logits(params["mlm"], model.config, hidden, table)
        found = -optax.softmax_cross_entropy_with_integer_labels(logits, flat["target_ids"])
        mask = flat["target_mask"].astype(jnp.float32)
        mean = jnp.sum(mask * found, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1.0)
        return mean.reshape(batch["input_ids"].shape[:2])


class ClassesHead(Head):
    """A separate head for every classification task: score = the logit of the class. The baseline.

    It ignores the text of the options, so it must learn them from the task's few rows, cannot be primed, and does not
    support multiple choice.
    """

    trains = ("classifier", "pooler")
    for_all_tasks = False

    def encode(self, rows, tokenizer, max_length, share_options=False):
        return _pad(_ids(tokenizer, [row.input for row in rows], max_length), SHORTEST_TEXT, max_length)

    def scores(self, model, params, batch, key):
        logits = model.apply({"params": params}, **model_inputs(batch), deterministic=key is None, rngs=_rngs(key))
        return logits[:, : batch["option_mask"].shape[1]]


HEADS: dict[str, Head] = {
    "embedding": EmbeddingHead(),
    "pair": PairHead(),
    "mlm": MaskedLanguageModelHead(),
    "classes": ClassesHead(),
}
MOST_CLASSES = 24  # of the baseline's head


def get_head(name: str) -> Head:
    """The head of ``--head``.

    Raises:
      InputError: if there is no such head.
    """
    if name not in HEADS:
        raise InputError(f"--head {name}: no such head; choose one of {', '.join(HEADS)}")
    return HEADS[name]


def load_scorer(
    name_or_dir: str,
    head: str,
    config: peft.PeftConfig | None,
    *,
    key: int,
    adapter: str | None = None,
    mlm_head_from: str | None = None,
    **options: Any,
) -> tuple[models.SequenceClassifier, Any]:
    """Loads a pretrained encoder that scores options, with an adapter if a config is given, and its parameters.

    Args:
      name_or_dir: as for `pats_jax.models.from_pretrained`.
      head: name of one of ``HEADS``.
      config: method and settings of a new adapter; None: no adapter.
      key: an int, for the new parameters of adapter and head.
      adapter: folder of a saved adapter, instead of a new one.
      mlm_head_from: checkpoint with the masked-language-model head, which is not trained; None: name_or_dir.
      **options: further arguments of `pats_jax.models.from_pretrained`.

    Raises:
      InputError: if the checkpoint cannot be loaded, lacks the requested masked-language-model head, or does not match
        the saved adapter.
    """
    labels = 1 if get_head(head).for_all_tasks else MOST_CLASSES
    unused = "classifier" not in get_head(head).trains  # whatever the checkpoint's own classification head is, then
    model, params, _ = models.from_pretrained(
        name_or_dir, **{"num_labels": labels, "key": key, "new_head": unused} | options
    )
    if config is not None:
        if "pooler" in get_head(head).trains and model.config.has_pooler:
            config = dataclasses.replace(config, train_pooler=True)
        model, params = peft.add_peft(model, params, config, key=key)
    if adapter is not None:
        model, params = peft.load_peft(adapter, model, params)
    if head == "mlm":  # after the modules, which are for the encoder alone
        params = {**params, "mlm": models.load_mlm_head(mlm_head_from or name_or_dir, model.config)}
    return model.clone(first_token_only=head in ("pair", "classes")), params


def text_length(asked: int, model: models.SequenceClassifier) -> int:
    """``--max_seq_length``, reduced to the positions that virtual tokens leave.

    Raises:
      InputError: if too few positions are left for an input and an option.
    """
    length = min(asked, model.max_length)
    if length < SHORTEST_OPTION:
        raise InputError(
            f"--max_seq_length, --prompt_length, --prefix_length: they leave {length} of {model.config.max_length} "
            f"tokens for a text, which needs {SHORTEST_OPTION}"
        )
    return length


def trainable_mask(params: Any, trained: str, head: str) -> Any:
    """A tree of bools like params: whether each parameter is trained.

    Args:
      params: from `load_scorer`.
      trained: "plm" (the pretrained model), "pe" (the adapter) or "plm+pe"; the head is always trained.
      head: name of one of ``HEADS``.
    """
    parts, own = trained.split("+"), get_head(head).trains

    def is_trained(path, _):
        names = [entry.key for entry in path]
        if names[0] in ("peft", "mlm"):
            return names[0] == "peft" and "pe" in parts
        if names[0] in HEAD_PARTS:
            return "classifier" in own
        if names[1] == "pooler":
            return "pooler" in own
        return "plm" in parts

    return jax.tree_util.tree_map_with_path(is_trained, params)


def encode_rows(
    head: Head, rows: Sequence[Row], tokenizer: Any, max_length: int, *, share_options: bool = False
) -> dict[str, np.ndarray]:
    """Encodes a batch: the head's arrays, ``option_mask`` (rows, options), 1 for each option, and ``answers`` (rows,).

    Args:
      head: the head that reads the batch.
      rows: at least one row.
      tokenizer: the model's tokenizer.
      max_length: maximum length of a text, in tokens.
      share_options: whether arrays of options may have a first axis of 1, if all rows share their options and the head
        supports it: the same scores for less work. Such a batch cannot be split across devices by rows.

    Raises:
      InputError: if the rows have different options, for the head ``classes``.
    """
    if not head.for_all_tasks and len({row.options for row in rows}) > 1:
        raise InputError("--head classes: rows with their own options have no classes; use another head")
    counts = np.array([len(row.options) for row in rows])
    mask = (np.arange(head.slots(counts.max())) < counts[:, None]).astype(np.int32)
    answers = np.array([row.answer for row in rows], np.int32)
    return head.encode(rows, tokenizer, max_length, share_options) | {"option_mask": mask, "answers": answers}


def option_scores(head: Head, model: Any, params: Any, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """Scores, (rows, options) float32; options that a row lacks have scores far below all others."""
    scores = head.scores(model, params, batch, key).astype(jnp.float32)
    return jnp.where(batch["option_mask"] > 0, scores, NO_OPTION)


def make_option_loss(head: Head, model: Any, *, deterministic: bool = False) -> LossFn:
    """Makes a loss: the weighted mean cross-entropy of softmax(scores) against the right option, with accuracy.

    Returns:
      ``loss_fn(params, batch, key) -> (loss, {"accuracy": ...})``, for batches of `encode_rows`.
    """

    def loss_fn(params, batch, key):
        scores = option_scores(head, model, params, batch, None if deterministic else key)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch["answers"])
        right = (jnp.argmax(scores, axis=1) == batch["answers"]).astype(jnp.float32)
        weights = batch.get("weights")
        return weighted_mean(losses, weights), {"accuracy": weighted_mean(right, weights)}

    return loss_fn


def choose(
    scores: Callable[[Any, Batch], jax.Array],
    head: Head,
    params: Any,
    rows: Sequence[Row],
    tokenizer: Any,
    max_length: int,
    batch_size: int,
    share_options: bool = False,
) -> np.ndarray:
    """The option with the highest score, int64 (rows,); rows of similar length share batches of one size.

    Args:
      scores: ``scores(params, batch)``, the compiled `option_scores` of a model and head.
      head: the head that encodes rows.
      params: the model's parameters.
      rows: at least one row.
      tokenizer: the model's tokenizer.
      max_length: maximum length of a text, in tokens.
      batch_size: rows per batch; the last batch is filled up by repeating a row.
      share_options: see `encode_rows`.
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].options), len(rows[i].input)))
    chosen, parts = np.empty(len(rows), np.int64), []
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        filled = [rows[i] for i in index] + [rows[index[-1]]] * (batch_size - len(index))
        parts.append(
            (index, scores(params, encode_rows(head, filled, tokenizer, max_length, share_options=share_options)))
        )
    for index, part in parts:  # fetched when all have been dispatched
        chosen[index] = np.argmax(np.asarray(part), axis=1)[: len(index)]
    return chosen


def pad_to(batch: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Pads the arrays (rows, ...) of a batch with zeros to these shapes (...)."""
    return {
        name: np.pad(x, [(0, 0), *((0, size - own) for size, own in zip(shapes[name], x.shape[1:], strict=True))])
        for name, x in batch.items()
    }


def row_shapes(head: Head, rows: Sequence[Row], tokenizer: Any, max_length: int) -> dict[str, tuple[int, ...]]:
    """The shapes, without the rows' axis, that hold a batch of any of the rows; for `pad_to`."""
    return {name: x.shape[1:] for name, x in encode_rows(head, rows, tokenizer, max_length).items()}


def with_fewer_options(row: Row, most: int, rng: np.random.Generator) -> Row:
    """Keeps at most ``most`` options of a row, in their order: the right one, and others drawn at random.

    Examples:
      >>> row = Row("2 + 2", ("3", "4", "5", "6"), 1)
      >>> with_fewer_options(row, 2, np.random.default_rng(0))
      Row(input='2 + 2', options=('4', '6'), answer=0, references=(), whole=None)
    """
    if len(row.options) <= most:
        return row
    others = [index for index in range(len(row.options)) if index != row.answer]
    kept = sorted([row.answer, *rng.choice(others, most - 1, replace=False).tolist()])
    return row._replace(options=tuple(row.options[index] for index in kept), answer=kept.index(row.answer))


def check_tokens(head: str, tokenizer: Any, config: models.EncoderConfig, tasks: Sequence[FewShotTask]) -> None:
    """Raises InputError if the tokenizer gives an id or token type that the model lacks, for any text of the tasks.

    A look-up beyond an embedding table gives NaN, not an error.
    """
    if head == "mlm" and tokenizer.mask_token is None:
        raise InputError("--head mlm: the tokenizer has no mask token; use another head")
    if head in ("pair", "mlm"):
        pair = tokenizer("a", "b", return_token_type_ids=True)
        batches.check_types(max(pair["token_type_ids"]), config.type_vocab_size)
    if batches.largest_id(tokenizer) < config.vocab_size:
        return
    samples = [sample for task in tasks for sample in task.samples]
    rows = [row for sample in samples for row in (*sample.train, *sample.dev, *sample.test)]
    texts = list({text for row in rows for text in (row.input, *row.options)})
    ids = [own for row in tokenizer(texts, verbose=False)["input_ids"] for own in row]
    batches.check_vocabulary(max(*ids, tokenizer.mask_token_id if head == "mlm" else 0), config.vocab_size)


def check_tasks(head: str, tasks: Sequence[FewShotTask]) -> None:
    """Raises InputError if the head cannot answer one of the tasks."""
    if get_head(head).for_all_tasks:
        return
    for task in tasks:
        if task.options is None or len(task.options) > MOST_CLASSES:
            raise InputError(f"--head {head}: {task.name} is multiple choice, or has more than {MOST_CLASSES} classes")


def padded(size: int, smallest: int) -> int:
    """The smallest of ``smallest``, 2 * ``smallest``, 4 * ``smallest``, ... that is at least ``size``."""
    while smallest < size:
        smallest *= 2
    return smallest


def padded_ids(tokenizer: Any, texts: Sequence[str], shortest: int, longest: int) -> dict[str, np.ndarray]:
    """``input_ids`` and ``attention_mask`` of texts, padded with 0 to one of few lengths.

    Args:
      tokenizer: the tokenizer, which adds its special tokens.
      texts: at least one.
      shortest: the shortest length to pad to.
      longest: longer texts are truncated.
    """
    return _pad(_ids(tokenizer, texts, longest), shortest, longest)


def _ids(tokenizer, texts, max_length):
    return _tokenize(tokenizer, list(texts), max_length=max_length)["input_ids"]


def _tokenize(tokenizer, *texts, **options):
    try:
        return tokenizer(*texts, truncation=True, **options)
    except Exception as error:  # the tokenizers library itself raises bare Exceptions
        raise InputError(f"the tokenizer cannot encode a text of the tasks ({' '.join(str(error).split())})") from None


def _pad(ids, smallest, largest):
    """Ids and attention mask, (rows, length); padding is 0 for all models, because none reads it.

    The length is 16, 24, 32, 48, 64, 96, ..., so few programs are compiled.
    """
    longest = max(map(len, ids))
    length = min(padded(longest, smallest), padded(longest, smallest * 3 // 2), largest)
    mask = np.array([[1] * len(own) + [0] * (length - len(own)) for own in ids], np.int32)
    return {"input_ids": np.array([own + [0] * (length - len(own)) for own in ids], np.int32), "attention_mask": mask}


def _options(rows, head):
    """The options of all rows, one after another, with empty texts in unused slots."""
    slots = head.slots(max(len(row.options) for row in rows))
    return [text for row in rows for text in (*row.options, *[""] * (slots - len(row.options)))]


def _pairs(rows, seconds, tokenizer, max_length):
    """Every row with each of its second sentences, (rows x options, length)."""
    firsts = [row.input for row in rows for _ in range(len(seconds) // len(rows))]
    found = _tokenize(tokenizer, firsts, seconds, max_length=max_length, return_token_type_ids=True)
    batch = _pad(found["input_ids"], SHORTEST_TEXT, max_length)
    length = batch["input_ids"].shape[1]
    types = [own + [0] * (length - len(own)) for own in found["token_type_ids"]]
    return batch | {"token_type_ids": np.array(types, np.int32)}


def _last_states(model, params, inputs, key):
    """The last hidden states (rows, length, hidden) of the text's own tokens."""
    _, states = model.apply(
        {"params": params}, **inputs, output_hidden_states=True, deterministic=key is None, rngs=_rngs(key)
    )
    return states[-1][:, -inputs["input_ids"].shape[1] :]  # virtual tokens stand before the text's


def _embed(model, params, ids, mask, key):
    """Embeddings (rows, hidden) of length 1."""
    hidden = _last_states(model, params, {"input_ids": ids, "attention_mask": mask}, key).astype(jnp.float32)
    mean = jnp.einsum("rlh,rl->rh", hidden, mask.astype(jnp.float32))  # its length does not matter
    return mean * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(mean), axis=1, keepdims=True), 1e-24))


def _rngs(key):
    return None if key is None else {"dropout": key}
