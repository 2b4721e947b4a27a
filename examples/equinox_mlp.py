"""PATS with Equinox: a small network tells malignant from benign tumours (the Wisconsin breast cancer data).

Run it with ``python examples/equinox_mlp.py``; it takes about ten seconds.
"""

import equinox as eqx
import jax
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import pats_jax
from pats_jax.training.concentration import concentration


def main() -> float:
    data = load_breast_cancer()
    train_x, test_x, train_y, test_y = train_test_split(
        data.data, data.target, test_size=0.25, random_state=0, stratify=data.target
    )
    scaler = StandardScaler().fit(train_x)
    train_x, test_x = (scaler.transform(x).astype(np.float32) for x in (train_x, test_x))

    model = eqx.nn.MLP(in_size=30, out_size=2, width_size=32, depth=2, key=jax.random.key(0))
    # Activation functions are leaves of an Equinox model too; the optimizer gets the arrays, and None elsewhere.
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = pats_jax.pats(optax.adamw(3e-3), noise_scale=1e-3, key=0)
    opt_state = tx.init(params)

    def logits(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    @jax.jit
    def step(params, opt_state, x, y):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return eqx.apply_updates(params, updates), opt_state

    order = np.random.default_rng(0)
    for _ in range(200):
        rows = order.choice(len(train_x), 32, replace=False)
        params, opt_state = step(params, opt_state, train_x[rows], train_y[rows])

    accuracy = float(np.mean(np.argmax(logits(params, test_x), axis=-1) == test_y))
    print(f"accuracy {accuracy:.1%} on {len(test_y)} unseen patients")
    for number, layer in enumerate(pats_jax.sensitivity(opt_state).layers):
        share = concentration(layer.weight)["top_10_percent_share"]
        print(f"layer {number}: the most sensitive tenth of the weights holds {share:.0%} of sensitivity")
    return accuracy


if __name__ == "__main__":
    main()
