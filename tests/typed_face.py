"""What a type checker sees of the public names; `make lint` has mypy read it, and nobody runs it.

mypy passes the right calls, and finds in each wrong one the error that its comment names: a comment that silences
nothing is an error, too (``warn_unused_ignores``).
"""
# ruff: noqa: B018

import jax
import numpy as np
import optax

import pats_jax
from pats_jax import models, objectives
from pats_jax.models import peft

# right
tx = pats_jax.pats(optax.adamw(1e-3), noise_scale=3e-3, key=0, response="exponential", mask={"w": True})
tx = pats_jax.pats(optax.adamw(1e-3), lambda count: 0.1 * count, key=np.int64(3))
tx = pats_jax.with_raw_gradient(optax.chain(optax.sgd(0.1), pats_jax.pats_noise(1e-3, key=jax.random.key(0))))
model, params, config = models.from_pretrained("folder", num_labels=2)
state = pats_jax.TrainState.create(apply_fn=model.apply, params=params, tx=tx, key=0)
step = jax.jit(pats_jax.make_train_step(pats_jax.make_loss_fn(model.apply)))
labels: dict[str, int] = config.label2id
tuned, params = peft.add_peft(model, params, peft.LoraConfig(rank=4), key=0)
loss_fn = pats_jax.with_objectives(model.apply, pats_jax.r3f(lam=0.5), objectives.lnsr(2))
rows: int = len(pats_jax.data.read_file("train.csv"))
key: jax.Array = pats_jax.random.fast_key(0)

# wrong
pats_jax.pats(optax.adamw(1e-3), noise_scal=3, key=0)  # type: ignore[call-arg]
pats_jax.pats(optax.adamw(1e-3), key="x")  # type: ignore[arg-type]
pats_jax.pats(optax.adamw(1e-3))  # type: ignore[call-arg]
pats_jax.pats_noise(1e-3, key=None)  # type: ignore[arg-type]
pats_jax.dps_mix(0.5, 2)  # type: ignore[call-arg]
pats_jax.mixout(0.5)  # type: ignore[call-arg]
pats_jax.smart(alpha="x")  # type: ignore[arg-type]
pats_jax.no_such_name  # type: ignore[attr-defined]
pats_jax.TrainState.create(params={})  # type: ignore[call-arg]
models.from_pretrained("x", num_label=2)  # type: ignore[call-arg]
models.from_pretrained("x", num_labels="2")  # type: ignore[arg-type]
peft.LoraConfig(ranks=4)  # type: ignore[call-arg]
pats_jax.data.read_file(3)  # type: ignore[arg-type]
