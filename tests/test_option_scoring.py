"""The heads against NumPy, one row and option at a time without padding; loss, decision, masks and mistakes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny
from flax.traverse_util import flatten_dict
from model_parity import by_tensor_name
from numpy_bert import NumpyBert, gelu
from safetensors.numpy import load_file, save_file

from pats_jax import models
from pats_jax.data.few_shot import FewShotTask, Row, Sample
from pats_jax.errors import InputError
from pats_jax.models import peft
from pats_jax.priming import option_scoring
from pats_jax.priming.option_scoring import HEADS, Head, encode_rows, get_head, load_scorer, option_scores, pad_to

CONFIG = dataclasses.replace(tiny.CONFIG, max_position_embeddings=80)
LONGEST = 64
CLASSES = ("warm", "cold and dull", "rude")
ROWS = {
    "classes": [
        Row("ann and bob is warm and kind .", CLASSES, 0),
        Row("cid is rude", CLASSES, 2),
        Row("eve is cold and dull .", CLASSES, 1),
    ],
    "own": [
        Row("ann is", ("warm and kind", "fay"), 1),
        Row(" and ".join(["bob is calm"] * 9), ("calm", "cold", "eve and fay and ann and bob is bright ."), 0),
        Row("dan is loud .", ("dan", "loud and rude", "kind", "bob is dull"), 3),
    ],
}
KINDS = {
    "no modules": None,
    "prompt": peft.PromptConfig(length=4),
    "lora": peft.LoraConfig(rank=2, layers=r"\.(query|value|dense)$"),
}


def save(folder, config=CONFIG, *, mlm=True, labels=None, tokenizer=None):
    """A random checkpoint, with a masked-language-model head or a classification head or neither."""
    config = dataclasses.replace(config, id2label={i: str(i) for i in range(labels or 2)})
    models.save_pretrained(
        folder, params=tiny.random_params(config), config=config, tokenizer=tokenizer or tiny.tokenizer()
    )
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: x / 8 for name, x in tensors.items() if "pooler" in name}  # or its tanh saturates
    if labels is None:
        tensors = {name: x for name, x in tensors.items() if not name.startswith("classifier")}
    if mlm:
        rng, size = np.random.default_rng(1), config.hidden_size
        dense, norm, bias = (
            ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
            if config.is_roberta
            else tuple(f"cls.predictions.{name}" for name in ("transform.dense", "transform.LayerNorm", "bias"))
        )
        shapes = {f"{dense}.weight": (size, size), f"{norm}.weight": (size,), bias: (config.vocab_size,)}
        shapes |= {f"{dense}.bias": (size,), f"{norm}.bias": (size,)}
        tensors |= {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("checkpoint") / "with_mlm_head")


@pytest.fixture(scope="module")
def scorer(checkpoint):
    """``scorer(head, kind)``: model and parameters, all of them far from where they start."""

    @functools.cache
    def load(head, kind="no modules"):
        model, params = load_scorer(str(checkpoint), head, KINDS[kind], key=0)
        rng = np.random.default_rng(2)

        def draw(path, leaf):
            new = path[0].key in ("classifier", "peft")
            return rng.normal(0, 0.5, leaf.shape).astype(np.float32) if new else leaf

        return model, jax.tree_util.tree_map_with_path(draw, params)

    return load


def rows_for(head):
    return ROWS["own" if get_head(head).for_all_tasks else "classes"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def compiled_scores(head, model, params, batch):
    return option_scores(HEADS[head], model, params, batch)


def encode(head, rows, **options):
    return encode_rows(HEADS[head], rows, tiny.tokenizer(), LONGEST, **options)


# the same in NumPy


class Reference:
    """One text at a time, as long as it is, by NumPy's BERT."""

    def __init__(self, model, params):
        self.params = jax.device_get(params)
        self.bert = NumpyBert(by_tensor_name({n: t for n, t in params.items() if n not in ("peft", "mlm")}), CONFIG)
        own = getattr(model, "peft", None)
        self.prompt_length = 0
        if isinstance(own, peft.PromptConfig):
            self.bert.prompt, self.prompt_length = np.float64(self.params["peft"]["prompt_embeddings"]), own.length
        if isinstance(own, peft.LoraConfig):
            branches = {".".join(path): np.float64(x) for path, x in flatten_dict(self.params["peft"]).items()}
            layers = 5 + (
                not own.train_pooler
            )  # query, value, three dense ones, and the pooler if it is not trained whole
            assert len(branches) == 2 * layers
            plain = self.bert.plain_linear

            def with_branch(name, x):
                if f"{name}.lora_A.kernel" not in branches:
                    return plain(name, x)
                down, up = (branches[f"{name}.lora_{part}.kernel"] for part in "AB")
                return plain(name, x) + x @ down @ up * own.alpha / own.rank

            self.bert.linear = with_branch

    def read(self, first, second=None):
        """Ids of a text or pair, last hidden states (tokens, hidden) and logits (labels,)."""
        encoded = tiny.tokenizer()(first, second)
        ids, types = np.array([encoded["input_ids"]]), np.array([encoded["token_type_ids"]])
        block_ends = []
        self.bert.block_end = lambda name, x, residual: (
            block_ends.append(self.bert.norm(f"{name}.LayerNorm", residual + x)) or block_ends[-1]
        )
        logits = self.bert.logits(ids, np.ones(ids.shape), types)
        return ids[0], block_ends[-1][0, self.prompt_length :], logits[0]

    def embedding(self, row, option):
        one, other = (self.read(text)[1].mean(axis=0) for text in (row.input, option))
        return 20 * one @ other / np.linalg.norm(one) / np.linalg.norm(other)

    def pair(self, row, option):
        return self.read(row.input, option)[2].item()

    def mlm(self, row, option):
        asked = tiny.tokenizer()(option, add_special_tokens=False)["input_ids"]
        ids, hidden, _ = self.read(row.input, "[MASK]" * len(asked))
        head = jax.tree.map(np.float64, self.params["mlm"])
        x = gelu(hidden[ids == tiny.SPECIAL.index("[MASK]")] @ head["dense"]["kernel"] + head["dense"]["bias"])
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + CONFIG.layer_norm_eps)
        x = x * head["LayerNorm"]["scale"] + head["LayerNorm"]["bias"]
        logits = x @ self.bert.tensors["bert.embeddings.word_embeddings.weight"].T + head["bias"]
        return scipy.special.log_softmax(logits, axis=1)[np.arange(len(asked)), asked].mean()

    def classes(self, row, option):
        return self.read(row.input)[2][row.options.index(option)]

    def scores(self, head, rows):
        """One list for each row."""
        return [[getattr(self, head)(row, option) for option in row.options] for row in rows]


