"""The command line of the fuzzer."""

import argparse
import sys
import time
from pathlib import Path

from .campaign import ACCEPTED, FAILED, MODULE, REFUSED, Verdict, run
from .readers import READERS

_SECONDS_BETWEEN_LINES = 20


def main(args: list[str] | None = None) -> int:
    """Runs a campaign, prints what it found, and returns 1 if anything failed."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description="Give odd and damaged files to all readers.")
    parser.add_argument("--seed", type=int, default=1, help="of all inputs")
    parser.add_argument("--count", type=int, default=1000, help="inputs in all, shared out evenly to the readers")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS), metavar="READER")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="only these inputs of each reader")
    parser.add_argument("--seconds", type=float, default=20.0, help="that one input may take")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the files of inputs that fail")
    chosen = parser.parse_args(args)

    numbers = chosen.only or range(-(-chosen.count // len(chosen.readers)))
    report = Report(len(numbers) * len(chosen.readers))
    verdicts = run(
        chosen.readers,
        numbers,
        seed=chosen.seed,
        limit=chosen.seconds,
        processes=chosen.processes,
        keep=chosen.keep,
        module=MODULE,
        each=report.add,
    )
    print(table(chosen.readers, verdicts))
    for (reader, kind), alike in sorted(report.failures.items()):
        repeat = f"--seed {chosen.seed} --readers {reader} --only {min(alike)}"
        print(f"{len(alike)} x {reader}: {kind}; repeat: {repeat}")
    failed = sum(verdict.outcome == FAILED for verdict in verdicts)
    print(f"seed {chosen.seed}: {len(verdicts)} inputs, {failed} failed, {report.seconds():.0f} s")
    return 1 if failed else 0


class Report:
    """Prints a line now and then, and each failure that is not like three others before it."""

    def __init__(self, total: int):
        self.failures: dict[tuple[str, str], list[int]] = {}
        self._total, self._done, self._begin = total, 0, time.monotonic()
        self._said = self._begin

    def add(self, verdict: Verdict) -> None:
        self._done += 1
        if verdict.outcome == FAILED:
            alike = self.failures.setdefault((verdict.reader, verdict.kind), [])
            alike.append(verdict.number)
            if len(alike) <= 3:
                print(f"FAILED {verdict.reader} {verdict.number}: {verdict.kind}: {verdict.told}", flush=True)
        if time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            failed = sum(map(len, self.failures.values()))
            print(f"{self._done} of {self._total} inputs, {failed} failed, {self.seconds():.0f} s", flush=True)

    def seconds(self) -> float:
        return time.monotonic() - self._begin


def table(readers: list[str], verdicts: list[Verdict]) -> str:
    """A line a reader: inputs, what became of them, the seconds of the slowest and its number."""
    lines = [f"{'reader':12}{'inputs':>8}{ACCEPTED:>10}{REFUSED:>9}{FAILED:>8}{'slowest':>16}"]
    for name in readers:
        own = [verdict for verdict in verdicts if verdict.reader == name]
        counts = [sum(verdict.outcome == outcome for verdict in own) for outcome in (ACCEPTED, REFUSED, FAILED)]
        slowest = max(own, key=lambda verdict: verdict.seconds)
        shown = f"{slowest.seconds:.2f} s ({slowest.number})"
        lines.append(f"{name:12}{len(own):8}{counts[0]:10}{counts[1]:9}{counts[2]:8}{shown:>16}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
