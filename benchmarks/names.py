"""Names in stored results, which are read on other machines: of devices, and of files in commands."""

import pathlib
import re

_MAKERS = frozenset("nvidia tesla geforce quadro amd instinct".split())


def device_folder(kind: str) -> str:
    """A short name of what JAX calls a device.

    Examples:
      >>> [device_folder(kind) for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090", "TPU v5 lite", "cpu")]
      ['h100', 'rtx4090', 'v5e', 'cpu']
    """
    kind = kind.lower()
    if tpu := re.match(r"tpu ?v?(\d+)( lite|[a-z])?", kind):
        version, variant = tpu.groups()
        variant = {" lite": "e", None: "p" if version == "5" else ""}.get(variant, variant)
        return f"v{version}{variant}"
    words = [word for word in re.split(r"[^a-z0-9]+", kind) if word and word not in _MAKERS]
    end = next((number for number, word in enumerate(words) if re.search(r"\d", word)), 0)
    return "".join(words[: end + 1]) or "unknown"


def without_folders(argument: str) -> str:
    """An absolute path's last part, for what is stored is read on other machines; anything else as it is."""
    path = pathlib.Path(argument)
    return path.name if path.is_absolute() else argument