def assert_scores(found, expected, tolerance=1e-4):
    """The options that there are, and that the others are out of the question."""
    for ours, theirs in zip(np.asarray(found), expected, strict=True):
        np.testing.assert_allclose(ours[: len(theirs)], theirs, rtol=0, atol=tolerance * np.abs(theirs).max())
        assert np.all(ours[len(theirs) :] < min(theirs) - 1e6)


@pytest.mark.parametrize(
    "head, kind",
    [
        *((head, "no modules") for head in HEADS),
        *(("embedding", "prompt"), ("pair", "lora"), ("mlm", "prompt")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("embedding", "lora"), ("pair", "prompt"), ("mlm", "lora"))
        ),
    ],
)
def test_scores_are_those_of_numpy_option_by_option(scorer, head, kind):
    """Rows have different numbers of options, and texts and options are of many lengths."""
    model, params = scorer(head, kind)
    rows = rows_for(head)
    expected = Reference(model, params).scores(head, rows)
    found = compiled_scores(head, model, params, encode(head, rows))
    assert found.dtype == jnp.float32
    assert_scores(found, expected)
    assert np.ptp(np.concatenate(expected)) > 0.1


@pytest.mark.parametrize("head", HEADS)
def test_padding_and_neighbours_change_neither_scores_nor_gradients(scorer, head):
    model, params = scorer(head)
    rows = rows_for(head)
    batch = encode(head, rows)
    batch["weights"] = np.ones(len(rows), np.float32)
    wider = pad_to(encode(head, [*rows, rows[0]]), {name: more(name, x.shape[1:]) for name, x in batch.items()})
    wider["weights"] = np.float32([1, 1, 1, 0])

    @jax.jit
    def loss_and_gradient(params, batch):
        return jax.value_and_grad(
            option_scoring.make_option_loss(HEADS[head], model, deterministic=True), has_aux=True
        )(params, batch, jax.random.key(0))

    ((loss, metrics), gradient), ((own_loss, own_metrics), own) = (
        loss_and_gradient(params, padded) for padded in (batch, wider)
    )
    assert float(own_loss) == pytest.approx(float(loss), rel=1e-4)
    assert float(own_metrics["accuracy"]) == float(metrics["accuracy"])
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    assert largest > 1e-3
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-4 * largest)  # never nan, even in slots of padding
    expected = compiled_scores(head, model, params, encode(head, rows))
    assert_scores(
        compiled_scores(head, model, params, wider)[:-1],
        [own[: len(row.options)] for own, row in zip(np.asarray(expected), rows, strict=True)],
    )


