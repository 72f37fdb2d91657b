"""Roofline: which share of this machine's memory bandwidth and matrix rate generation reaches, and what it is bound by.

The roofs are measured here, not taken from a data sheet. What the engine moves and computes is vLLM's own estimate
(`enable_mfu_metrics`, its `v1/metrics/perf.py`), made from the model's shape and each step's batch: weights once
a step, the KV cache of every sequence, and the activations of every layer as if none stayed in a cache. It leaves
out LoRA adapters and a draft model. Making it is the engine core's work:
17 us a step with one request and 115 us with 512, on the CPU goldens' machine (`tests/bench/estimate_cost.py`). An answer's tokens of a 583M
model come every 1.9 and 16 ms on an H100, whose host is up to half as fast: reckoned, 1 to 2 % of a speed at most, golden's and run's alike.

Williams, Waterman, Patterson: Roofline: An Insightful Visual Performance Model for Multicore Architectures, 2009.
"""
import contextlib
import datetime
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from pydantic import AwareDatetime, BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, ValidationError

from workbook import controls, cores, files, paths, platforms
from workbook.errors import BadInput
from workbook.load import Repetition
from workbook.params import Exam

MAX_AGE = datetime.timedelta(days=1)
"""After this a calibration is measured again: it costs seconds, and one that was disturbed reads low until then."""
QUIET_PCT = 10
"""Share of the CPU that others may take while a calibration is measured that is worth keeping."""
SHARES = ("bandwidth_roof_pct", "compute_roof_pct")
BYTES = ("vllm:estimated_read_bytes_per_gpu", "vllm:estimated_write_bytes_per_gpu")
FLOPS = "vllm:estimated_flops_per_gpu"

SAMPLE_S, SAMPLES = 0.3, 5
"""Each piece of work is timed for as long as this, and as often as this at least; the fastest counts."""
LONG_S = 0.1
"""A matrix product that takes this long needs no larger one: the largest, at the 0.1 TFLOP/s of two cores in float32, takes 11 s each time."""


class Calibration(BaseModel):
    """The roofs of one accelerator: a GPU, or all the CPU cores that this process may use.

    Attributes:
        key: what the numbers depend on: device, torch and driver.
        bytes_s: memory bandwidth, bytes/s: the faster of a large copy (read + written) and a large read.
        flop_s: FLOP/s of a large matrix product, 2·n³ for n × n.
        dtype: what it was in, `platforms.matrix_dtype`.
        others_pct: share of the CPU cores that other processes took meanwhile; 0 on a GPU, which the run has to itself.
        measured: when, UTC.
    """
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    key: str
    bytes_s: PositiveFloat
    flop_s: PositiveFloat
    others_pct: NonNegativeFloat
    measured: AwareDatetime
    dtype: str = "bfloat16"

    @property
    def sentence(self) -> str:
        """The roofs in words."""
        return (f"{self.bytes_s / 1e9:,.0f} GB/s and {self.flop_s / 1e12:,.2f} {self.dtype} TFLOP/s, measured {self.measured:%Y-%m-%d %H:%M} UTC "
                f"with {self.others_pct:.0f} % of the CPU taken by other processes")


def calibrate() -> Calibration:
    """The roofs of this machine: those in the cache, or measured now in a process of its own (a few seconds).

    Whatever else runs can only slow a measurement down, so the highest rate ever seen on this device is nearest
    to the roof: a later measurement may raise what is known and never lowers it. One that others disturbed serves
    this run only, and says so in `others_pct`.

    Raises:
        RuntimeError: the measurement failed.
    """
    key = _key()
    path = paths.cache() / "roofline" / (re.sub(r"[^\w.]+", "-", key) + ".json")
    now = datetime.datetime.now(datetime.UTC)
    known = _cached(path, key)
    if known and datetime.timedelta(0) <= now - known.measured < MAX_AGE:
        return known
    found = Calibration(key=key, measured=now.replace(microsecond=0), dtype=platforms.matrix_dtype(), **controls.in_own_process("workbook.roofline"))
    if known:
        if found.others_pct > QUIET_PCT and found.bytes_s <= known.bytes_s and found.flop_s <= known.flop_s:
            return known  # whose rates these are, and not of the noise of today
        found = found.model_copy(update={name: max(getattr(found, name), getattr(known, name)) for name in ("bytes_s", "flop_s")})
    if found.others_pct <= QUIET_PCT:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs seconds, not the run
            files.write_json(path, found.model_dump(mode="json"))
    return found


def _key() -> str:
    device = platforms.gpus()[0].name if platforms.gpus() else f"{platforms.cpu_id()} x{len(platforms.cores())}"
    return f"{device}, torch {platforms.versions().get('torch', 'none')}, driver {platforms.driver() or 'none'}"


