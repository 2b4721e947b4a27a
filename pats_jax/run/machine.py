"""What this machine is, and how fast it multiplies matrices.

JAX is asked in a process of its own: the one that starts runs leaves the devices to them.
"""

import dataclasses
import functools
import json
import os
import pathlib
import platform
import subprocess
import sys

_SECONDS_OF_A_PROBE = 60


@dataclasses.dataclass(frozen=True)
class Devices:
    """JAX's devices.

    Attributes:
      text: their number and kind, such as ``1 cpu``; ``unknown`` if JAX does not start.
      count: how many there are.
      platform: JAX's name for their kind: "cpu", "gpu" or "tpu".
      rates: dtype -> operations per second of a large matrix product on one device, measured for about 0.2 s.
    """

    text: str = "unknown"
    count: int = 0
    platform: str = "cpu"
    rates: dict[str, float] = dataclasses.field(default_factory=dict)

    def rate(self, dtype: str) -> float | None:
        """Operations per second of one device; float32's where the dtype was not measured, None if nothing was."""
        return self.rates.get(dtype, self.rates.get("float32"))


def describe_machine() -> dict[str, str]:
    """Describes the machine: system, processor, usable cores, and JAX's devices."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "devices of JAX": find_devices().text,
    }


@functools.cache
def find_devices() -> Devices:
    """The devices, and their rates; asked once."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # others may be using the memory
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _PROBE],
            capture_output=True,
            text=True,
            env=environment,
            timeout=_SECONDS_OF_A_PROBE,
        )
        return Devices(**json.loads(asked.stdout))
    except (subprocess.TimeoutExpired, ValueError):
        return Devices()


# Products are measured until 0.2 s have passed, the first one, which compiles, left out.
_PROBE = """
import json, time
import jax, jax.numpy as jnp
found = jax.local_devices()
platform, rates = found[0].platform, {}
size = 1024 if platform == "cpu" else 4096
multiply = jax.jit(lambda x: x @ x)
for dtype in ("float32",) if platform == "cpu" else ("float32", "bfloat16"):
    x = jnp.ones((size, size), dtype)
    multiply(x).block_until_ready()
    since, made = time.perf_counter(), 0
    while time.perf_counter() - since < 0.2:
        jax.block_until_ready([multiply(x) for _ in range(4)])
        made += 4
    rates[dtype] = 2.0 * size**3 * made / (time.perf_counter() - since)
text = f"{len(found)} {found[0].device_kind}"
print(json.dumps({"text": text, "count": len(found), "platform": platform, "rates": rates}))
"""


def _processor():
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
