"""What does it cost to send requests one by one? Output tok/s of the async engine against the offline one on a batch.

Both answer an exam's first requests all at once, cut to so few tokens that a pass takes a second or two. Each engine lives in a process of
its own for the whole bench (two in one process share counters) and works when it is told to, in turn with the other; the
one whose turn it is not is seen to leave the processor alone. Exits with 1 if the bar of `pairs` is missed. About ten minutes on two cores.

    python tests/bench/async_overhead.py [--run sharegpt-smollm2] [--pairs 10] [--rounds 4] [--requests 8] [--tokens 48] [--set ""]

On a GPU both engines have to fit into its memory:

    python tests/bench/async_overhead.py --run megatron-583m-static@gpu1 --requests 1 8 32 128 512 --tokens 128 --rounds 1 \
        --set "engine_args.gpu_memory_utilization=0.4"
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

    def __init__(self, name: str, run: str, settings: str, length: int):
        context = multiprocessing.get_context("spawn")
        self.name, self.idle_s, self.idle_cpu_s = name, 0.0, 0.0
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(name, run, settings, length, theirs))
        self._process.start()
        theirs.close()
        self._pipe.recv()  # it has started

    def passed(self, requests: int, other: "Engine") -> float:
        """Answer the first `requests` while the other is idle; returns output tok/s."""
        time.sleep(SETTLE_S)
        began, before = time.monotonic(), other.cpu_seconds()
        self._pipe.send(requests)
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
            self._pipe.send(0)
        self._process.join()


def serve(name: str, run: str, settings: str, length: int, pipe) -> None:
    """In the engine's process: a pass over so many requests for each number that comes, and its output tok/s back."""
    os.environ[progress.TERMINAL] = ""  # no bar
    exam = exams.load(run, exams.parse_set(f"engine={name} load=batch {settings}", source="--set"))
    exam = exam.model_copy(update={"concurrency": []})  # a pass is one batch, and no sweep
    model = models.resolve(exam)
    batch = [replace(r, max_tokens=length) for r in load.requests(exam, subjects.questions(exam, tokens.Tokenizer(model)))]
    engine = engines.start(exam, model, Path(tempfile.mkdtemp()) / "engine.log")
    pipe.send(True)
    while count := pipe.recv():
        (done,) = load.measure(engine, exam, batch[:count], 1)
        pipe.send(metrics.of_repetition(load.requests_frame([done]))["output_tok_s"])
    engine.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="sharegpt-smollm2")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=pairs.ROUNDS, help="of four passes each, in a pair")
    parser.add_argument("--requests", type=int, nargs="+", default=[8], help="a comparison for each number")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--set", default="", help="as SET of make run, for both")
    args = parser.parse_args()

    started = []
    try:
        started += [Engine("async", args.run, args.set, args.tokens)]
        started += [Engine("offline", args.run, args.set, args.tokens)]
        first, second = started
        ratios = {}
        for count in args.requests:
            what = f"async against offline, {args.run}, {count} at once"
            print(what)
            ratios[what] = pairs.alternate(lambda n=count: first.passed(n, second), lambda n=count: second.passed(n, first), args.pairs,
                                           ("async", "offline"), args.rounds)
        busiest = max(started, key=lambda e: e.idle)
        print(f"the {busiest.name} engine used {busiest.idle:.2%} of a core while it was idle, the other less; expected at most {IDLE:.0%}")
        return pairs.report(ratios) or int(busiest.idle > IDLE)
    finally:
        sys.stdout.flush()
        for engine in reversed(started):  # the later one waits for the memory that was free beside the earlier one
            engine.close()


if __name__ == "__main__":
    sys.exit(main())