def _cached(path: Path, key: str) -> Calibration | None:
    """What the cache has; None if it is missing, broken, or of something else."""
    try:
        found = Calibration.model_validate(files.read_json(path))
    except (BadInput, ValidationError):
        return None
    return found if found.key == key and found.dtype == platforms.matrix_dtype() else None


def note(exam: Exam, done: Sequence[Repetition], roof: Calibration | None, log: Path) -> str:
    """Note each pass's shares of the roofs in its `measured`, where they can be told.

    Args:
        roof: None for an endpoint.
        log: the engine's log, where vLLM says which parts of the model it can estimate.

    Returns:
        Why there are none, in a few words; empty if there are.
    """
    if why := _absent(exam, done, log):
        return why
    for r in done:
        r.measured.update(shares(exam, r.counters, r.finished - r.arrival, roof))
    return ""


def _absent(exam: Exam, done: Sequence[Repetition], log: Path) -> str:
    if exam.engine == "endpoint":
        return "the server may run on another machine"
    if not all(r.counters.get(name, 0) > 0 for r in done for name in (*BYTES, FLOPS)):
        return "vLLM gave no estimate of bytes and FLOPs"
    # It leaves out what it cannot estimate (a quantisation it does not know) and still adds up the rest.
    parts = set(re.findall(r"Instantiated ComponentMetrics \[(\w+)\]", log.read_text(errors="replace") if log.exists() else ""))
    lacking = [what for what, names in (("attention", {"attn", "mla_attn"}), ("feed-forward layers", {"ffn"})) if parts and not parts & names]
    return f"vLLM cannot estimate this model's {' and '.join(lacking)}" if lacking else ""


def shares(exam: Exam, growth: dict[str, float], makespan_s: float, roof: Calibration) -> dict[str, float]:
    """% of the bandwidth and of the compute roof that one pass reached, on average over its accelerators.

    vLLM counts per GPU and engine, and the counters are summed over engines: times the GPUs of one engine it is
    the work of all, which is spread over the accelerators, however many engines share one.

    Args:
        growth: of the engine's counters in the pass.
        makespan_s: seconds of the pass.
    """
    gpus_an_engine = platforms.workers(exam) // exam.engine_args.get("data_parallel_size", 1)
    each = gpus_an_engine / max(1, platforms.accelerators_used(exam)) / makespan_s
    parts = sum(growth[name] for name in BYTES) / roof.bytes_s, growth[FLOPS] / roof.flop_s
    return {name: 100 * each * part for name, part in zip(SHARES, parts, strict=True)}


def _best(work: Callable[[], Any], wait: Callable[[], None], loops: int) -> float:
    """Seconds of one `work`, in the fastest of some samples of `loops` each."""
    work()
    wait()
    times, until = [], time.perf_counter() + SAMPLE_S
    while len(times) < SAMPLES or time.perf_counter() < until:
        began = time.perf_counter()
        for _ in range(loops):
            work()
        wait()
        times.append((time.perf_counter() - began) / loops)
    return min(times)


def measure(size: int, sides: tuple[int, ...]) -> dict[str, float]:
    """Measure both roofs; uses torch, so call it in a process of its own (`calibrate` does).

    Args:
        size: bytes of the buffer that is copied and read; far more than the caches hold.
        sides: rows of the square matrices, from small to large; the best rate counts.
    """
    import torch
    busy, own, began = _cpu_s(), time.process_time(), time.perf_counter()
    on_gpu = torch.cuda.is_available()
    device, loops, wait = ("cuda", 10, torch.cuda.synchronize) if on_gpu else ("cpu", 1, lambda: None)
    if not on_gpu:
        torch.set_num_threads(len(platforms.cores()))
    # Written to, since untouched pages are all the same page of zeros.
    source = torch.ones(size // 4, device=device)
    target = torch.ones_like(source)
    bandwidth = max(2 * size / _best(lambda: target.copy_(source), wait, loops), size / _best(source.amax, wait, loops))
    rate = 0.0
    for side in sides:
        a, b = (torch.randn(side, side, device=device).to(getattr(torch, platforms.matrix_dtype())) for _ in range(2))
        seconds = _best(lambda a=a, b=b: a @ b, wait, loops)
        rate = max(rate, 2 * side**3 / seconds)
        if seconds > LONG_S:
            break
    others = (_cpu_s() - busy - (time.process_time() - own)) / (time.perf_counter() - began) / len(platforms.cores())
    return {"bytes_s": bandwidth, "flop_s": rate, "others_pct": 0.0 if on_gpu else 100 * max(0.0, others)}


def _cpu_s() -> float:
    """Seconds that the cores of this process have worked since they were started, for whomever."""
    # Time for guests is also counted as the user's.
    return sum(sum(t) - t.idle - t.iowait - t.guest - t.guest_nice for t in cores.own(psutil.cpu_times(percpu=True)))


if __name__ == "__main__":
    print(json.dumps(measure(1 << (30 if platforms.gpus() else 29), (1024, 2048, 4096, 8192))))