def more(name, shape):
    """Two slots and eight tokens more."""
    if name == "option_mask" and len(shape) == 1:
        return (shape[0] + 2,)
    if len(shape) == 2:
        return shape[0] + 2, shape[1] + 8
    return tuple(size + 8 for size in shape)


@pytest.mark.parametrize("head", HEADS)
def test_shared_options_give_the_same_scores(scorer, head):
    model, params = scorer(head)
    shared, apart = (encode(head, ROWS["classes"], share_options=share) for share in (True, False))
    if head == "embedding":
        assert shared["option_input_ids"].shape[0] == 1 and apart["option_input_ids"].shape[0] == 3
    found, expected = (compiled_scores(head, model, params, batch) for batch in (shared, apart))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    own = encode("embedding", ROWS["own"], share_options=True)
    assert own["option_input_ids"].shape[0] == len(ROWS["own"])  # nothing to share


def test_dropout_is_that_of_the_key(scorer):
    model, params = scorer("pair")
    batch = encode("pair", ROWS["classes"])
    scores = jax.jit(functools.partial(option_scores, HEADS["pair"], model))
    one, again, other = (scores(params, batch, jax.random.key(seed)) for seed in (0, 0, 1))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    losses = [
        jax.jit(option_scoring.make_option_loss(HEADS["pair"], model, deterministic=off))(
            params, batch, jax.random.key(0)
        )[0]
        for off in (True, False)
    ]
    without = compiled_scores("pair", model, params, batch)
    for loss, own in zip(losses, (without, one), strict=True):
        expected = -scipy.special.log_softmax(own, axis=1)[np.arange(3), batch["answers"]].mean()
        assert float(loss) == pytest.approx(expected, rel=1e-4)


# the masked-language-model head's batches


def mlm_batch(row, longest):
    """Of one row, without the axis of rows."""
    batch = encode_rows(HEADS["mlm"], [row], tiny.tokenizer(), longest)
    return {name: x[0] for name, x in batch.items()}


@pytest.mark.parametrize("text", ["ann is", "ann [MASK] is [MASK]", " and ".join(["bob is calm"] * 9), ""])
@pytest.mark.parametrize("length", [1, 5, 12, 30])
def test_masks_stand_for_the_options_first_tokens_whatever_the_text_holds(text, length):
    words = [tiny.GOOD[i % 4] for i in range(length)]
    batch = mlm_batch(Row(text, (" ".join(words), "cold"), 0), 16)
    ids, count = batch["input_ids"][0], int(batch["target_mask"][0].sum())
    assert count == min(length, 13) or (text and 6 <= count < min(length, 13))  # what truncation leaves of it
    places = batch["target_places"][0, :count]
    second = np.flatnonzero(ids == tiny.SPECIAL.index("[SEP]"))[0] + 1
    assert np.array_equal(places, np.arange(second, second + count))
    assert np.all(ids[places] == tiny.SPECIAL.index("[MASK]"))
    assert ids[second + count] == tiny.SPECIAL.index("[SEP]")
    assert batch["target_ids"][0, :count].tolist() == [tiny.VOCABULARY.index(word) for word in words[:count]]
    assert int(batch["target_mask"][1].sum()) == 1


def test_an_option_without_tokens_is_one_unknown_one():
    batch = mlm_batch(Row("ann is", ("", "warm"), 1), 16)
    assert batch["target_mask"].sum(axis=1).tolist() == [1, 1]
    assert batch["target_ids"][0, 0] == tiny.SPECIAL.index("[UNK]")


# RoBERTa


ROBERTA_ROWS = [
    Row("ann is warm", ("kind", "cold"), 0),
    Row("bob and cid is dull .", ("warm and kind", "loud", "rude"), 2),
]
ROBERTA = dataclasses.replace(
    CONFIG, model_type="roberta", type_vocab_size=1, pad_token_id=1, vocab_size=len(tiny.VOCABULARY)
)


