"""How many lengths are compiled: as many as save more padding than their compilation costs."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
import tiny

from pats_jax import glue
from pats_jax.data.batches import bucket_boundaries
from pats_jax.training import shape_costs
from pats_jax.training.shape_costs import RATES, shape_cost

LENGTHS = np.clip(np.random.default_rng(0).lognormal(np.log(11), 0.4, 500).round().astype(int), 4, 47)
PARAMS = {
    "embeddings": {"word_embeddings": {"embedding": jax.ShapeDtypeStruct((30_000, 64), np.float32)}},
    "layer": {
        "kernel": jax.ShapeDtypeStruct((64, 1000), np.float32),
        "bias": jax.ShapeDtypeStruct((1000,), np.float32),
    },
}


@pytest.mark.parametrize("cost", [0.0, 30.0, 300.0, 3000.0, 1e9])
def test_boundaries_are_the_cheapest_of_all_choices(cost):
    lengths = np.random.default_rng(3).integers(3, 13, 200)
    longest = int(lengths.max())

    def total(boundaries):
        return sum(min(b for b in boundaries if b >= length) for length in lengths) + cost * len(boundaries)

    choices = [[*choice, longest] for most in range(4) for choice in itertools.combinations(range(3, longest), most)]
    found = bucket_boundaries(lengths, 4, shape_cost=cost)
    assert total(found) == pytest.approx(min(map(total, choices)))
    assert found[-1] == longest


def test_the_dearer_a_shape_the_fewer_there_are():
    counts = [len(bucket_boundaries(LENGTHS, 7, shape_cost=cost)) for cost in (0, 50, 500, 5000, 50_000)]
    assert counts == sorted(counts, reverse=True) and counts[0] == 7 and counts[-1] == 1


def test_a_negative_cost_is_refused():
    with pytest.raises(ValueError, match="shape_cost"):
        bucket_boundaries(LENGTHS, 7, shape_cost=-1.0)


@pytest.mark.parametrize("platform", RATES)
def test_the_cost_worked_out_by_hand(platform):
    """Three tensors are compiled; a token meets 65,000 of the entries, with 6 operations each in training."""
    rates = RATES[platform]
    seconds = rates.fixed + 3 * rates.per_tensor
    a_token = 6 * 65_000 / rates.flops_per_second
    assert shape_cost(PARAMS, platform, 2.5, training=True) == pytest.approx(seconds / a_token / 2.5)
    predict = shape_cost(PARAMS, platform, 1, training=False)
    assert predict == pytest.approx(seconds / 8 / (a_token / 3))


def test_an_unknown_platform_is_an_accelerator():
    assert shape_cost(PARAMS, "metal", 1, training=True) == shape_cost(PARAMS, "gpu", 1, training=True)


@pytest.mark.parametrize("platform, rows, expected", [("gpu", 3668, 1), ("tpu", 3668, 1), ("cpu", 400, 1)])
def test_small_tasks_of_a_small_model_have_one_shape(platform, rows, expected):
    """MiniLM's 105 tensors, 10.8 million parameters in the encoder."""
    kernels = [jax.ShapeDtypeStruct((100_000,), np.float32)] * 104 + [jax.ShapeDtypeStruct((395_394,), np.float32)]
    lengths = np.random.default_rng(1).choice(LENGTHS, rows)
    cost = shape_cost(kernels, platform, 3 if rows > 400 else 1, training=True)
    assert len(bucket_boundaries(lengths, shape_costs.MOST_BUCKETS, shape_cost=cost)) == expected
    many = shape_cost(kernels, platform, 3e4, training=True)
    assert len(bucket_boundaries(lengths, shape_costs.MOST_BUCKETS, shape_cost=many)) > 2


# the program


@pytest.fixture
def base(tmp_path):
    return tiny.quick_settings(tmp_path, length_buckets=None, max_steps=4, save_steps=2)


def chosen(folder):
    return json.loads((folder / "config.json").read_text())["length_buckets"]


@pytest.mark.slow
def test_a_run_keeps_the_number_that_it_chose_whatever_the_rates_are_when_it_is_resumed(base, tmp_path, monkeypatch):
    """Two lengths; one of them when compiling is dear, two when it is free."""
    run, plans = tmp_path / "run", []
    real = glue.make_training

    def training(*args):
        made = real(*args)
        plans.append([(rows.tolist(), length) for rows, length in made[1].plan])
        return made

    monkeypatch.setattr(glue, "make_training", training)
    settings = dataclasses.replace(base, output_dir=str(run))
    glue.run(settings)
    assert chosen(run) == 1
    monkeypatch.setitem(RATES, "cpu", shape_costs.Rates(0.0, 0.0, 1.0))
    (run / "results.json").unlink()  # as if it had been interrupted
    glue.run(dataclasses.replace(settings, resume=True))
    assert chosen(run) == 1 and plans[0] == plans[1]
    glue.run(dataclasses.replace(settings, output_dir=str(tmp_path / "another")))
    assert chosen(tmp_path / "another") == 2 and len({length for _, length in plans[2]}) == 2


def test_a_number_that_was_given_is_kept_though_the_data_have_fewer_lengths(base, tmp_path):
    settings = dataclasses.replace(base, output_dir=str(tmp_path / "run"), length_buckets=5)
    glue.run(settings)
    assert chosen(tmp_path / "run") == 5
    (tmp_path / "run" / "results.json").unlink()
    glue.run(dataclasses.replace(settings, resume=True))
