"""Diagnosis: what generation is bound by, in one sentence with its evidence."""
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any

import numpy as np
import pandas as pd

from workbook import metrics, platforms, roofline, telemetry
from workbook.load import Repetition
from workbook.params import Exam

BANDWIDTH, COMPUTE, QUEUE, CLIENT, STARVED, HOST, LATENCY, UNKNOWN = KINDS = (
    "bandwidth-bound", "compute-bound", "queue-bound", "client-bound", "starved of requests", "host-bound", "latency-bound", "not known")

NEAR_PCT = 60
"""Share of a roof from which it is the bound: no real mix of kernels runs at the rate of one large copy or product,
and the ramp and the tail of the load are inside the window."""
BUSY_PCT = 80
"""From here on an accelerator counts as busy: less, and a fifth of the time it waits for something else."""
CORE_PCT = 80
"""Share of one core from which a process of the host is what the device waits for: one thread does all that counts in
the one that drives the load, in vLLM's front end and in its engine core, and what it hands over late cannot begin."""
QUEUE_PCT = 30
"""Share of their time in the engine that requests wait for the scheduler, from which the queue is the bound."""
OUTSIDE_PCT = 10
"""Share of their time that requests are outside the engine, from which it is worth a word: no more slots help there."""
PREEMPTED = 0.1
"""Preemptions a request that mean the KV cache is full: each one throws a prefill away."""
IDLE_PCT = 10
"""Share of the time without any request from which the load, and not the engine, sets the pace."""
FEW = 0.25
"""Requests under way, as a fraction of those the engine may run at once, that leave it room for many more."""


@dataclass(frozen=True)
class Evidence:
    """What a diagnosis rests on, means over the repetitions; NaN where it was not measured.

    Attributes:
        bandwidth_pct, compute_pct: shares of the roofs.
        absent: why there are no shares; else empty.
        others_pct: share of the CPU that other processes took while the roofs were measured.
        device: GPU or CPU; accelerator where it is a server's that runs elsewhere.
        busy_pct: time the GPUs ran a kernel, of those with parts of the same tensors the least busy, or the CPU's cores anything.
        together: GPUs that have parts of the same tensors.
        in_flight: requests under way.
        idle_pct: time without a request under way, up to the last token.
        queue_pct: part of the requests' time in the engine before the scheduler first took them.
        outside_pct: part of all their time before they were in the engine, and after (`outside_engine_pct`).
        preempted: preemptions a request.
        slots: requests that the engines may run at once; 0 if not known.
        client_pct: of one core, what the process that drives the load used.
        processes: of one core, what the busiest of vLLM's processes of each kind used, as in `metrics.PROCESSES`.
        paced: requests arrive by a schedule, whatever the engine does (an open loop).
    """
    bandwidth_pct: float = nan
    compute_pct: float = nan
    absent: str = ""
    others_pct: float = 0.0
    device: str = "CPU"
    busy_pct: float = nan
    together: int = 1
    in_flight: float = 0.0
    idle_pct: float = 0.0
    queue_pct: float = nan
    outside_pct: float = nan
    preempted: float = 0.0
    slots: int = 0
    client_pct: float = nan
    processes: tuple[tuple[str, float], ...] = ()
    paced: bool = False


def diagnose(e: Evidence) -> tuple[str, str]:
    """What it is bound by (one of `KINDS`) and the sentence that says why."""
    kind = _kind(e)
    busy = f"{e.device} {e.busy_pct:.0f} % busy" if isfinite(e.busy_pct) else f"how busy the {e.device} was is not known"
    if isfinite(e.busy_pct) and e.together > 1:
        busy += f" (of every {e.together} that work as one the least busy: the others wait for it inside their kernels)"
    count = f"{e.in_flight:,.1f}" if e.in_flight < 100 else f"{e.in_flight:,.0f}"
    under_way = f"{count} requests under way on average" + (f", of {e.slots:,} that may run at once" if e.slots else "")
    if e.in_flight > e.slots > 0:
        under_way = f"{count} requests sent and not answered on average, {e.slots:,} of which may run at once"
    waits = [f"requests wait for the scheduler {e.queue_pct:.0f} % of their time"] * isfinite(e.queue_pct)
    outside = [f"requests are not in the engine {e.outside_pct:.0f} % of their time, but with the client or the front end"] * (e.outside_pct >= OUTSIDE_PCT)
    hosts = _processes(e) if max((share for _, share in e.processes), default=0.0) >= CORE_PCT else []
    said = {
        BANDWIDTH: [_roofs(e)],
        COMPUTE: [_roofs(e)],
        QUEUE: [*waits, *outside, f"{e.preempted:.2g} preemptions a request", under_way, busy, *hosts, _roofs(e)],
        CLIENT: [f"the process that sends the requests and takes the answers (with engine async it is vLLM's front end too) used {e.client_pct:.0f} % of a core",
                 f"{busy} with {under_way}", *outside, _roofs(e)],
        STARVED: [under_way, *([f"none {e.idle_pct:.0f} % of the time"] if e.idle_pct >= 1 else []), busy, _roofs(e)],
        HOST: [f"{busy} with {under_way}", *_processes(e), *outside, _roofs(e)],
        LATENCY: [f"{busy}, yet far from both roofs: small or slow kernels, or waits inside them", under_way, *hosts, *outside, _roofs(e)],
        UNKNOWN: [busy, under_way, *hosts, _roofs(e)],
    }
    return kind, f"{kind}: {'; '.join(said[kind])}"


