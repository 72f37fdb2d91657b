"""What does the telemetry cost the load? The bar is 1 % of the machine, and 1 % of the speed.

First the CPU time of the sampling process beside a load that does nothing. Then one engine answers the same requests
with and without the sampling process beside it, in the pairs of `pairs`. Prints a row a pair, and at the end whether the
bar holds: the share of the machine's cores that the process takes, and the median ratio of output tok/s with its 90 %
interval. Exits with 1 unless it holds.

    python tests/bench/telemetry_cost.py [--run sharegpt-smollm2] [--pairs 10] [--requests 8] [--tokens 48] [--seconds 30]
"""
import argparse
import contextlib
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pairs
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))
from workbook import engines, exams, load, metrics, models, platforms, subjects, telemetry, tokens  # noqa: E402

BAR = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="sharegpt-smollm2")
    parser.add_argument("--pairs", type=int, default=10, help="pairs of passes with and without; 0: only the CPU time")
    parser.add_argument("--requests", type=int, default=8, help="the exam's first requests make a pass")
    parser.add_argument("--tokens", type=int, default=48, help="output tokens of each")
    parser.add_argument("--seconds", type=float, default=30, help="how long the process is watched beside no load")
    args = parser.parse_args()

    exam = exams.load(args.run)
    gpus = [g.index for g in platforms.used_gpus(exam)]
    with telemetry.Sampler(gpus) as sampler, _cpu_share(sampler) as idle:
        time.sleep(args.seconds)
    print(f"beside no load: {idle[0] * len(platforms.cores()) * 1e3:.1f} ms of CPU a second, {idle[0]:.2%} of {len(platforms.cores())} cores", flush=True)
    if not args.pairs:
        print(f"bar: at most {BAR:.0%} of the machine: {'holds' if idle[0] <= BAR else 'does not hold'}")
        return int(idle[0] > BAR)
    shares, ratios = _pairs(exam, gpus, args.requests, args.tokens, args.pairs)
    low, high = pairs.interval(ratios)
    share = float(np.median([idle[0], *shares]))
    verdict = "holds" if share <= BAR and low >= 1 - BAR else "does not hold" if share > BAR or high < 1 - BAR else "is not shown, for noise"
    print(f"bar: at most {BAR:.0%} of the machine and of the speed: {verdict} (median {share:.2%} of {len(platforms.cores())} cores; "
          f"speed × {np.median(ratios):.4f}, 90 % interval {low:.4f} to {high:.4f}, {len(ratios)} pairs)")
    return int(verdict != "holds")


def _pairs(exam, gpus: list[int], requests: int, length: int, count: int) -> tuple[list[float], list[float]]:
    """The share of the cores that the process took in each pass beside it, and the ratios of output tok/s, with / without."""
    model = models.resolve(exam)
    batch = [replace(r, max_tokens=length) for r in load.requests(exam, subjects.questions(exam, tokens.Tokenizer(model)))[:requests]]
    engine = engines.start(exam, model, Path(tempfile.mkdtemp()) / "engine.log")
    shares: list[float] = []

    def sampled() -> float:
        with telemetry.Sampler(gpus) as sampler, _cpu_share(sampler) as share:
            found = _speed(engine, exam, batch)
        shares.extend(share)
        return found
    try:
        print(f"{exam.run}: {len(batch)} requests")
        ratios = pairs.alternate(sampled, lambda: _speed(engine, exam, batch), count, ("with", "without"))
    finally:
        engine.close()
    return shares, ratios


@contextlib.contextmanager
def _cpu_share(sampler):
    """Gives a list that gets the share of the machine's cores that the sampling process took, once left."""
    found: list[float] = []
    process = psutil.Process(sampler._process.pid) if sampler else None
    began, before = time.monotonic(), _cpu_s(process)
    yield found
    if process:
        found.append((_cpu_s(process) - before) / (time.monotonic() - began) / len(platforms.cores()))


def _cpu_s(process: psutil.Process | None) -> float:
    return sum(process.cpu_times()[:2]) if process else 0.0


def _speed(engine, exam, batch) -> float:
    (done,) = load.measure(engine, exam, batch, 1)
    return metrics.of_repetition(load.requests_frame([done]))["output_tok_s"]


if __name__ == "__main__":
    sys.exit(main())