@functools.cache
def roberta_tokenizer():
    import tokenizers
    import transformers

    special = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
    words = [*special.values(), *tiny.VOCABULARY[len(tiny.SPECIAL) :]]
    built = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    built.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    built.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    named = {f"{name}_token": token for name, token in special.items()}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=built, cls_token="<s>", sep_token="</s>", **named)


@pytest.mark.parametrize("head", [pytest.param("embedding", marks=pytest.mark.slow), "mlm"])
def test_roberta_scores_what_it_scores_without_padding(tmp_path, head):
    """Its positions are counted over tokens and its padding has id 1, and it has one type of tokens only."""
    folder = save(tmp_path / "roberta", ROBERTA, tokenizer=roberta_tokenizer())
    model, params = load_scorer(str(folder), head, None, key=0)
    tokenizer, rows = roberta_tokenizer(), ROBERTA_ROWS

    @jax.jit
    def last_states(ids):
        return model.apply({"params": params}, ids, output_hidden_states=True)[1][-1][0]

    def read(*texts):
        ids = np.array(tokenizer(*texts)["input_ids"])
        return ids, last_states(ids[None])

    def embedding(row, option):
        one, other = (np.float64(read(text)[1]).mean(axis=0) for text in (row.input, option))
        return 20 * one @ other / np.linalg.norm(one) / np.linalg.norm(other)

    def mlm(row, option):
        asked = tokenizer(option, add_special_tokens=False)["input_ids"]
        ids, hidden = read(row.input, "<mask>" * len(asked))
        words = params["roberta"]["embeddings"]["word_embeddings"]["embedding"]
        logits = models.mlm_logits(params["mlm"], ROBERTA, hidden[ids == 4], words)
        return scipy.special.log_softmax(np.float64(logits), axis=1)[np.arange(len(asked)), asked].mean()

    score = {"embedding": embedding, "mlm": mlm}[head]
    expected = [[score(row, option) for option in row.options] for row in rows]
    batch = encode_rows(HEADS[head], rows, tokenizer, LONGEST)
    assert_scores(compiled_scores(head, model, params, batch), expected)
    for name in [name for name in batch if name.endswith("input_ids")]:
        batch[name] = np.where(batch[name.replace("input_ids", "attention_mask")], batch[name], 1)
    assert_scores(compiled_scores(head, model, params, batch), expected)


# loss and decision


class TableHead(Head):
    """Its scores stand in the rows: "2 -1 0.5"."""

    summary = "for tests"

    def encode(self, rows, tokenizer, max_length, share_options=False):
        most = max(len(row.options) for row in rows)
        table = [[float(x) for x in row.input.split()] for row in rows]
        return {"table": np.float32([[*own, *[9e9] * (most - len(own))] for own in table])}

    def scores(self, model, params, batch, key):
        return jnp.asarray(batch["table"])


def table_rows(count, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 6, count)
    return [
        Row(" ".join(f"{x:.3f}" for x in rng.normal(size=size)), tuple("abcdef"[:size]), int(rng.integers(size)))
        for size in sizes
    ]


def table_of(row):
    return np.array(row.input.split(), float)


@pytest.mark.parametrize("weights", [None, [1, 1, 0.5, 0, 2, 0, 1, 1], [0] * 8])
def test_loss_and_accuracy_are_weighted_means(weights):
    rows = table_rows(8)
    batch = encode_rows(TableHead(), rows, None, 0)
    if weights is not None:
        batch["weights"] = np.float32(weights)
    loss, metrics = option_scoring.make_option_loss(TableHead(), None)(None, batch, jax.random.key(0))
    losses = [-scipy.special.log_softmax(table_of(row))[row.answer] for row in rows]
    right = [np.argmax(table_of(row)) == row.answer for row in rows]
    assert 0 < sum(right) < 8
    if weights == [0] * 8:
        assert float(loss) == float(metrics["accuracy"]) == 0
    else:
        assert float(loss) == pytest.approx(np.average(losses, weights=weights), rel=1e-5)
        assert float(metrics["accuracy"]) == pytest.approx(np.average(right, weights=weights), rel=1e-6)
    assert set(metrics) == {"accuracy"}


