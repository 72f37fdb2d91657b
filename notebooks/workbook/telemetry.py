"""Telemetry: what the machine did while the load ran, sampled beside it twice a second.

The sampler is a process of its own: a thread would wait for the interpreter that drives the load, and make
it wait in turn.
"""
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import pandas as pd
import psutil

from workbook import paths, platforms

PERIOD_S = 0.5


class Sampler:
    """Context manager that samples from when the sampling process is ready until it is left; `frame()` gives the rows.

    Columns: time (seconds of `time.monotonic`), cpu_busy_pct (of all cores this process may use),
    rss_gb (this process and its children), and for each GPU i gpu<i>_busy_pct, gpu<i>_memory_gb,
    gpu<i>_power_w, gpu<i>_sm_mhz, gpu<i>_throttle (NVML's reason bits).

    Args:
        gpus: the GPUs to watch, by NVML's index.
    """

    def __init__(self, gpus: Sequence[int] = ()):
        self._gpus = gpus

    def __enter__(self) -> "Sampler":
        handle, name = tempfile.mkstemp(suffix=".jsonl")
        self._rows = Path(name)
        with os.fdopen(handle, "w") as out:
            self._process = subprocess.Popen([sys.executable, "-m", "workbook.telemetry", str(os.getpid()), *map(str, self._gpus)], stdin=subprocess.DEVNULL,
                                             stdout=out, env=paths.child_environment())
        while not self._rows.stat().st_size and self._process.poll() is None:
            time.sleep(0.05)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait()
        lines = self._rows.read_text().splitlines()
        self._rows.unlink()
        self._frame = pd.DataFrame([json.loads(line) for line in lines if line.endswith("}")])

    def frame(self) -> pd.DataFrame:
        """The samples, a row each; once the context is left."""
        return self._frame


def _sample(process: psutil.Process, gpus: list[int]) -> None:
    """Print a sample as JSON now and every PERIOD_S, until told to stop or `process` has ended."""
    cores = platforms.cores()
    psutil.cpu_percent(percpu=True)
    sampler = os.getpid()
    while process.is_running():
        time.sleep(PERIOD_S)
        busy = psutil.cpu_percent(percpu=True)
        row = {"time": time.monotonic(), "cpu_busy_pct": sum(busy[c] for c in cores) / len(cores), "rss_gb": _tree_rss(process, sampler) / 1e9}
        print(json.dumps(row | _gpu_sample(gpus)), flush=True)


def _tree_rss(root: psutil.Process, sampler: int) -> int:
    total = 0
    try:
        for process in [root, *root.children(recursive=True)]:
            if process.pid != sampler:
                total += process.memory_info().rss
    except psutil.NoSuchProcess:
        return total
    return total


def _gpu_sample(gpus: list[int]) -> dict[str, float]:
    if not gpus:
        return {}
    import pynvml as nvml
    nvml.nvmlInit()
    row = {}
    for gpu in gpus:
        handle = nvml.nvmlDeviceGetHandleByIndex(gpu)
        row |= {
            f"gpu{gpu}_busy_pct": nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            f"gpu{gpu}_memory_gb": nvml.nvmlDeviceGetMemoryInfo(handle).used / 1e9,
            f"gpu{gpu}_power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            f"gpu{gpu}_sm_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            f"gpu{gpu}_throttle": nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
        }
    return row


def busy(frame: pd.DataFrame, windows: list[tuple[float, float]]) -> dict[str, float]:
    """Mean busy % of the CPU and of each GPU inside the measured windows; empty without samples there."""
    if frame.empty:
        return {}
    inside = pd.concat([frame[frame.time.between(begin, end)] for begin, end in windows])
    columns = [c for c in frame.columns if c.endswith("busy_pct")]
    return {c: float(inside[c].mean()) for c in columns} if len(inside) else {}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _sample(psutil.Process(int(sys.argv[1])), [int(index) for index in sys.argv[2:]])
