"""Telemetry: what the machine did while the load ran, sampled beside it twice a second, and what follows from it."""
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import pandas as pd
from scipy import integrate

from workbook import metrics, paths
from workbook.load import Repetition

STOP_S = 10
"""Seconds the sampling process may take for its last sample before it is killed."""
ENERGY_WINDOW_S = 2.0
"""The shortest pass that is given an energy. At its edges the energy counter is interpolated between samples half a second
apart: in a shorter pass much of the energy could be that of its neighbours."""
BUSY_S = 1.0
"""How far back NVML's busy share may reach from when it is asked (nvml.h, nvmlUtilization_t: 1/6 to 1 s by product). What is read
sooner than that after a pass began tells of the pause before it: of passes of half a second on H100s it said 0 %, 27 % or 72 %."""
UNWATCHED_S = 5.0
"""Seconds of measuring in which a sampler that works has seen a GPU several times."""

REASONS = {1: "idle", 2: "clocks set by the user", 4: "power cap", 8: "hardware slowdown", 16: "sync boost", 32: "thermal slowdown (software)",
           64: "thermal slowdown (hardware)", 128: "power brake (hardware)", 256: "display clocks"}
"""NVML's reasons for clocks below the highest, by bit (nvml.h, nvmlClocksEventReason*)."""
SLOWDOWNS = 8 | 32 | 64 | 128
"""The reasons that mean trouble. A power cap is not one of them: a GPU at full load runs into it."""


class Sampler:
    """Context manager that samples from when the sampling process is ready until it is left; `frame()` gives the rows.

    Columns: time (seconds of `time.monotonic`), cpu_busy_pct (of all cores this process may use),
    others_cpu_pct (the part of it that is neither this process's nor its descendants'), rss_gb (this process
    and its descendants), kv_cache_pct (of servers), front_end_cpu_pct, engine_core_cpu_pct and worker_cpu_pct (of one
    core, the busiest such process of vLLM's, where it has some), and for each GPU i, where it supports them, gpu<i>_busy_pct,
    gpu<i>_memory_gb, gpu<i>_power_w, gpu<i>_energy_j (a counter), gpu<i>_sm_mhz, gpu<i>_memory_mhz, gpu<i>_throttle
    (NVML's reason bits) and gpu<i>_foreign (ids of processes that are not of this tree).

    Args:
        gpus: the GPUs to watch, by NVML's index.
        urls: servers to ask for their KV cache.

    Attributes:
        problem: a sentence if the sampling process ended before it was told to, once the context is left; else empty.
    """

    def __init__(self, gpus: Sequence[int] = (), urls: Sequence[str] = ()):
        self._watched = json.dumps({"gpus": list(gpus), "urls": list(urls)})
        self.problem = ""

    def __enter__(self) -> "Sampler":
        self._folder = tempfile.TemporaryDirectory()
        self._rows, self._errors = (Path(self._folder.name) / name for name in ("rows", "errors"))
        with self._rows.open("w") as rows, self._errors.open("w") as errors:
            self._process = subprocess.Popen([sys.executable, "-m", "workbook.sampling", str(os.getpid()), self._watched], stdin=subprocess.DEVNULL,
                                             stdout=rows, stderr=errors, env=paths.child_environment())
        try:
            while not self._rows.stat().st_size and self._process.poll() is None:
                time.sleep(0.05)
        except BaseException:  # of an interruption here there is no exit
            self._process.kill()
            self._process.wait()
            self._folder.cleanup()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.terminate()
        try:
            code = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._frame = pd.DataFrame([json.loads(line) for line in self._rows.read_text().splitlines() if line.endswith("}")])
        if code:
            why = self._errors.read_text().strip().splitlines()[-1:] or [f"exit status {code}"]
            self.problem = f"the sampling process ended after {len(self._frame)} samples ({why[0]}): the telemetry is incomplete"
        self._folder.cleanup()

    def frame(self) -> pd.DataFrame:
        """The samples, a row each; once the context is left."""
        return self._frame


def busy(frame: pd.DataFrame, windows: Iterable[tuple[float, float]]) -> dict[str, float]:
    """Mean busy % of the CPU and of each GPU inside the measured windows; those without samples there are left out, so that of a
    window shorter than `BUSY_S` only the CPU is told."""
    windows = list(windows)
    cpu, gpus = _inside(frame, windows).filter(regex="^cpu_busy_pct$"), _gpus_busy(frame, windows)
    return {str(c): float(shares[c].mean()) for shares in (cpu, gpus) for c in shares if shares[c].notna().any()}


def note(done: Sequence[Repetition], frame: pd.DataFrame, here: bool = True) -> None:
    """Note in each pass's `measured` what the samples say of it.

    Args:
        here: whether the engine runs on this machine: else memory and energy are not its own.
    """
    for r in done:
        found = of_window(frame, r.arrival, r.finished, sum(a.output_tokens for a in r.answers))
        r.measured.update({name: value for name, value in found.items() if here or name == "kv_cache_peak_pct"})