def _kind(e: Evidence) -> str:
    if max(shares := [x for x in (e.bandwidth_pct, e.compute_pct) if isfinite(x)], default=0) >= NEAR_PCT:
        return BANDWIDTH if e.bandwidth_pct == max(shares) else COMPUTE
    few, busy, waits = e.in_flight < FEW * e.slots, e.busy_pct >= BUSY_PCT, e.busy_pct < BUSY_PCT  # neither where it is not known
    if e.preempted >= PREEMPTED:
        return QUEUE
    # Before the queue: where a core is the bound, requests queue behind it, and more slots would change nothing.
    if waits and e.client_pct >= CORE_PCT:
        return CLIENT
    if waits and max((share for _, share in e.processes), default=0.0) >= CORE_PCT:
        return HOST
    if e.queue_pct >= QUEUE_PCT:
        return QUEUE
    # A schedule's few requests keep a device busy by their latency alone; more of them would share its steps.
    if e.idle_pct >= IDLE_PCT or few and (e.paced or waits):
        return STARVED
    if busy and shares:
        return LATENCY
    return HOST if waits else UNKNOWN


def _processes(e: Evidence) -> list[str]:
    """Which process of the host it is that the device waits for, as far as their shares of a core tell."""
    named = [*((f"the busiest {name.replace('_', ' ')}", share) for name, share in e.processes), *([("the client", e.client_pct)] if isfinite(e.client_pct) else [])]
    return [f"of one core, {', '.join(f'{name} used {share:.0f} %' for name, share in sorted(named, key=lambda n: -n[1]))}"] if e.processes else []


def _roofs(e: Evidence) -> str:
    if e.absent or not isfinite(e.bandwidth_pct):
        return f"share of the roofs not known: {e.absent or 'not measured'}"
    said = f"{e.bandwidth_pct:.0f} % of the bandwidth roof, {e.compute_pct:.0f} % of the compute roof"
    if max(e.bandwidth_pct, e.compute_pct) > 100:
        said += " (more than all of it: a part of what vLLM counts stays in caches, or the roof was measured too low)"
    if e.others_pct > roofline.QUIET_PCT:
        said += f" (roofs measured while other processes took {e.others_pct:.0f} % of the CPU: they are higher)"
    return said


