"""The server engine: vLLM's OpenAI-compatible servers, started on loopback for a run and stopped after it."""
import atexit
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import psutil

from workbook import limits, models, orphans, paths, platforms
from workbook.engines import ports
from workbook.engines.base import EngineDied, chosen_attention, engine_args, environment, keyed, last_error, wait_for_memory
from workbook.engines.http import HttpEngine
from workbook.params import Exam

STOP_S = 10
"""Seconds a server may take to stop before it is killed (an idle vLLM on a CPU needs 2). The stacks of its threads are in the log then,
as long as Python still runs in it."""
DYING_S = 5
"""Seconds for a server that answers no more to say how it ended."""
FAULTS = {"PYTHONFAULTHANDLER": "1"}
"""A server that crashes in native code leaves the Python it was in in its log."""
OPEN = {"VLLM_API_KEY": ""}
"""The key of somebody's own server, left in the environment, would shut this run's client out."""


class ServerEngine(HttpEngine):
    """`exam.replicas` servers side by side, each on GPUs of its own as long as there are some.

    Attributes:
        load_s: seconds until all of them answered.
    """

    def __init__(self, exam: Exam, model: Path, log: Path):
        self._memory_before = platforms.gpu_memory_used(exam)
        began = time.monotonic()
        self._log, self._log_start = log, log.stat().st_size if log.exists() else 0
        self._processes: list[subprocess.Popen] = []
        self._tree: list[psutil.Process] = []
        self._ports: list[ports.Block] = []
        atexit.register(self._stop)
        try:
            self._ports = ports.take(exam.replicas)
            urls = [self._launch(exam, model, index, block) for index, block in enumerate(self._ports)]
            self._wait_until_ready(urls, limits.deadline(exam.timeout_s))
            # Noted now: those of a server that is killed later are nobody's children by the time it is stopped.
            self._tree = self._descendants()
            super().__init__(exam, urls)
            self.serves = exam.model
            if adapter := models.adapter(exam):
                self._model = adapter.name
        except BaseException:
            self._stop()
            raise
        self.load_s = time.monotonic() - began

    def run(self, work: Callable[[], Coroutine], at_once: int = 0) -> Any:
        """Run a load, as `HttpEngine.run`.

        Raises:
            EngineDied: a server has ended in it, with the last error in its log.
        """
        result = super().run(work, at_once)
        for url, process in zip(self._urls, self._processes, strict=True):
            if not _is_ready(url):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=DYING_S)
                raise EngineDied(f"a server died: {self._why(process.returncode)}")
        return result

    def attention_backend(self) -> str:
        """The attention back end of its servers, as `base.chosen_attention`."""
        return chosen_attention(self._log, self._log_start)

    def _why(self, code: int | None) -> str:
        """How it ended, by its exit code (None: it runs, and does not answer): a signal leaves no time to say more;
        else the last error in its log."""
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return last_error(self._log, self._log_start) or ("it does not answer any more" if code is None else f"its process ended with {code}")

    def _launch(self, exam: Exam, model: Path, index: int, block: ports.Block) -> str:
        words = [sys.executable, "-m", *entry_point(exam), "--host", "127.0.0.1", "--port", str(block.api),
                 "--model", str(model), "--disable-uvicorn-access-log", *arguments(engine_args(exam))]
        if adapter := models.adapter(exam):
            words += ["--lora-modules", f"{adapter.name}={adapter.folder}"]
        # vLLM's data parallel engines would all start looking at the same port, at the same time: to those the kernel gives theirs.
        found = {"VLLM_PORT": str(block.engines)} if exam.engine_args.get("data_parallel_size", 1) == 1 else {}
        variables = paths.child_environment() | OPEN | FAULTS | found | environment(exam) | placement(exam, index)
        with self._log.open("a") as log:
            self._processes.append(subprocess.Popen(words, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_prepare))
        return f"http://127.0.0.1:{block.api}"

    def _wait_until_ready(self, urls: list[str], deadline: float) -> None:
        """Ask each server whether it is up.

        Raises:
            EngineDied: one ended instead, or was not ready in time.
        """
        for url, process in zip(urls, self._processes, strict=True):
            while not (_listens(process, url) and _is_ready(url)):
                if process.poll() is not None:
                    raise EngineDied(f"the server did not start: {keyed(self._why(process.returncode))}")
                if time.monotonic() > deadline:
                    raise EngineDied(f"the server did not start: {url} was not ready in time for the limit of key 'timeout_s'")
                time.sleep(0.25)

    def close(self) -> None:
        """Stop the servers with all their processes, and wait until their GPU memory is free."""
        self._stop()
        atexit.unregister(self._stop)
        wait_for_memory(self._exam, self._memory_before)

    def _stop(self) -> None:
        tree = {*self._tree, *self._descendants()}
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
        for process in self._processes:
            if process.poll() is None:  # what it hangs in, for whoever reads the log: Python's fault handler writes it
                process.send_signal(signal.SIGABRT)
        _, alive = psutil.wait_procs(tree, timeout=1)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=STOP_S)
        for process in self._processes:
            process.wait()
        self._processes.clear()
        for block in self._ports:
            block.close()

    def _descendants(self) -> list[psutil.Process]:
        found = []
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        return found


def entry_point(exam: Exam) -> list[str]:
    """The module that a server starts with, and its first words. vLLM's own is one API server whatever `api_server_count`
    says; several are what `vllm serve` starts."""
    return ["workbook.engines.serve", "serve"] if "api_server_count" in exam.engine_args else ["vllm.entrypoints.openai.api_server"]


def arguments(given: dict[str, Any]) -> list[str]:
    """Engine arguments as words of vLLM's command line."""
    words = []
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "disable_log_stats":  # the one switch without an opposite
            words += [flag] if value else []
        elif isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            words += [flag, *(json.dumps(v) if isinstance(v, dict) else str(v) for v in value)]
        elif value is not None:
            words += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def placement(exam: Exam, index: int) -> dict[str, str]:
    """Where the replica of that index runs: the environment that gives it its GPUs, or its CPU cores."""
    each = platforms.workers(exam)
    if gpus := platforms.gpus():
        first = index * each % platforms.accelerators_used(exam)
        return {"CUDA_VISIBLE_DEVICES": ",".join(str(g.index) for g in gpus[first:first + each])}
    if "VLLM_CPU_OMP_THREADS_BIND" in exam.env:
        return {}
    shares = platforms.shares(exam.replicas * each)
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(shares[index * each:(index + 1) * each])}


def _listens(process: subprocess.Popen, url: str) -> bool:
    """Whether it is this process that listens there, and not another that has taken the port in the meantime."""
    try:
        connections = psutil.Process(process.pid).net_connections("tcp4")
    except psutil.Error:
        return False
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == int(url.rpartition(":")[2]) for c in connections)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _prepare() -> None:
    """In the new process: `orphans.stop_with_parent`, and leave no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    orphans.stop_with_parent()
