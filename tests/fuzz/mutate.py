"""Damages: of bytes, of lines and cells, and of the values of JSON."""

import json
import random
from collections.abc import Mapping
from typing import Any

from .inputs import SPECIAL

# What has no business in a file, or seldom: each of these has broken a program.
ODD_BYTES = [
    *(
        token.encode()
        for token in ("NaN", "null", "1e999", "-", "\t", ",", '"', "\r", "\n", "\r\n", "\n\n", "\\", "\0")
    ),
    *(char.encode() for char in ("\x85", "\u2028", "\u2029", "\f", "\v", "\x1c", "\ufeff", "\u202e", "\u0663", "😀")),
    b"9" * 5000,
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"\\ud800",
    b"\xed\xa0\x80",  # a lone surrogate in what would be UTF-8
    b"\xff",
    b"\xc3",
    b"x" * 140_000,
    b"../../x",
]

# The same in the place of a value of JSON.
ODD_JSON = [
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "null",
        "true",
        "false",
        "0",
        "-1",
        "1",
        "1.5",
        "-0.0",
        "1e999",
        "1e308",
        "1e-320",
    ),
    *("2147483648", "9223372036854775808", "12345678901234567890", "1e7", "10000000", "[]", "{}", "[null]", "[[]]"),
    *('{"a": 1}', '[1, "a"]', '""', '"x"', '"0"', '"NaN"', '" "', '"../../x"', '"/etc/passwd"', '"~nosuchuser"'),
    *(
        '"\\u0000"',
        '"\\ud800"',
        '"a\\nb"',
        '"\\u2028"',
        '"-"',
        '"$\\\\frac{$"',
        '"<b>"',
        '"|"',
        '"\\u202e"',
        '"(a+)+$"',
    ),
    "9" * 5000,
    "-" + "1" * 4301,
    "[" * 100_000 + "]" * 100_000,
    '"' + "x" * 100_000 + '"',
    "[" + ",".join("0" * 1000) + "]",
]


def damage_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """A file with one to three damages, and what they are."""
    told = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(tuple(_DAMAGES))
        data = _DAMAGES[name](rng, data)
        told.append(name)
    return data, ", ".join(told)


def _flip_bits(rng, data):
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 8))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _insert(rng, data):
    place = rng.randint(0, len(data))
    return data[:place] + rng.choice(ODD_BYTES) + data[place:]


def _overwrite(rng, data):
    place, odd = rng.randint(0, len(data)), rng.choice(ODD_BYTES)
    return data[:place] + odd + data[place + len(odd) :]


def _delete(rng, data):
    place = rng.randint(0, len(data))
    return data[:place] + data[place + rng.choice((1, 1, 2, 7, 100)) :]


def _repeat(rng, data):
    begin, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
    return data[:end] + data[begin:]


def _zero(rng, data):
    place, length = rng.randint(0, len(data)), rng.choice((1, 4, 64))
    return data[:place] + bytes(len(data[place : place + length])) + data[place + length :]


def _lines(rng, data):
    lines = data.split(b"\n")
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            del lines[one]
        case 1:
            lines.insert(other, lines[one])
        case 2:
            lines[one], lines[other] = lines[other], lines[one]
        case 3:
            lines.insert(one, rng.choice((b"", b" ", b"\r", b"{}", b"null", b"[]", b"\t", b",")))
    return b"\n".join(lines)


def _cells(rng, data):
    """Two cells of a line change places, one is emptied, or one is written twice."""
    separator = b"\t" if b"\t" in data else b","
    lines = data.split(b"\n")
    number = rng.randrange(len(lines))
    cells = lines[number].split(separator)
    one, other = rng.randrange(len(cells)), rng.randrange(len(cells))
    match rng.randrange(3):
        case 0:
            cells[one], cells[other] = cells[other], cells[one]
        case 1:
            cells[one] = rng.choice((b"", *ODD_BYTES))
        case 2:
            cells[one] = cells[other]
    lines[number] = separator.join(cells)
    return b"\n".join(lines)