def evidence(exam: Exam, requests: pd.DataFrame, done: Sequence[Repetition], busy: dict[str, float],
             roof: roofline.Calibration | None, absent: str = "", slots: int = 0) -> Evidence:
    """Gather what `diagnose` needs, of one point of a load.

    Args:
        requests: the point's rows of `load.requests_frame`.
        done: the point's passes, as `roofline.note` left them.
        busy: as `telemetry.busy`, of the point's windows.
        roof: what the shares are shares of; None for an endpoint.
        absent: what `roofline.note` said.
        slots: the engine's `slots()`.
    """
    ended = requests[requests.last_token_s.notna()]
    makespan = sum(r.finished - r.arrival for r in done)
    # Up to the last token: after it the engine waits for nobody, and the host hands the answers over.
    in_use, spans = np.sum([_occupied(rows) for _, rows in ended.groupby(["session", "repetition"])], axis=0) if len(ended) else (nan, nan)
    device = "accelerator" if exam.engine == "endpoint" else "GPU" if platforms.gpus() else "CPU"
    together = exam.engine_args.get("tensor_parallel_size", 1)
    shares = {"GPU": _least_busy(busy, together), "CPU": [busy.get("cpu_busy_pct", nan)]}.get(device, [])
    return Evidence(
        *(float(np.median([r.measured.get(share, nan) for r in done])) for share in roofline.SHARES), absent, roof.others_pct if roof else 0.0,
        device=device,
        busy_pct=float(np.mean(shares)) if shares else nan, together=together if device == "GPU" else 1,
        in_flight=float((ended.last_token_s - ended.arrival_s).sum()) / makespan,
        idle_pct=100 * max(0.0, 1 - in_use / spans),
        queue_pct=_queue_pct(requests, done),
        outside_pct=_outside_pct(requests, done),
        preempted=sum(r.counters.get("vllm:num_preemptions", 0) for r in done) / max(1, len(requests)),
        client_pct=float(np.median([r.measured.get(metrics.CLIENT, nan) for r in done])),
        processes=tuple((name, share) for name in metrics.PROCESSES if isfinite(share := float(np.median([r.measured.get(f"{name}_cpu_pct", nan) for r in done])))),
        slots=slots, paced=exam.open_loop)


def _least_busy(busy: dict[str, float], together: int) -> list[float]:
    """How busy the least busy of every `together` GPUs was. In tensor parallel they do the same work, and one that is ahead
    waits for the others inside a kernel of the collective, which NVML counts as busy."""
    gpus = [value for name, value in busy.items() if name.startswith("gpu")]
    return [min(gpus[first:first + together]) for first in range(0, len(gpus), together)]


def _occupied(rows: pd.DataFrame) -> tuple[float, float]:
    """Seconds in which at least one request was under way, the union of their intervals; and seconds from the first
    arrival to the last token."""
    rows = rows.sort_values("arrival_s")
    begins, ends = rows.arrival_s.to_numpy(), rows.last_token_s.cummax().to_numpy()
    gaps = np.maximum(0.0, begins[1:] - ends[:-1])
    span = float(ends[-1] - begins[0])
    return span - float(gaps.sum()), span


def _queue_pct(requests: pd.DataFrame, done: Sequence[Repetition]) -> float:
    """NaN where the engine gave no times of its scheduler, neither of each request nor, as a server, of all together."""
    inside = (requests.last_token_s - requests.queued_s).sum()
    waited = (requests.scheduled_s - requests.queued_s).sum()
    if not inside > 0:
        waited, running = (sum(r.counters.get(name, 0.0) for r in done) for name in metrics.SECONDS)
        inside = waited + running
    return float(100 * waited / inside) if inside > 0 else nan


def _outside_pct(requests: pd.DataFrame, done: Sequence[Repetition]) -> float:
    """Median over the passes; NaN where one of them does not tell."""
    passes = dict(iter(requests.groupby("repetition")))
    return float(np.median([metrics.outside_engine(passes[r.number], r.counters) if r.number in passes else nan for r in done]))


def of_run(exam: Exam, requests: pd.DataFrame, done: Sequence[Repetition], samples: pd.DataFrame, roof: roofline.Calibration | None,
           absent: str = "", slots: int = 0) -> list[dict[str, Any]]:
    """A diagnosis for each point of a sweep, the largest last; one of point 0 where there is none.

    Args:
        requests, done: of the run; `done` as `roofline.note` left it.
        samples: rows of `telemetry.Sampler`.
        roof: what the shares are shares of; None for an endpoint.
        absent: what `roofline.note` said.
        slots: the engine's `slots()`.

    Returns:
        Dicts of plain values: point, bound (the kind), the evidence (None where it was not measured), sentence.
    """
    rows = []
    for point in sorted({r.point for r in done}):
        here = [r for r in done if r.point == point]
        busy = telemetry.busy(samples, [(r.arrival, r.finished) for r in here])
        found = evidence(exam, requests[requests.point == point], here, busy, roof, absent, slots)
        kind, sentence = diagnose(found)
        measured = {name: getattr(found, name) for name in ("bandwidth_pct", "compute_pct", "busy_pct", "in_flight", "idle_pct", "queue_pct", "outside_pct", "preempted", "client_pct")}
        rows.append({"point": point, "bound": kind, **{k: v if isfinite(v) else None for k, v in measured.items()},
                     "sentence": f"at {point}, {sentence}" if point else sentence})
    return rows
