"""The small BART that is made of a BERT: its tensors, its vocabulary, text infilling, and a short run."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_seq2seq
from flax.traverse_util import flatten_dict

from benchmarks import pretrain_small_bart as small_bart
from benchmarks.span_corruption import infill, lengths_of
from pats_jax import models
from pats_jax.errors import InputError

MASK, BEGIN, END = 4, 2, 3


def test_an_infilled_row_has_one_mask_for_each_span():
    rng = np.random.default_rng(0)
    lengths = lengths_of(40, 0.3, 3.0)
    tokens = np.stack([rng.permutation(np.arange(10, 200))[:40] for _ in range(50)])
    sources, targets = infill(tokens, rng, lengths=lengths, mask=MASK, begin=BEGIN, end=END)
    np.testing.assert_array_equal(targets, np.pad(tokens, ((0, 0), (1, 1)), constant_values=((0, 0), (BEGIN, END))))
    assert sources.shape == (50, 40 - lengths.hidden + lengths.spans + 2)
    for source, row in zip(sources, tokens, strict=True):
        assert source[0] == BEGIN and source[-1] == END and np.sum(source == MASK) == lengths.spans
        kept = source[(source != MASK)][1:-1]
        assert len(kept) == 40 - lengths.hidden and list(kept) == [token for token in row if token in set(kept)]
        places = {token: place for place, token in enumerate(row)}
        for before, token, after in zip(source, source[1:], [*source[2:-1], END], strict=False):
            if token == MASK and after != END:
                assert places[after] - places[before] > 1, "a mask where nothing is hidden"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("bert"), num_hidden_layers=3)


TEXTS = ["ann is warm and bob is cold .", "bob is warm .", "ann is kind ."]


def test_its_encoder_answers_as_the_bert_does(bert, tmp_path):
    """Its states are those of the BERT, whose words it has under other numbers."""
    size = len({*small_bart._SPECIAL, ".", *" ".join(TEXTS).split()})
    recipe = small_bart.Recipe(model=str(bert), vocab_size=size, decoder_layers=2)
    tokenizer = small_bart.write_start(recipe, TEXTS, tmp_path)
    model, params, config = models.from_pretrained_seq2seq(tmp_path)
    assert len(tokenizer) == config.vocab_size == size and config.num_layers_of == {"encoder": 3, "decoder": 2}
    ids = jnp.array(tokenizer(TEXTS[:1])["input_ids"])
    found = model.apply({"params": params}, ids, jnp.ones_like(ids), True, method="encoded")

    of_bert, bert_params, _ = models.from_pretrained(bert, num_labels=2)
    own = jnp.array(tiny.tokenizer()(TEXTS[:1])["input_ids"])
    _, states = of_bert.apply({"params": bert_params}, own, output_hidden_states=True)
    # A classifier has the last state of the first token alone. BART's norms have an epsilon of 1e-5, BERT's of 1e-12.
    np.testing.assert_allclose(found[:, :1], states[-1], atol=2e-4)

    layers, third = params["model"]["decoder"]["layers"], params["model"]["encoder"]["layers"]["2"]
    np.testing.assert_array_equal(layers["1"]["fc1"]["kernel"], third["fc1"]["kernel"])
    np.testing.assert_array_equal(
        layers["1"]["encoder_attn"]["q_proj"]["kernel"], third["self_attn"]["q_proj"]["kernel"]
    )


def test_the_vocabulary_is_cut_to_what_the_texts_need():
    size = len({*small_bart._SPECIAL, ".", "is", "ann"})
    cut, rows = small_bart.cut_tokenizer(tiny.tokenizer(), ["ann is .", "ann is is"], size)
    kept = [tiny.VOCABULARY[row] for row in rows]
    assert kept[:6] == [*small_bart._SPECIAL, "."] and sorted(kept[6:]) == ["ann", "is"]
    assert cut.convert_ids_to_tokens(cut("Ann is bob .")["input_ids"]) == ["[CLS]", "ann", "is", "[UNK]", ".", "[SEP]"]
    with pytest.raises(InputError, match="--vocab_size 5: the special tokens and single characters are 6"):
        small_bart.cut_tokenizer(tiny.tokenizer(), TEXTS, 5)


@pytest.mark.slow
def test_only_the_decoders_layers_are_trained(bert, tmp_path):
    draw = np.random.default_rng(0).choice
    rows = [
        {"task": "xsum", "input": " ".join(draw(tiny.NAMES, 9)), "output": "kind", "options": []} for _ in range(300)
    ]
    tiny.write_lines(tmp_path / "data" / "gym" / "xsum" / "xsum_16_13_train.jsonl", rows)
    out = tmp_path / "out"
    flags = "--steps 4 --batch_size 8 --tokens 6 --vocab_size 16 --warmup_steps 1 --eval_steps 2 --save_steps 2".split()
    flags += ["--data_dir", str(tmp_path / "data"), "--output_dir", str(out), "--model", str(bert)]
    small_bart.main(flags)
    curve = json.loads((out / "loss_curve.json").read_text())
    assert [step for step, _ in curve["held_out_loss"]] == [2, 4]
    start, trained = (flatten_dict(models.from_pretrained_seq2seq(folder)[1]) for folder in (out / "start", out))
    changed = {path for path in start if not np.array_equal(start[path], trained[path])}
    assert {path[1:3] for path in changed} == {("decoder", "layers")}


def test_only_a_bert_becomes_a_bart(tmp_path):
    seq2seq = tiny_seq2seq.save_checkpoint(tmp_path / "one")
    roberta = tiny.save_checkpoint(tmp_path / "other", model_type="roberta")
    for folder, part in ((seq2seq, "an encoder-decoder"), (roberta, "a roberta; only a BERT can become a BART")):
        recipe = small_bart.Recipe(model=str(folder), vocab_size=16)
        with pytest.raises(InputError, match=part):
            small_bart.write_start(recipe, TEXTS, tmp_path / "out")