def _recode(rng, data):
    text = data.decode("utf-8", "replace")
    return rng.choice(
        (
            lambda: text.encode("utf-16"),
            lambda: text.encode("latin-1", "replace"),
            lambda: b"\xef\xbb\xbf" + data,
            lambda: data.replace(b"\n", b"\r\n"),
            lambda: data.replace(b"\n", b"\r"),
            lambda: text.encode("utf-7"),
        )
    )()


_DAMAGES = {
    "flipped bits": _flip_bits,
    "cut off": lambda rng, data: data[: rng.randint(0, len(data))],
    "odd bytes put in": _insert,
    "odd bytes written over": _overwrite,
    "bytes deleted": _delete,
    "a part twice": _repeat,
    "zeros": _zero,
    "lines moved": _lines,
    "cells moved": _cells,
    "another encoding": _recode,
    "emptied": lambda rng, data: rng.choice((b"", b"\n", b" ", b"\xef\xbb\xbf", b"null", b"{}", b"[]", b"0")),
}


def damage_json(rng: random.Random, value: Any) -> tuple[bytes, str]:
    """The text of a JSON value with one to three of its parts replaced, removed, renamed or doubled."""
    value = json.loads(json.dumps(value))  # a copy
    raw: list[str] = []
    told = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            break
        holder, key = rng.choice(places)
        action = rng.choice(("replace", "replace", "replace", "remove", "rename", "double", "exchange"))
        match action:
            case "replace":
                raw.append(rng.choice(ODD_JSON))
                holder[key] = f"@@{len(raw) - 1}@@"
            case "remove":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[rng.choice((key.upper(), f"{key} ", "", "\0", "x" * 300, f"../{key}", "-1"))] = holder.pop(key)
            case "double" if isinstance(holder, list):
                holder.insert(key, holder[key])
            case "exchange":
                other, its_key = rng.choice(places)
                if _holds(other, its_key) and _holds(holder, key):
                    holder[key] = json.loads(json.dumps(other[its_key]))
        told.append(f"{action} {key!r}"[:40] + (f" by {raw[-1][:20]}" if action == "replace" else ""))
    text = json.dumps(value, indent=rng.choice((None, 1)))
    for number, token in enumerate(raw):
        text = text.replace(f'"@@{number}@@"', token)
    return text.encode(), ", ".join(told)


def _places(value):
    """The holder and key of everything inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def _holds(holder, key):
    return key in holder if isinstance(holder, dict) else key < len(holder)


def damage_one(
    rng: random.Random, files: Mapping[str, bytes], *, special: float = 0.02
) -> tuple[dict[str, bytes | str], str]:
    """Files of which one is damaged: JSON in its values or its bytes, others in their bytes; or it is no file at all.

    Args:
      rng: decides.
      files: path -> bytes.
      special: how often the file is replaced by a pipe, a folder, a link to itself, or nothing.
    """
    name = rng.choice(sorted(files))
    if rng.random() < special:
        content = rng.choice(SPECIAL)
        return {**files, name: content}, f"{name}: {content}"
    data, told = None, ""
    if name.endswith(".json") and rng.random() < 0.7:
        try:
            data, told = damage_json(rng, json.loads(files[name]))
        except ValueError:
            pass
    elif name.endswith(".jsonl") and rng.random() < 0.5:
        data, told = _damage_json_line(rng, files[name])
    if data is None:
        data, told = damage_bytes(rng, files[name])
    return {**files, name: data}, f"{name}: {told}"


def _damage_json_line(rng, data):
    lines = data.split(b"\n")
    number = rng.randrange(len(lines))
    try:
        lines[number], told = damage_json(rng, json.loads(lines[number]))
    except ValueError:
        return None, ""
    lines[number] = lines[number].replace(b"\n", b" ")
    return b"\n".join(lines), told
