"""The sampling process: what the machine does, as a line of JSON twice a second, until it is told to stop.

A process of its own, since a thread would wait for the interpreter that drives the load, and make it wait in turn;
and a light one (no pandas, no vLLM), since what it takes the load loses: tests/bench/telemetry_cost.py measures that.
"""
import contextlib
import http.client
import json
import os
import re
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from workbook import cores

PERIOD_S = 0.5
TREE_S = 5.0
"""How often the processes of the load are looked up: that reads every process of the machine."""
SCRAPE_S = 2.0
"""How often a server is asked: its answer takes milliseconds of the process that also serves the load."""
ASK_S = 1.0
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks without the environment's proxies, which would not find loopback."""
ROLE = re.compile(r"VLLM::(?P<engine_core>EngineCore)|VLLM::(?P<worker>Worker)|(?P<front_end>VLLM::APIServer|vllm\.entrypoints|workbook\.engines\.serve)")
"""What a process of the engine does, by its command line: vLLM gives those that it starts a title."""
MPS = "nvidia-cuda-mps"
KV_CACHE = re.compile(r"^vllm:kv_cache_usage_perc(?:\{.*\})? (\S+)", re.MULTILINE)

QUERIES: dict[str, Callable[[Any, Any], float]] = {
    "busy_pct": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
    "memory_gb": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used / 1e9,
    "power_w": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
    "energy_j": lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3,
    "sm_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "memory_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "throttle": lambda nvml, gpu: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu),
}
"""What NVML is asked of each GPU, by the column's name; the energy counter runs since the driver was loaded."""


class Tree:
    """The processes of the load: `root` and its descendants, without this one."""

    def __init__(self, root: psutil.Process):
        self._root = root
        self.refresh()

    def refresh(self) -> None:
        """Look them up anew."""
        self._seen = time.monotonic()
        self._processes = [self._root]
        with contextlib.suppress(psutil.NoSuchProcess):
            self._processes += [p for p in self._root.children(recursive=True) if p.pid != os.getpid()]
        self.pids = {p.pid for p in self._processes}
        self._roles = {p.pid: role for p in self._processes[1:] if (role := _role(p))}

    def usage(self) -> tuple[int, dict[int, float]]:
        """Bytes resident, summed over the processes (what several of them share counts for each), and by process id the
        CPU time that each has used, seconds."""
        if time.monotonic() - self._seen > TREE_S:
            self.refresh()
        resident, seconds = 0, {}
        for process in self._processes:
            with contextlib.suppress(psutil.Error), process.oneshot():
                times = process.cpu_times()
                resident += process.memory_info().rss
                seconds[process.pid] = times.user + times.system
        return resident, seconds

    def busiest(self, seconds: dict[int, float]) -> dict[str, float]:
        """The most that one process of each of the engine's roles used, of what each process used; by role."""
        found: dict[str, float] = {}
        for pid, role in self._roles.items():
            found[role] = max(found.get(role, 0.0), seconds.get(pid, 0.0))
        return found


def _role(process: psutil.Process) -> str:
    """What a process of the engine does; empty if it is none."""
    with contextlib.suppress(psutil.Error):
        if found := ROLE.search(" ".join(process.cmdline())):
            return str(found.lastgroup)
    return ""


class Gpus:
    """The GPUs of the load, by NVML's index.

    A process on one of them is foreign if it is none of the load's. In a container NVML may give the host's process
    ids, none of which is in the tree: then those that are there from the start count as the load's, for generate.ipynb
    has seen to it that nobody was there before the engine.
    """

    def __init__(self, indices: Sequence[int], tree: Tree):
        import pynvml
        self._nvml, self._tree = pynvml, tree
        pynvml.nvmlInit()
        self._handles = {index: pynvml.nvmlDeviceGetHandleByIndex(index) for index in indices}
        present = {index: self._pids(index) for index in indices}
        own_ids = any(pids & tree.pids for pids in present.values())
        self._engines = {index: set() if own_ids else pids for index, pids in present.items()}

    def sample(self) -> dict[str, float | str]:
        """A column for each GPU and query, left out where the card does not support it, and `gpu<i>_foreign`, the ids
        of foreign processes separated by spaces."""
        row: dict[str, float | str] = {}
        for index, handle in self._handles.items():
            for name, ask in QUERIES.items():
                with contextlib.suppress(self._nvml.NVMLError):
                    row[f"gpu{index}_{name}"] = ask(self._nvml, handle)
            row[f"gpu{index}_foreign"] = " ".join(map(str, sorted(self._foreign(index))))
        return row

    def _pids(self, index: int) -> set[int]:
        try:
            return {p.pid for p in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handles[index]) if not of_mps(p.pid)}
        except self._nvml.NVMLError:
            return set()

    def _foreign(self, index: int) -> set[int]:
        unknown = self._pids(index) - self._engines[index]
        if unknown - self._tree.pids:
            self._tree.refresh()  # it may be a new child
        return unknown - self._tree.pids


def of_mps(pid: int) -> bool:
    """Whether a process is one of CUDA's multi-process service, which hands on the work of others: those are listed themselves."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).name().startswith(MPS)
    return False


def kv_cache_pct(urls: Sequence[str]) -> float | None:
    """The largest share of the KV cache in use in any engine behind the servers, from their /metrics, in per cent;
    None where none of them says."""
    shares: list[float] = []
    for url in urls:
        with contextlib.suppress(OSError, http.client.HTTPException), DIRECT.open(f"{url}/metrics", timeout=ASK_S) as reply:
            shares += map(float, KV_CACHE.findall(reply.read().decode(errors="replace")))
    return 100 * max(shares) if shares else None


def _ask_servers(urls: Sequence[str], latest: dict[str, float]) -> None:
    """In a thread, so that a server that is slow to answer holds up no sample."""
    while True:
        if (share := kv_cache_pct(urls)) is not None:
            latest["kv_cache_pct"] = share
        time.sleep(SCRAPE_S)


def run(process: psutil.Process, gpus: Sequence[int], urls: Sequence[str]) -> None:
    """Print a sample every PERIOD_S, and a last one on SIGTERM; ends with `process`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    tree = Tree(process)
    watched = Gpus(gpus, tree) if gpus else None
    latest: dict[str, float] = {}
    if urls:
        threading.Thread(target=_ask_servers, args=(urls, latest), daemon=True).start()
    psutil.cpu_percent(percpu=True)
    (_, used), at, told = tree.usage(), time.monotonic(), None
    while told is None and process.is_running():
        told = signal.sigtimedwait({signal.SIGTERM}, PERIOD_S)
        busy = cores.own(psutil.cpu_percent(percpu=True))
        before, began = used, at
        (resident, used), at = tree.usage(), time.monotonic()
        taken = {pid: seconds - before[pid] for pid, seconds in used.items() if pid in before}  # one that is new here may have run for some time
        own = 100 * sum(taken.values()) / (at - began) / len(busy)
        row: dict[str, Any] = {"time": at, "cpu_busy_pct": (all_pct := sum(busy) / len(busy)), "rss_gb": resident / 1e9,
                               "others_cpu_pct": max(0.0, all_pct - own),
                               **{f"{role}_cpu_pct": 100 * seconds / (at - began) for role, seconds in tree.busiest(taken).items()}}
        row |= watched.sample() if watched else {}
        if "kv_cache_pct" in latest:
            row["kv_cache_pct"] = latest.pop("kv_cache_pct")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    run(psutil.Process(int(sys.argv[1])), **json.loads(sys.argv[2]))
