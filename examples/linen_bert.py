"""PATS with Flax Linen: a tiny BERT, from scratch, reads handwritten digits as sentences of eight words.

A word is one row of an 8 by 8 image, each pixel black or white: 256 words in all. Run it with
``python examples/linen_bert.py``; it takes about twenty seconds, most of
them compilation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import pats_jax
from pats_jax.models import EncoderConfig, SequenceClassifier
from pats_jax.models.config import default_labels
from pats_jax.training.concentration import concentration

CONFIG = EncoderConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=8,
    initializer_range=0.1,  # so small a model learns faster from larger weights than BERT's 0.02
    id2label=default_labels(10),
)
EPOCHS, BATCH_SIZE = 10, 64


def main() -> float:
    digits = load_digits()
    words = np.packbits(digits.images >= 8, axis=-1)[..., 0].astype(np.int32)
    train_x, test_x, train_y, test_y = train_test_split(
        words, digits.target, test_size=0.25, random_state=0, stratify=digits.target
    )
    model = SequenceClassifier(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0), train_x[:1])["params"]
    steps = EPOCHS * (len(train_x) // BATCH_SIZE)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps)
    tx = pats_jax.pats(optax.adamw(schedule), noise_scale=1e-3, key=0)
    opt_state = tx.init(params)

    def loss(params, x, y, key):
        logits = model.apply({"params": params}, x, deterministic=False, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, opt_state, x, y, key):
        grads = jax.grad(loss)(params, x, y, key)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    order, dropout_key = np.random.default_rng(0), pats_jax.random.fast_key(1)
    for number in range(steps):
        rows = order.choice(len(train_x), BATCH_SIZE, replace=False)
        step_key = jax.random.fold_in(dropout_key, number)
        params, opt_state = step(params, opt_state, train_x[rows], train_y[rows], step_key)

    predictions = jnp.argmax(jax.jit(model.apply)({"params": params}, test_x), axis=-1)
    accuracy = float(np.mean(predictions == test_y))
    print(f"accuracy {accuracy:.1%} on {len(test_y)} unseen digits")
    for name, layer in pats_jax.sensitivity(opt_state)["bert"]["encoder"]["layer"].items():
        figures = concentration(layer["attention"]["self"]["query"]["kernel"])
        print(
            f"layer {name}, query: the most sensitive tenth holds {figures['top_10_percent_share']:.0%} of sensitivity"
        )
    return accuracy


if __name__ == "__main__":
    main()
