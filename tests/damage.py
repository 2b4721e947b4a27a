"""Random damages of a checkpoint's files, as disks, copies and hands make them."""

import pathlib
import random


def _flip(rng, data, other):
    position = rng.randrange(len(data))
    return data[:position] + bytes([data[position] ^ (1 << rng.randrange(8))]) + data[position + 1 :]


def _truncate(rng, data, other):
    return data[: rng.randrange(len(data))]


def _delete(rng, data, other):
    return None


def _swap(rng, data, other):
    return other


def _zero(rng, data, other):
    start = rng.randrange(len(data))
    length = rng.randint(1, len(data) - start)
    return data[:start] + bytes(length) + data[start + length :]


def _append(rng, data, other):
    return data + rng.randbytes(rng.randint(1, 4096))


def _garbage(rng, data, other):
    return rng.randbytes(len(data))


KINDS = (_flip, _flip, _truncate, _delete, _swap, _zero, _append, _garbage)


def at_random(rng: random.Random, folder: pathlib.Path, others: pathlib.Path) -> str:
    """Damages one file of a checkpoint and says which and how.

    Args:
      rng: what draws.
      folder: the checkpoint.
      others: where a file that takes the place of another one may come from, for instance all checkpoints.
    """
    path = rng.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])
    kind = rng.choice(KINDS)
    donors = [other for other in sorted(others.rglob("*")) if other.is_file()]
    alike = [other for other in donors if other.name == path.name and other != path]
    donor = rng.choice(alike or donors)  # that of another step, where there is one
    data = kind(rng, path.read_bytes(), donor.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    return f"{kind.__name__.strip('_')} {path}"
