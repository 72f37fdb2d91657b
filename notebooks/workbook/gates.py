"""Gates: which metrics an exam can be judged by, known before anything starts."""
from collections.abc import Iterator

from workbook.metrics import METRICS, PROCESSES, THROUGHPUT
from workbook.params import REQUESTS_OF_P99, Exam, nearest
from workbook.validity import expected_replicas


def problems(exam: Exam) -> Iterator[str]:
    """A sentence for each gate of a metric that is none, or that this exam cannot measure on any machine."""
    known = [f"{name}@{size}" if size and not metric.once else name for name, metric in METRICS.items() for size in exam.points or [0]]
    for name in exam.gates:
        if name not in known:
            what = f"measured at a point of the sweep, such as '{THROUGHPUT}@{exam.points[-1]}'" if exam.points else "that is measured"
            hint = nearest(name, known) or ("" if exam.points else f", such as '{THROUGHPUT}'")
            yield f"key 'gates' names the metric '{name}'; expected one {what}{hint}"
        elif why := _unmeasurable(exam, *name.partition("@")[::2]):
            yield f"key 'gates' names the metric '{name}', {why}"


def _unmeasurable(exam: Exam, metric: str, point: str) -> str:
    """Why a metric cannot be judged whatever the machine, and what is expected; empty if it can."""
    first, streams, interval = metric.partition("_")[0], exam.engine in ("server", "endpoint"), exam.engine_args.get("stream_interval", 1)
    count = int(point) if point and exam.load == "batch" else exam.num_prompts * exam.n
    needs = {"goodput": (any(exam.slo.model_dump().values()), "which counts requests within limits: expected some in key 'slo'"),
             "itl": (streams and interval == 1, f"the gaps of a stream, and engine '{exam.engine}' gives none: expected engine: server or endpoint" if not streams else
                     f"the gaps of a stream, whose events hold {interval} tokens each by engine_args.stream_interval: expected 1, or a gate of tpot"),
             "queue": (not streams, f"which engine '{exam.engine}' does not tell: expected engine: offline or async"),
             "acceptance": (exam.engine == "endpoint" or "speculative_config" in exam.engine_args, "of speculative decoding: expected engine_args.speculative_config"),
             "client": (exam.engine != "offline", "of the process that asks, which with engine 'offline' is the engine's own: expected another engine"),
             "straggler": (expected_replicas(exam) > 1, "how long replicas wait for the slowest: expected several (key 'replicas', with engine: server)"),
             **dict.fromkeys(("startup", "bandwidth", "compute"), (exam.engine != "endpoint", "which of a server that runs already is not known: expected another engine")),
             **dict.fromkeys(("gpu", "energy", *(f"{name}_cpu_pct" for name in PROCESSES)), (exam.requires.device != "cpu", "which is measured only where a GPU generates: expected requires.device: gpu or any"))}
    for name in (first, metric):
        if name in needs and not needs[name][0]:
            return needs[name][1]
    if "_p99_" in metric and count < REQUESTS_OF_P99:
        return f"of {count:,} requests a repetition, of which it is no more than the slowest few: expected {REQUESTS_OF_P99:,} or more, or a lower percentile"
    return ""
