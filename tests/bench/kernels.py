"""Which kernels take the device's time? The exam's first requests, all at once, on one engine under torch's profiler.

Two passes after a warm-up: the prompts alone (one token each), and whole answers. For each a table of the kernels (on a
CPU: of torch's operators) with their share of all their time, how often they ran and how long one took, and what part of
the pass the device was in any of them. The engine runs in this process and offline, so that the profiler sees it: its
speed is not an exam's. At the end, for each number of requests, what the kernels alone would allow: output tokens through
their time. No host gets more out of them; what they leave between each other, even in a CUDA graph, is not counted.

    python tests/bench/kernels.py megatron-583m-static@gpu1 [--requests 1 8 448] [--rows 12] [--set "model=... engine_args.x=..."]
"""
import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))
from workbook import engines, exams, load, models, platforms, subjects, tokens  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--requests", type=int, nargs="+", default=[448], help="the exam's first requests make a pass; of several numbers each")
    parser.add_argument("--rows", type=int, default=12, help="kernels to name")
    parser.add_argument("--set", default="", help="as SET of make run")
    args = parser.parse_args()

    exam = exams.load(args.run, exams.parse_set(f"engine=offline replicas=1 env.VLLM_ENABLE_V1_MULTIPROCESSING='0' {args.set}", source="--set"))
    model = models.resolve(exam)
    batch = load.requests(exam, subjects.questions(exam, tokens.Tokenizer(model)))
    bounds = []
    log = Path(tempfile.mkdtemp()) / "engine.log"
    engine = engines.start(exam, model, log)
    try:
        print(f"{exam.run}, {exam.model}; the engine's log: {log}")
        for some in (batch[:count] for count in args.requests):
            engine.generate(some)
            _print(f"{len(some)} requests, the prompts", *_profiled(engine, [replace(r, max_tokens=1) for r in some]), args.rows)
            rows, seconds, output = _profiled(engine, some)
            _print(f"{len(some)} requests, whole answers", rows, seconds, output, args.rows)
            spent = sum(row[2] for row in rows)
            bounds.append(f"{len(some):8,} {output:9,} {spent:10.3f} {output / spent:9,.0f}")
        print("\nrequests    tokens kernels, s     tok/s", *bounds, sep="\n", flush=True)
    finally:
        if not platforms.gpus():  # there only the end of this process frees the memory, which `close` would wait for
            engine.close()
    return 0


def _profiled(engine, requests) -> tuple[list[tuple[str, int, float]], float, int]:
    """Of each kernel the name, how often it ran and its seconds in all, longest first; the pass's seconds; output tokens."""
    from torch import profiler
    gpu = bool(platforms.gpus())
    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA if gpu else profiler.ProfilerActivity.CPU]) as profile:
        began = time.perf_counter()
        answers = engine.generate(requests)
        seconds = time.perf_counter() - began
    rows = [(e.key, e.count, (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1e6) for e in profile.key_averages()]
    return sorted((r for r in rows if r[2]), key=lambda r: -r[2]), seconds, sum(a.output_tokens for a in answers)


def _print(title: str, rows: list[tuple[str, int, float]], seconds: float, output: int, count: int) -> None:
    total = sum(r[2] for r in rows)
    print(f"\n{title}: {output:,} tokens in {seconds:.2f} s, {total:.2f} s of it in kernels ({100 * total / seconds:.0f} %)")
    print("share    calls   each, µs  kernel")
    for name, calls, spent in rows[:count]:
        print(f"{spent / total:5.1%} {calls:8,} {spent / calls * 1e6:10.1f}  {name[:140]}")
    print(f"{sum(r[2] for r in rows[count:]) / total:5.1%} {sum(r[1] for r in rows[count:]):8,}{'':13}{max(len(rows) - count, 0)} others", flush=True)


if __name__ == "__main__":
    sys.exit(main())