def of_window(frame: pd.DataFrame, begin: float, end: float, output_tokens: int) -> dict[str, float]:
    """Metrics of one pass; what was not sampled in it is left out.

    Args:
        begin, end: of the pass, on the clock of `frame.time`, seconds.
    """
    inside = _inside(frame, [(begin, end)])
    if inside.empty:
        return {}
    if _gpus(inside):  # on a CPU the same processes compute, with as many threads as there are cores
        found = {name: inside[name].mean() for role in metrics.PROCESSES if (name := f"{role}_cpu_pct") in inside}
        if not (memory := inside.filter(regex=r"^gpu\d+_memory_gb$")).empty:  # a GPU that shares the host's has none of its own
            found["memory_peak_gb"] = memory.max(axis=None)
    else:
        found = {"memory_peak_gb": inside.rss_gb.max()}
        if "others_cpu_pct" in inside:
            found["others_cpu_pct"] = inside.others_cpu_pct.mean()
    if not (clocks := inside.filter(regex=r"^gpu\d+_sm_mhz$")).empty:
        found["gpu_clock_mhz"] = clocks.mean(axis=None)
    if not (shares := _gpus_busy(frame, [(begin, end)])).empty:
        found["gpu_busy_pct"] = shares.mean().min()
    if "kv_cache_pct" in inside:
        found["kv_cache_peak_pct"] = inside.kv_cache_pct.max()
    if output_tokens and end - begin >= ENERGY_WINDOW_S:
        found["energy_j_per_token"] = energy(frame, begin, end) / output_tokens
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


def energy(frame: pd.DataFrame, begin: float, end: float) -> float:
    """Energy of all sampled GPUs between two times, J, from their energy counters, or from their power where they have
    none; NaN where one has neither, without a GPU, and where the samples do not reach both times."""
    total, gpus = 0.0, _gpus(frame)
    for gpu in gpus:
        columns = [c for c in (f"{gpu}_energy_j", f"{gpu}_power_w") if c in frame]
        known = frame[["time", *columns[:1]]].dropna()
        if not columns or known.empty or begin < known.time.iloc[0] or end > known.time.iloc[-1]:
            return float("nan")
        counter = known[columns[0]] if columns[0].endswith("_j") else integrate.cumulative_trapezoid(known[columns[0]], known.time, initial=0)
        total += float(np.diff(np.interp([begin, end], known.time, counter))[0])
    return total if gpus else float("nan")


def throttled(frame: pd.DataFrame, windows: Iterable[tuple[float, float]]) -> dict[str, dict[str, float]]:
    """For each GPU the share of the samples inside the windows that each of NVML's reasons is set in, by name, those
    that are set in any."""
    inside, found = _inside(frame, windows), {}
    for gpu in _gpus(inside):
        bits = inside.get(f"{gpu}_throttle", pd.Series(dtype=float)).dropna().astype(int)
        found[gpu] = {REASONS[bit]: float(share) for bit in REASONS if len(bits) and (share := ((bits & bit) > 0).mean())}
    return found


def disturbances(frame: pd.DataFrame, windows: Sequence[tuple[float, float]], gpus: Sequence[int] = ()) -> list[str]:
    """What makes measurements invalid, a sentence each: GPUs in a thermal or hardware slowdown, foreign processes on them, and
    those of `gpus` of which NVML told nothing (it then lists no process either)."""
    problems, inside = [], _inside(frame, windows)
    if sum(end - begin for begin, end in windows) >= UNWATCHED_S:
        problems += [f"GPU {gpu} was not watched while measuring: whether anything disturbed it is not known"
                     for gpu in gpus if inside.filter(regex=rf"^gpu{gpu}_(?!foreign)").dropna(how="all").empty]
    for gpu, shares in throttled(frame, windows).items():
        bad = [f"{REASONS[bit]} in {shares[REASONS[bit]] * 100:.0f} %" for bit in REASONS if bit & SLOWDOWNS and REASONS[bit] in shares]
        if bad:
            problems.append(f"GPU {gpu[3:]} was slowed down while measuring: {', '.join(bad)} of the samples")
        present = inside[f"{gpu}_foreign"].fillna("") if f"{gpu}_foreign" in inside else pd.Series(dtype=str)
        if pids := sorted({int(pid) for text in present for pid in text.split()}):
            problems.append(f"another process used GPU {gpu[3:]} while measuring: {', '.join(map(str, pids))} in {(present != '').mean() * 100:.0f} % of the samples")
    return problems


def _inside(frame: pd.DataFrame, windows: Iterable[tuple[float, float]]) -> pd.DataFrame:
    """The samples within any of the windows."""
    if frame.empty:
        return frame
    return frame[np.any([frame.time.between(begin, end) for begin, end in windows] or [np.zeros(len(frame), dtype=bool)], axis=0)]


def _gpus_busy(frame: pd.DataFrame, windows: Iterable[tuple[float, float]]) -> pd.DataFrame:
    """The busy shares of the GPUs that tell of the windows alone."""
    return _inside(frame, [(begin + BUSY_S, end) for begin, end in windows]).filter(regex=r"^gpu\d+_busy_pct$")


def _gpus(frame: pd.DataFrame) -> list[str]:
    """The prefixes of the GPUs' columns, such as `gpu0`."""
    return list(dict.fromkeys(str(c).partition("_")[0] for c in frame if str(c).startswith("gpu")))
