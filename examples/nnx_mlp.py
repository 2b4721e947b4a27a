"""PATS with Flax NNX: a small network reads handwritten digits, trained through ``nnx.Optimizer``.

Run it with ``python examples/nnx_mlp.py``; it takes about ten seconds.
"""

import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import pats_jax
from pats_jax.training.concentration import concentration


class Network(nnx.Module):
    """(batch, 64) pixels to (batch, 10) logits."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.hidden(x))))


def main() -> float:
    digits = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        digits.data.astype(np.float32) / 16, digits.target, test_size=0.25, random_state=0, stratify=digits.target
    )
    model = Network(nnx.Rngs(params=0, dropout=pats_jax.random.fast_key(1)))
    tx = pats_jax.pats(optax.adamw(3e-3), noise_scale=1e-3, key=0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    order = np.random.default_rng(0)
    for _ in range(300):
        rows = order.choice(len(train_x), 64, replace=False)
        step(model, optimizer, train_x[rows], train_y[rows])

    model.eval()
    accuracy = float(np.mean(np.argmax(model(test_x), axis=-1) == test_y))
    print(f"accuracy {accuracy:.1%} on {len(test_y)} unseen digits")
    # nnx.Optimizer keeps every array of the Optax state in a Variable; as_pure gives the arrays back.
    sensitivity = pats_jax.sensitivity(nnx.as_pure(optimizer.opt_state))
    for name in ("hidden", "out"):
        share = concentration(sensitivity[name]["kernel"])["top_10_percent_share"]
        print(f"{name}: the most sensitive tenth of the weights holds {share:.0%} of sensitivity")
    return accuracy


if __name__ == "__main__":
    main()
