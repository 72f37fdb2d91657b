"""Telemetry: what the machine did while the load ran, sampled beside it twice a second."""
import threading
import time
from types import TracebackType

import pandas as pd
import psutil

from workbook import platforms

PERIOD_S = 0.5


class Sampler:
    """Context manager that samples until it is left; `frame()` gives the rows.

    Columns: time (seconds of `time.monotonic`), cpu_busy_pct (of all cores this process may use),
    rss_gb (this process and its children), and for each GPU i gpu<i>_busy_pct, gpu<i>_memory_gb,
    gpu<i>_power_w, gpu<i>_sm_mhz, gpu<i>_throttle (NVML's reason bits).
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def frame(self) -> pd.DataFrame:
        """The samples so far, a row each."""
        return pd.DataFrame(self._rows)

    def _sample(self) -> None:
        cores = platforms.cores()
        psutil.cpu_percent(percpu=True)  # the first call has nothing to compare with; psutil remembers it by thread
        while not self._stop.wait(PERIOD_S):
            busy = psutil.cpu_percent(percpu=True)
            self._rows.append({"time": time.monotonic(), "cpu_busy_pct": sum(busy[c] for c in cores) / len(cores),
                               "rss_gb": _tree_rss() / 1e9} | _gpu_sample())


def _tree_rss() -> int:
    total = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _gpu_sample() -> dict[str, float]:
    if not platforms.gpus():
        return {}
    import pynvml as nvml
    row = {}
    for gpu in platforms.gpus():
        handle = nvml.nvmlDeviceGetHandleByIndex(gpu.index)
        row |= {
            f"gpu{gpu.index}_busy_pct": nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            f"gpu{gpu.index}_memory_gb": nvml.nvmlDeviceGetMemoryInfo(handle).used / 1e9,
            f"gpu{gpu.index}_power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            f"gpu{gpu.index}_sm_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            f"gpu{gpu.index}_throttle": nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
        }
    return row


def busy(frame: pd.DataFrame, windows: list[tuple[float, float]]) -> dict[str, float]:
    """Mean busy % of the CPU and of each GPU inside the measured windows; empty without samples there."""
    if frame.empty:
        return {}
    inside = pd.concat([frame[frame.time.between(begin, end)] for begin, end in windows])
    columns = [c for c in frame.columns if c.endswith("busy_pct")]
    return {c: float(inside[c].mean()) for c in columns} if len(inside) else {}
