"""Concentration against closed forms and SciPy; sensitivity against a gradient worked out by hand."""

import numpy as np
import pytest
import scipy.stats

from pats_jax import train_state
from pats_jax.training import concentration


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_equal_values_are_not_concentrated(count):
    figures = concentration.concentration(np.full(count, 0.3))
    assert figures["gini"] == pytest.approx(0, abs=1e-9)
    assert figures["entropy"] == pytest.approx(1)
    assert figures["top_10_percent_share"] == pytest.approx(np.ceil(count / 10) / count)


@pytest.mark.parametrize("count", [2, 7, 1000])
def test_one_value_that_holds_everything(count):
    values = np.zeros(count)
    values[count // 2] = 5.0
    figures = concentration.concentration(values)
    assert figures["gini"] == pytest.approx((count - 1) / count)
    assert figures["entropy"] == pytest.approx(0, abs=1e-12)
    assert figures["top_10_percent_share"] == pytest.approx(1)


def test_a_ramp_has_the_gini_coefficient_of_the_closed_form():
    figures = concentration.concentration(np.random.default_rng(0).permutation(np.arange(1, 101)))
    assert figures["gini"] == pytest.approx(99 / 300)  # (n-1)/(3n)
    assert figures["top_10_percent_share"] == pytest.approx(sum(range(91, 101)) / 5050)


def test_any_values_against_the_definitions():
    values = np.random.default_rng(1).exponential(size=213) ** 2
    figures = concentration.concentration(values.astype(np.float32).reshape(3, 71))
    difference = np.abs(values[:, None] - values[None, :]).mean()
    assert figures["gini"] == pytest.approx(difference / (2 * values.mean()), rel=1e-6)
    assert figures["entropy"] == pytest.approx(scipy.stats.entropy(values, base=len(values)), rel=1e-6)
    assert figures["top_10_percent_share"] == pytest.approx(np.sort(values)[-22:].sum() / values.sum(), rel=1e-6)


def test_many_values():
    """The Gini coefficient is twice the area between the Lorenz curve and the diagonal."""
    values = np.float32(np.exp(np.random.default_rng(4).normal(-14, 2, size=150_001)))
    values[:70_000] = 0
    figures, exact = concentration.concentration(values), np.sort(values.astype(np.float64))
    lorenz = np.append(0, np.cumsum(exact)) / exact.sum()
    assert figures["gini"] == pytest.approx(1 - 2 * np.trapezoid(lorenz, dx=1 / exact.size), rel=1e-9)
    assert figures["entropy"] == pytest.approx(scipy.stats.entropy(exact, base=exact.size), rel=1e-9)
    assert figures["top_10_percent_share"] == pytest.approx(1 - lorenz[-15_002], rel=1e-9)


def test_zeros_count_as_equal():
    assert concentration.concentration(np.zeros(20)) == concentration.concentration(np.ones(20))


def test_tensors_and_all_of_them_together():
    tensors = {"a": np.array([1.0, 2.0]), "b": np.array([5.0, 0.0, 1.0])}
    figures = concentration.by_tensor(tensors)
    assert figures.keys() == {"all", "a", "b"}
    assert figures["b"] == concentration.concentration(tensors["b"])
    assert figures["all"] == concentration.concentration(np.array([1.0, 2.0, 5.0, 0.0, 1.0]))


def test_shares_by_power_of_ten():
    values = 10 ** np.random.default_rng(3).normal(-6, 1, size=1000)
    values[:100] = 0
    values[100:150] = 1e-30  # below all bins: in the first one
    shares = concentration.log10_histogram(np.sort(values.astype(np.float32)))
    edges = np.array(concentration.HISTOGRAM_EDGES)
    assert len(shares) == len(edges) - 1 and sum(shares) == pytest.approx(0.9) and shares[0] == 0.05
    for low, high, share in zip(edges[1:-1], edges[2:], shares[1:], strict=True):
        assert share == np.mean((values >= 10**low) & (values < 10**high))


def test_selected_tensors_by_name():
    tree = {"layer": {"0": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}, "empty": np.ones((0, 3))}
    mask = {"layer": {"0": {"kernel": True, "bias": False}}, "empty": True}
    ((name, values),) = concentration.selected(tree, mask).items()
    assert name == "layer.0.kernel" and values.shape == (6,)


def test_sensitivity_is_the_mean_of_parameter_times_gradient():
    rng = np.random.default_rng(2)
    kernel, bias = rng.normal(size=(5, 3)), rng.normal(size=3)
    inputs, labels = rng.normal(size=(2, 8, 5)), rng.integers(3, size=(2, 8))

    def apply(variables, input_ids, deterministic, rngs):
        assert deterministic and rngs is None
        return input_ids @ variables["params"]["kernel"] + variables["params"]["bias"]

    params = {"kernel": np.float32(kernel), "bias": np.float32(bias)}
    batches = [{"input_ids": np.float32(x), "labels": np.int32(y)} for x, y in zip(inputs, labels, strict=True)]
    measured = concentration.measure_sensitivity(train_state.make_loss_fn(apply, deterministic=True), params, batches)

    expected = {"kernel": np.zeros((5, 3)), "bias": np.zeros(3)}
    for x, y in zip(inputs, labels, strict=True):
        logits = x @ kernel + bias
        error = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(3)[y]) / len(y)
        expected["kernel"] += np.abs(kernel * (x.T @ error)) / 2
        expected["bias"] += np.abs(bias * error.sum(0)) / 2
    for name, value in expected.items():
        np.testing.assert_allclose(measured[name], value, rtol=1e-5, atol=1e-7)
