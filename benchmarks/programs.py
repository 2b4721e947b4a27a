"""What a compiled program does: kernels, operations, bytes and memory as XLA says, and a profile of its kernels."""

import collections
import gzip
import json
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any

import jax

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$")
_CALLED = re.compile(r"(?:to_apply|body|calls)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")

# Instructions that start no kernel.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id opt-barrier".split()
)


def describe_program(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Kernels by kind, operations, bytes accessed and bytes of temporaries, as XLA counts them.

    Operations and bytes count a loop's body once; kernels count it as often as it runs.
    """
    cost: Any = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    kernels = count_kernels(compiled.as_text() or "")
    return {
        "kernels": sum(kernels.values()),
        "kernels_by_kind": dict(kernels.most_common()),
        "flops": cost.get("flops"),
        "bytes_accessed": cost.get("bytes accessed"),
        "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
    }


def compile_timed(function: Any, arguments: Any) -> dict[str, Any]:
    """Compiles a jitted function, whose calls then run this program: seconds, and what `describe_program` says."""
    times = [time.perf_counter()]
    traced = function.trace(*arguments)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    names = ("trace_seconds", "lower_seconds", "compile_seconds")
    seconds = {name: end - begin for name, begin, end in zip(names, times[:-1], times[1:], strict=True)}
    return seconds | describe_program(compiled)


def count_kernels(hlo: str) -> collections.Counter[str]:
    """Kernels that one run of an optimised program starts, by kind.

    A loop's body counts once for each of its turns, where XLA knows their number; of a branch, the computation with the
    most kernels counts.

    Args:
      hlo: the text of a compiled program.
    """
    bodies: dict[str, list[str]] = {}
    entry, current = None, ""
    for line in hlo.splitlines():
        if found := _COMPUTATION.match(line):
            current = found[2]
            bodies[current] = []
            entry = current if found[1] else entry
        elif found := _INSTRUCTION.match(line):
            bodies.setdefault(current, []).append(found[1])
    return _count(bodies, entry) if entry else collections.Counter()


def _count(bodies: dict[str, list[str]], name: str) -> collections.Counter[str]:
    kernels: collections.Counter[str] = collections.Counter()
    for instruction in bodies.get(name, ()):
        opcode = _opcode(instruction)
        called = _CALLED.search(instruction)
        if opcode == "while":
            trips = _TRIPS.search(instruction)
            body = _count(bodies, re.search(r"body=%?([\w.\-]+)", instruction)[1])  # type: ignore[index]
            kernels.update({kind: count * int(trips[1] if trips else 1) for kind, count in body.items()})
        elif opcode == "conditional":
            names = [
                part.strip().lstrip("%")
                for many, one in _BRANCHES.findall(instruction)
                for part in (many or one).split(",")
            ]
            kernels.update(max((_count(bodies, branch) for branch in names), key=lambda c: sum(c.values())))
        elif opcode == "call" and called:
            kernels.update(_count(bodies, called[1]))
        elif opcode == "fusion":
            kind = re.search(r"kind=k(\w+)", instruction)
            kernels[f"fusion {kind[1].lower() if kind else ''}".strip()] += 1
        elif opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]+)"', instruction)
            kernels[f"custom-call {target[1] if target else ''}".strip()] += 1
        elif opcode not in _FREE and not opcode.endswith("-done"):
            kernels[opcode] += 1
    return kernels


def _opcode(instruction: str) -> str:
    """The opcode of ``shape opcode(operands), attributes``; a tuple's shape is in parentheses."""
    shape_end = 0
    if instruction.startswith("("):
        depth = 0
        for character in instruction:
            shape_end += 1
            depth += (character == "(") - (character == ")")
            if depth == 0:
                break
    found = re.search(r" ([\w\-]+)\(", instruction[shape_end:])
    return found[1] if found else "unknown"


def summarize_profile(folder: pathlib.Path, steps: int, most: int = 25) -> dict[str, Any]:
    """Device time by kernel, from the trace that `jax.profiler.start_trace` left in a folder.

    Args:
      folder: the trace's.
      steps: steps that were profiled.
      most: how many kernels are listed, those that take longest first.

    Returns:
      Milliseconds a step that the device was busy, that passed from the first kernel to the end of the last, and of
      each kernel, with the number of its runs a step.
    """
    events = list(_device_events(folder))
    if not events:
        return {"error": "the trace holds no kernel"}
    totals: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for event in events:
        totals[event["name"]][0] += 1
        totals[event["name"]][1] += event["dur"]
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events)
    busy, end = 0.0, spans[0][0]
    for begin, stop in spans:
        busy += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    ranked = sorted(totals.items(), key=lambda item: -item[1][1])
    scale = 1e-3 / steps  # the trace is in microseconds
    return {
        "busy_ms": busy * scale,
        "wall_ms": (end - spans[0][0]) * scale,
        "kernel_runs": len(events) / steps,
        "distinct_kernels": len(totals),
        "top": [
            {"name": name[:120], "runs": count / steps, "ms": duration * scale}
            for name, (count, duration) in ranked[:most]
        ],
    }


def _device_events(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Complete events of the accelerator's streams; on a machine without one, of XLA's threads on the CPU."""
    files = sorted(folder.glob("plugins/profile/*/*.trace.json.gz"))
    events = [event for file in files for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]]
    named = {"process_name": {}, "thread_name": {}}  # type: dict[str, dict[Any, str]]
    for event in events:
        if event.get("ph") == "M" and event["name"] in named:
            place = event["pid"] if event["name"] == "process_name" else (event["pid"], event["tid"])
            named[event["name"]][place] = event["args"]["name"]
    devices = {pid for pid, name in named["process_name"].items() if "/device:" in name and "CPU" not in name}

    def chosen(event):
        thread = named["thread_name"].get((event["pid"], event["tid"]), "")
        if devices:
            return event["pid"] in devices and thread.startswith("Stream")
        return thread.startswith("tf_XLA") and not event["name"].startswith(("Thunk", "end:"))

    return (event for event in events if event.get("ph") == "X" and chosen(event))
