"""What does it cost to send requests one by one? Output tok/s of the async engine against the offline one on a batch.

Both answer an exam's first requests all at once, cut to so few tokens that a pass takes a second or two. Each engine lives in a process of
its own for the whole bench (two in one process share counters) and works when it is told to, in turn with the other; the
one whose turn it is not is seen to leave the processor alone. Exits with 1 if the bar of `pairs` is missed. About ten minutes on two cores.

    python tests/bench/async_overhead.py [--run sharegpt-smollm2] [--pairs 10] [--requests 8] [--tokens 48]
"""
import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pairs
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))
from workbook import engines, exams, load, metrics, models, progress, subjects, tokens  # noqa: E402

IDLE = 0.02
"""The most of one core that an engine may use while the other works, on average."""
SETTLE_S = 0.5
"""Seconds after a pass in which its engine goes to sleep: OpenMP's threads spin for a while when work has ended."""


class Engine:
    """An engine in a process of its own."""

    def __init__(self, name: str, run: str, count: int, length: int):
        context = multiprocessing.get_context("spawn")
        self.name, self.idle_s, self.idle_cpu_s = name, 0.0, 0.0
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(name, run, count, length, theirs))
        self._process.start()
        theirs.close()
        self._pipe.recv()  # it has started

    def passed(self, other: "Engine") -> float:
        """Run the batch while the other is idle; returns output tok/s."""
        time.sleep(SETTLE_S)
        began, before = time.monotonic(), other.cpu_seconds()
        self._pipe.send(True)
        found = self._pipe.recv()
        other.idle_cpu_s += other.cpu_seconds() - before
        other.idle_s += time.monotonic() - began
        return found

    @property
    def idle(self) -> float:
        """Share of a core that it used while the other worked, over all of the other's passes."""
        return self.idle_cpu_s / self.idle_s

    def cpu_seconds(self) -> float:
        """User and system time of all its processes so far."""
        own = psutil.Process(self._process.pid)
        return sum(sum(p.cpu_times()[:2]) for p in [own, *own.children(recursive=True)])

    def close(self) -> None:
        """Stop it, if it is still there."""
        with contextlib.suppress(OSError):
            self._pipe.send(False)
        self._process.join()


def serve(name: str, run: str, count: int, length: int, pipe) -> None:
    """In the engine's process: a pass for each True that comes, and its output tok/s back."""
    os.environ[progress.TERMINAL] = ""  # no bar
    exam = exams.load(run, exams.parse_set(f"engine={name} load=batch"))
    model = models.resolve(exam)
    batch = [replace(r, max_tokens=length) for r in load.requests(exam, subjects.questions(exam, tokens.Tokenizer(model)))[:count]]
    engine = engines.start(exam, model, Path(tempfile.mkdtemp()) / "engine.log")
    pipe.send(True)
    while pipe.recv():
        pipe.send(metrics.of_repetition(load.requests_frame(load.measure(engine, exam, batch, 1)))["output_tok_s"])
    engine.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="sharegpt-smollm2")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()

    started = []
    try:
        started += [Engine("async", args.run, args.requests, args.tokens)]
        started += [Engine("offline", args.run, args.requests, args.tokens)]
        first, second = started
        ratios = pairs.alternate(lambda: first.passed(second), lambda: second.passed(first), args.pairs, ("async", "offline"))
    finally:
        for engine in started:
            engine.close()
    busiest = max(started, key=lambda e: e.idle)
    print(f"the {busiest.name} engine used {busiest.idle:.2%} of a core while it was idle, the other less; expected at most {IDLE:.0%}")
    return pairs.report({f"async against offline, {args.run}": ratios}) or int(busiest.idle > IDLE)


if __name__ == "__main__":
    sys.exit(main())
