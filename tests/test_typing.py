"""What a type checker sees of the public names: mypy passes right code, and finds the typing errors in wrong code."""

import ast
import pathlib
import subprocess
import sys

import pytest

import pats_jax

RIGHT = """
import jax, numpy as np, optax, pats_jax
from pats_jax import models, objectives
from pats_jax.models import peft

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
"""

# line -> the kind of error that mypy has for it
WRONG = {
    "pats_jax.pats(optax.adamw(1e-3), noise_scal=3, key=0)": "call-arg",
    'pats_jax.pats(optax.adamw(1e-3), key="x")': "arg-type",
    "pats_jax.pats(optax.adamw(1e-3))": "call-arg",
    "pats_jax.pats_noise(1e-3, key=None)": "arg-type",
    "pats_jax.dps_mix(0.5, 2)": "call-arg",
    "pats_jax.mixout(0.5)": "call-arg",
    'pats_jax.smart(alpha="x")': "arg-type",
    "pats_jax.no_such_name": "attr-defined",
    "pats_jax.TrainState.create(params={})": "call-arg",
    'models.from_pretrained("x", num_label=2)': "call-arg",
    'models.from_pretrained("x", num_labels="2")': "arg-type",
    "peft.LoraConfig(ranks=4)": "call-arg",
    "pats_jax.data.read_file(3)": "arg-type",
}


def mypy(path: pathlib.Path) -> list[str]:
    """The errors that mypy finds in a file by the project's own settings, a line each."""
    root = pathlib.Path(__file__).parent.parent  # where `make lint` leaves what mypy knows of JAX
    made = subprocess.run([sys.executable, "-m", "mypy", str(path)], cwd=root, capture_output=True, text=True)
    assert not made.stderr, made.stderr
    return [line for line in made.stdout.splitlines() if ": error: " in line]


def test_mypy_sees_the_public_names(tmp_path):
    right = RIGHT.strip().splitlines()
    path = tmp_path / "snippet.py"
    path.write_text("\n".join([*right, *WRONG]) + "\n")
    errors = {int(line.split(":")[1]): line for line in mypy(path)}
    assert sorted(errors) == list(range(len(right) + 1, len(right) + 1 + len(WRONG))), errors
    for line, kind in zip(sorted(errors), WRONG.values(), strict=True):
        assert errors[line].endswith(f"[{kind}]"), errors[line]


@pytest.mark.parametrize("room", ["", "data", "models", "models/peft", "objectives", "priming"])
def test_every_name_of_a_stub_is_there(room):
    folder = pathlib.Path(pats_jax.__file__).parent / room
    stub = ast.parse((folder / "__init__.pyi").read_text())
    names = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    package = __import__(".".join(["pats_jax", *filter(None, room.split("/"))]), fromlist=["__all__"])
    assert None not in names and names == set(package.__all__) <= set(dir(package))
    for name in names:
        assert getattr(package, name) is not None
