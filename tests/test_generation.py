"""Generation: tokens of Transformers (tests/fixtures), and by other means; settings and what is refused."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_cases import FEW
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from model_parity import quick_jit

from pats_jax.errors import InputError
from pats_jax.models import GenerationConfig, from_pretrained_seq2seq, generate, make_generate_step
from pats_jax.models.seq2seq_config import config_from_dict

FIXTURES = Path(__file__).parent / "fixtures"
CASES = [(kind, number) for kind in FEW for number in range(len(FEW[kind]))][1:]  # the first is left to `generate`


@functools.cache
def stored(kind):
    return dict(np.load(FIXTURES / f"{kind}.npz"))


def source(kind):
    return {name: stored(kind)[name] for name in ("input_ids", "attention_mask")}


def settings_of(kind, **changes):
    values = json.loads((FIXTURES / kind / "generation_config.json").read_text())
    return GenerationConfig.from_dict(values | changes)


def generated(model, params, batch, settings):
    found = jax.device_get(quick_jit(make_generate_step(model, settings))(params, batch))
    return found.sequences.reshape(-1, found.sequences.shape[-1])[:, : int(found.length)]


@pytest.mark.parametrize(("kind", "number"), [*CASES[:-1], pytest.param(*CASES[-1], marks=pytest.mark.slow)])
def test_tokens_are_those_of_transformers(kind, number):
    model, params, _ = from_pretrained_seq2seq(FIXTURES / kind, layers="stacked" if number else "separate")
    found = generated(model, params, source(kind), settings_of(kind, **FEW[kind][number]))
    np.testing.assert_array_equal(found, stored(kind)[f"generated/{number}"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5-1.1", "bart"])
def test_greedy_search_with_a_cache_is_that_without(kind):
    """Each token from the logits of the whole sequence so far."""
    model, params, config = from_pretrained_seq2seq(FIXTURES / kind)
    settings = settings_of(kind, max_new_tokens=9, eos_token_id=[], forced_eos_token_id=None)
    batch, longest = source(kind), 10
    forward = quick_jit(lambda target: model.apply({"params": params}, **batch, decoder_input_ids=target))
    tokens = np.full((5, longest), config.pad_token_id)
    tokens[:, 0] = config.decoder_start_token_id
    for place in range(1, longest):
        tokens[:, place] = np.argmax(forward(tokens)[:, place - 1], axis=-1)
    np.testing.assert_array_equal(generated(model, params, batch, settings), tokens)
    assert len(np.unique(tokens[:, 1:])) > 2


@pytest.mark.slow
def test_many_beams_find_the_best_text():
    """With more beams than there are texts, the winner is the best of all texts of at most three words."""
    model, params, config = from_pretrained_seq2seq(FIXTURES / "t5")
    batch = jax.tree.map(lambda x: x[:1], source("t5"))
    settings = settings_of("t5", max_new_tokens=2, num_beams=60, early_stopping="never", length_penalty=0.7)
    step = quick_jit(make_generate_step(model, settings))(params, batch)
    target = jnp.stack([jnp.zeros(40, int), jnp.arange(40)], axis=1)
    rows = jax.tree.map(lambda x: np.repeat(x, 40, axis=0), batch)
    log_p = np.asarray(jax.nn.log_softmax(quick_jit(model.apply)({"params": params}, **rows, decoder_input_ids=target)))
    scores = (log_p[0, 0][:, None] + log_p[:, 1]) / 2**0.7
    scores[1] = -np.inf  # that text has ended
    best = np.unravel_index(scores.argmax(), scores.shape)
    expected = (0, *best) if scores.max() > log_p[0, 0, 1] else (0, 1, 1)
    np.testing.assert_array_equal(step.sequences[0, 0], expected)
    np.testing.assert_allclose(step.scores[0, 0], max(scores.max(), log_p[0, 0, 1]), rtol=1e-5)


@pytest.mark.devices(4)
def test_sharded_over_a_mesh():
    model, params, _ = from_pretrained_seq2seq(FIXTURES / "bart")
    settings = settings_of("bart", **FEW["bart"][1])
    batch = jax.tree.map(lambda x: np.concatenate([x, x])[:8], source("bart"))
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    step = jax.jit(make_generate_step(model, settings), compiler_options={"xla_backend_optimization_level": 0})
    found = step(jax.device_put(params, whole), jax.device_put(batch, rows))
    assert found.sequences.sharding.is_equivalent_to(rows, 3)
    expected = stored("bart")["generated/1"]
    np.testing.assert_array_equal(found.sequences[:, 0, : expected.shape[1]], np.concatenate([expected, expected])[:8])


def test_the_encoders_keys_are_kept_once_for_all_beams():
    model, params, config = from_pretrained_seq2seq(FIXTURES / "bart")
    states = jnp.zeros((5, 9, 16))
    cache = jax.eval_shape(lambda p: model.apply({"params": p}, states, 3, 11, method="start_cache"), params)
    assert [x.shape for x in jax.tree.leaves(cache.own)] == [(5, 4, 3, 11, 4)] * 2 * config.decoder_layers
    assert [x.shape for x in jax.tree.leaves(cache.cross)] == [(5, 4, 9, 4)] * 2 * config.decoder_layers


def test_generate_cuts_to_the_longest():
    model, params, _ = from_pretrained_seq2seq(FIXTURES / "t5")
    found = generate(model, params, **source("t5"), settings=settings_of("t5", **FEW["t5"][0]))
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, stored("t5")["generated/0"])


# settings


def test_settings_of_a_checkpoint(tmp_path):
    own = GenerationConfig.from_pretrained(FIXTURES / "bart")
    assert (own.start, own.eos_token_id, own.pad_token_id, own.forced_eos_token_id) == (2, (2,), 1, 2)
    assert own.longest(24) == 21 and own.longest(10) == 10 and own.shortest == 0
    config = json.loads((FIXTURES / "bart" / "config.json").read_text())
    old = config | {"num_beams": 4, "no_repeat_ngram_size": 3, "early_stopping": True, "max_length": 30}
    (tmp_path / "config.json").write_text(json.dumps(old | {"force_bos_token_to_be_generated": True}))
    found = GenerationConfig.from_pretrained(tmp_path)
    expected = {"num_beams": 4, "no_repeat_ngram_size": 3, "early_stopping": True, "max_length": 30}
    assert found == settings_of("bart", **expected, forced_bos_token_id=0)
    assert GenerationConfig.from_dict(found.to_dict()) == found


def test_settings_of_an_early_t5():
    config = config_from_dict({"model_type": "t5", "eos_token_id": [1, 5], "task_specific_params": {"x": 1}})
    found = GenerationConfig.from_config(config)
    assert (found.start, found.pad_token_id, found.eos_token_id) == (0, 0, (1, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_sample": True}, "do_sample True is not supported"),
        ({"repetition_penalty": 1.2}, "repetition_penalty 1.2 is not supported"),
        ({"bad_words_ids": [[3]]}, r"bad_words_ids \[\[3\]\] is not supported"),
        ({"num_beam_groups": 2}, "num_beam_groups 2 is not supported"),
        ({"what_is_this": 2}, "what_is_this 2 is not supported"),
        ({"num_beams": 0}, "num_beams must be a whole number, at least 1, got 0"),
        ({"num_beams": 2.5}, "num_beams must be a whole number"),
        ({"early_stopping": "always"}, "early_stopping must be true, false or 'never', got 'always'"),
        ({"max_length": 1}, "max_length must be a whole number, at least 2, got 1"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences 3 exceeds num_beams 2"),
        ({"min_new_tokens": 6, "max_new_tokens": 5}, "at least 7 tokens .* more than the longest output has, 6"),
        ({"length_penalty": "x"}, "length_penalty must be a number, got 'x'"),
        ({"forced_eos_token_id": [1, 2]}, "forced_eos_token_id must be a whole number"),
    ],
)
def test_other_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=f"^generation_config.json: {message}") as raised:
        settings_of("bart", **changes)
    assert "\n" not in str(raised.value)


def test_what_changes_nothing_is_read():
    plain = {"temperature": 0.5, "top_k": 50, "repetition_penalty": 1.0, "do_sample": False, "bad_words_ids": None}
    assert settings_of("bart", **plain) == settings_of("bart")


def test_settings_that_do_not_fit_the_model_are_refused():
    model, *_ = from_pretrained_seq2seq(FIXTURES / "bart")
    for changes, message in (
        ({"max_new_tokens": 25}, "an output of 26 tokens needs 25 positions, but the model has 24"),
        ({"forced_bos_token_id": 40}, "forced_bos_token_id 40 is not a token of the model, which has 40"),
        ({"decoder_start_token_id": None, "bos_token_id": None}, "needs decoder_start_token_id or bos_token_id"),
    ):
        with pytest.raises(InputError, match=message):
            make_generate_step(model, settings_of("bart", **changes))


@pytest.mark.parametrize("kind", ["t5-1.1", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("t5", "bart"))])
def test_bfloat16_finds_mostly_the_same(kind):
    """Beams of 64 random sources: over 90 % of the tokens, and scores that are finite and differ by less than 0.2."""
    random = np.random.default_rng(0)
    mask = np.arange(9) < random.integers(3, 10, (64, 1))
    batch = {"input_ids": random.integers(4, 40, (64, 9)), "attention_mask": mask.astype(np.int32)}
    found = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model, params, _ = from_pretrained_seq2seq(FIXTURES / kind, dtype=dtype)
        step = make_generate_step(model, settings_of(kind, max_new_tokens=8, num_beams=3))
        found.append(jax.device_get(quick_jit(step)(params, batch)))
    exact, rounded = found
    assert np.mean(exact.sequences[:, 0] == rounded.sequences[:, 0]) > 0.9
    assert not np.array_equal(exact.scores, rounded.scores)
    np.testing.assert_allclose(rounded.scores, exact.scores, rtol=0, atol=0.2)
