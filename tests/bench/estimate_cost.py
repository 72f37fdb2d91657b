"""What does vLLM's estimate of the bytes and operations of a step cost the engine core? Goldbook asks every engine for it (`enable_mfu_metrics`).

The estimate is Python, once a step, for each request in it. Timed here by itself, for a step that decodes so many requests:
held against how long a step takes (on a GPU the run's `tpot_p50_ms`), it is what the roofline costs the speed that is measured.

    python tests/bench/estimate_cost.py [RUN] [--requests 1 8 32 128 512]        # of the run's model, on one device
"""
import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))
from workbook import exams, models  # noqa: E402

STEPS = 400
CONTEXT = 600
"""Tokens before the one that is decoded. They are only added up."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="megatron-583m-static@gpu1")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    args = parser.parse_args()

    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.metrics.perf import ModelMetrics
    estimate = ModelMetrics(EngineArgs(model=str(models.resolve(exams.load(args.run))), load_format="dummy", enable_mfu_metrics=True).create_engine_config())
    print("requests  µs a step (median, fastest)")
    for count in args.requests:
        ids = [f"request-{i}" for i in range(count)]
        cached = SimpleNamespace(req_ids=ids, num_computed_tokens=[CONTEXT] * count)
        step = SimpleNamespace(scheduled_new_reqs=[], num_scheduled_tokens=dict.fromkeys(ids, 1), scheduled_cached_reqs=cached)
        times = [_seconds(estimate, step) * 1e6 for _ in range(STEPS)]
        print(f"{count:8} {statistics.median(times):10.0f} {min(times):8.0f}", flush=True)
    return 0


def _seconds(estimate, step) -> float:
    began = time.perf_counter()
    estimate.get_step_perf_stats_per_gpu(step)
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