@pytest.mark.parametrize("batch_size", [1, 4, 30])
def test_chosen_are_the_best_options_in_the_rows_order(batch_size):
    rows, sizes = table_rows(22), []

    def scores(params, batch):
        sizes.append(len(batch["table"]))
        return option_scores(TableHead(), None, params, batch)

    chosen = option_scoring.choose(scores, TableHead(), None, rows, None, 0, batch_size)
    assert chosen.dtype == np.int64
    assert chosen.tolist() == [int(np.argmax(table_of(row))) for row in rows]
    assert sizes == [batch_size] * -(-22 // batch_size)


@pytest.mark.parametrize("share", [False, True])
def test_chosen_by_a_real_head(scorer, share):
    model, params = scorer("embedding")
    rows = ROWS["classes"] if share else ROWS["classes"] + ROWS["own"]
    expected = [int(np.argmax(own)) for own in Reference(model, params).scores("embedding", rows)]
    scores = functools.partial(compiled_scores, "embedding", model)
    arguments = HEADS["embedding"], params, rows, tiny.tokenizer(), LONGEST
    assert option_scoring.choose(scores, *arguments, 2, share_options=share).tolist() == expected


# rows and shapes


@pytest.mark.parametrize("head", HEADS)
def test_every_batch_of_the_rows_fits_the_shapes_of_all(head):
    rows = ROWS["classes"] if head == "classes" else [*ROWS["own"], *ROWS["classes"]]
    shapes = option_scoring.row_shapes(HEADS[head], rows, tiny.tokenizer(), LONGEST)
    for some in ([row] for row in rows):
        batch = encode(head, some)
        full = pad_to(batch, shapes)
        assert {name: x.shape[1:] for name, x in full.items()} == shapes
        for name, x in batch.items():
            assert np.array_equal(full[name][tuple(map(slice, x.shape))], x)
            assert full[name].sum() == x.sum() and full[name].dtype == x.dtype


@pytest.mark.parametrize("size, expected", [(1, 8), (8, 8), (9, 16), (33, 64)])
def test_sizes_are_few(size, expected):
    assert option_scoring.padded(size, 8) == expected


@pytest.mark.parametrize("words, expected", [(3, 16), (15, 24), (23, 32), (31, 48), (50, 64), (99, 64)])
def test_lengths_are_few(words, expected):
    """Two of special tokens are added; none is above the longest allowed."""
    row = Row(" ".join(["a"] * words), ("b", "c"), 0)
    batch = encode_rows(get_head("classes"), [row], tiny.tokenizer(), 64)
    assert batch["input_ids"].shape == (1, expected) and batch["attention_mask"].sum() == min(words + 2, 64)


def test_fewer_options_keep_the_right_one_and_the_order():
    row, kept = Row("text", tuple("abcdefgh"), 5), set()
    rng = np.random.default_rng(0)
    for _ in range(200):
        found = option_scoring.with_fewer_options(row, 3, rng)
        assert found.input == "text" and found.output == "f" and len(set(found.options)) == 3
        assert list(found.options) == sorted(found.options)
        kept.add(found.options)
    assert len(kept) == 7 * 6 // 2  # every pair of the others comes up
    for most in (8, 9):
        assert option_scoring.with_fewer_options(row, most, rng) is row
    assert option_scoring.with_fewer_options(row, 1, rng) == Row("text", ("f",), 0)


# what is trained


PARTS = {
    "plm": r"bert\.(embeddings|encoder)\.",
    "pe": r"peft\.",
    "embedding": None,
    "pair": r"bert\.pooler\.|classifier\.",
    "mlm": None,
    "classes": r"bert\.pooler\.|classifier\.",
}


@pytest.mark.parametrize("trained", ["plm", "pe", "plm+pe"])
@pytest.mark.parametrize("head", HEADS)
def test_what_is_trained(scorer, head, trained):
    """By the names of the parameters; never the masked-language-model head."""
    _, params = scorer(head, "lora")
    found = flatten_dict(option_scoring.trainable_mask(params, trained, head))
    assert found.keys() == flatten_dict(params).keys()
    pattern = "|".join(filter(None, (PARTS[part] for part in (*trained.split("+"), head))))
    for path, keep in found.items():
        assert keep == bool(re.match(pattern, ".".join(path))), path
    assert {path[0] for path in found} == {"bert", "classifier", "peft"} | ({"mlm"} if head == "mlm" else set())


@pytest.mark.parametrize("head", HEADS)
def test_what_is_loaded(scorer, checkpoint, head):
    """All hidden states where they are needed, room for the classes, the pooler saved where it is trained."""
    model, params = scorer(head, "prompt")
    assert model.first_token_only == (head in ("pair", "classes"))
    assert model.peft.train_pooler == (head in ("pair", "classes"))
    assert params["classifier"]["kernel"].shape == (16, option_scoring.MOST_CLASSES if head == "classes" else 1)
    tensors = load_file(checkpoint / "model.safetensors")
    loaded = by_tensor_name({"bert": params["bert"]})
    assert all(np.array_equal(x, tensors[name]) for name, x in loaded.items())


def test_a_head_of_another_size_is_replaced_where_the_flag_is_given(tmp_path):
    folder = tiny.save_checkpoint(tmp_path / "model", 3)
    with pytest.raises(InputError, match="has 3 labels, but 1 are needed; set ignore_mismatched_sizes"):
        load_scorer(str(folder), "pair", None, key=0)
    _, params = load_scorer(str(folder), "pair", None, key=0, ignore_mismatched_sizes=True)
    assert params["classifier"]["kernel"].shape == (16, 1)


def test_roberta_has_no_pooler_to_train(tmp_path):
    folder = save(tmp_path / "roberta", ROBERTA, mlm=False, tokenizer=roberta_tokenizer())
    model, params = load_scorer(str(folder), "pair", peft.LoraConfig(rank=1), key=0)
    assert not model.peft.train_pooler
    mask = option_scoring.trainable_mask(params, "pe", "pair")
    assert all(jax.tree.leaves(mask["classifier"])) and len(mask["classifier"]) == 2
    assert not any(jax.tree.leaves(mask["roberta"]))


def test_masked_language_model_head_of_another_checkpoint(tmp_path, checkpoint):
    without = save(tmp_path / "without", mlm=False)
    _, expected = load_scorer(str(checkpoint), "mlm", None, key=0)
    _, params = load_scorer(str(without), "mlm", None, key=0, mlm_head_from=str(checkpoint))
    assert jax.tree.all(jax.tree.map(np.array_equal, params["mlm"], expected["mlm"]))


@pytest.mark.parametrize("head", ["embedding", "mlm"])
def test_a_classification_head_that_is_not_used_does_not_matter(tmp_path, head):
    _, params = load_scorer(str(save(tmp_path / "three_classes", labels=3)), head, None, key=0)
    assert params["classifier"]["kernel"].shape == (16, 1)


# mistakes


def refused(call, message):
    with pytest.raises(InputError) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_head_that_there_is_not(checkpoint):
    message = "--head sum: no such head; choose one of embedding, pair, mlm, classes"
    for call in (lambda: get_head("sum"), lambda: load_scorer(str(checkpoint), "sum", None, key=0)):
        refused(call, message)


def test_classes_have_no_answer_to_multiple_choice():
    task = FewShotTask("riddles", None, (Sample(13, tuple(ROWS["own"]), ()),))
    many = FewShotTask("many", tuple(map(str, range(25))), ())
    most = FewShotTask("most", tuple(map(str, range(24))), ())
    for wrong in (task, many):
        refused(
            lambda wrong=wrong: option_scoring.check_tasks("classes", [most, wrong]),
            f"--head classes: {wrong.name} is multiple choice, or has more than 24 classes",
        )
        for head in ("embedding", "pair", "mlm"):
            option_scoring.check_tasks(head, [wrong])
    option_scoring.check_tasks("classes", [most])
    refused(lambda: encode("classes", ROWS["own"]), "--head classes: rows with their own options have no classes")


def test_a_checkpoint_without_the_head_that_is_asked_for(tmp_path):
    folder = save(tmp_path / "without", mlm=False)
    refused(
        lambda: load_scorer(str(folder), "mlm", None, key=0),
        f"{folder}: the checkpoint has no masked-language-model head (cls.predictions.bias)",
    )


@pytest.mark.parametrize("head, needed", [("pair", 1), ("classes", 24)])
def test_a_checkpoint_whose_own_classes_are_others(tmp_path, head, needed):
    folder = save(tmp_path / "three_classes", mlm=False, labels=3)
    refused(
        lambda: load_scorer(str(folder), head, None, key=0), f"the checkpoint's head has 3 labels, but {needed} are"
    )
