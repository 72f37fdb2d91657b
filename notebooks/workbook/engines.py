"""Engines: the ways vLLM is driven. The only module that imports vllm, and only when one is started."""
import contextlib
import dataclasses
import difflib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from workbook import platforms
from workbook.errors import BadInput
from workbook.params import Exam

GPU_MEMORY_SLACK = 512 << 20
"""Bytes above the level before the start that count as free again: CUDA contexts come and go."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One sample of one question, to be answered in at most `max_tokens` tokens."""
    prompt_id: int
    sample: int
    token_ids: list[int]
    max_tokens: int
    seed: int | None


@dataclasses.dataclass(frozen=True)
class Answer:
    """A finished request. Times are seconds of `time.monotonic`, taken by the engine; None if it gave none."""
    prompt_id: int
    sample: int
    text: str
    token_ids: list[int]
    prompt_tokens: int
    max_tokens: int
    finish_reason: str
    queued: float | None
    scheduled: float | None
    first_token: float | None
    last_token: float | None


class EngineDied(RuntimeError):
    """A process of the engine ended while it was needed."""


class OfflineEngine:
    """`vllm.LLM` in this process's tree.

    Args:
        exam: engine arguments, environment and sampling.
        model: folder of the weights.
        log: file that gets everything the engine prints.
        in_process: without a GPU, run the engine core in this process and not in one of its own. It starts
            in half the time, for work that is not timed. (On a GPU only the end of a process frees its memory.)

    Attributes:
        load_s: seconds from the start of the import to an engine that answers.
    """

    def __init__(self, exam: Exam, model: Path, log: Path, *, in_process: bool = False):
        self._exam = exam
        in_process = in_process and not platforms.gpus()
        self._memory_before = platforms.gpu_memory_used(exam)
        os.environ.update(environment(exam, in_process))
        began = time.monotonic()
        self._log_path, self._log = log, log.open("a", buffering=1)
        self._log_start = log.stat().st_size
        before = set(psutil.Process().children())
        with _printing_to(self._log):
            try:
                from vllm import LLM, EngineArgs, SamplingParams
            except ImportError as error:
                raise BadInput(f"vllm cannot be imported ({error}); expected the packages of requirements.txt or requirements-cpu.txt") from error
            self._sampling_params = SamplingParams
            _check_names(exam.engine_args, [f.name for f in dataclasses.fields(EngineArgs)])
            try:
                self._llm = LLM(model=str(model), **engine_args(exam))
            except Exception as error:
                raise EngineDied(f"the engine did not start: {last_error(log, self._log_start) or error}") from error
        self._processes = [p for p in psutil.Process().children() if p not in before]
        self.load_s = time.monotonic() - began

    def generate(self, requests: list[Request], bar: Callable | bool = False) -> list[Answer]:
        """Answer all requests, submitted at once; same order. `bar` is a tqdm class, or False for none.

        Raises:
            EngineDied: a process of the engine ended, with the last error in its log.
        """
        params = [self._sampling(r) for r in requests]
        with self._alive():
            outputs = self._llm.generate([{"prompt_token_ids": r.token_ids} for r in requests], params, use_tqdm=bar)
        return [_answer(r, o) for r, o in zip(requests, outputs, strict=True)]

    def logprobs(self, sequences: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        """Log-probabilities (natural) of given answers by teacher forcing.

        Args:
            sequences: (prompt token ids, answer token ids) of each.

        Returns:
            For each sequence one number per answer token.
        """
        params = self._sampling_params(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        with self._alive():
            outputs = self._llm.generate([{"prompt_token_ids": p + a} for p, a in sequences], params, use_tqdm=False)
        return [[entry[token].logprob for token, entry in zip(a, o.prompt_logprobs[len(p):], strict=True)]
                for (p, a), o in zip(sequences, outputs, strict=True)]

    def counters(self) -> dict[str, float]:
        """The engine's own counters by name, summed over their labels."""
        totals: dict[str, float] = {}
        for metric in self._llm.get_metrics():
            if isinstance(getattr(metric, "value", None), int | float):
                totals[metric.name] = totals.get(metric.name, 0.0) + metric.value
        return totals

    def window(self) -> int:
        """The most tokens a sequence may have, prompt and answer together."""
        return self._llm.llm_engine.vllm_config.model_config.max_model_len

    def attention_backend(self) -> str:
        """Name of the attention back end the engine was given; `auto` where vLLM chose."""
        config = self._llm.llm_engine.vllm_config
        backend = getattr(getattr(config, "attention_config", None), "backend", None)
        return getattr(backend, "name", None) or "auto"

    def close(self) -> None:
        """Stop the engine's processes and wait until its GPU memory is free."""
        with _printing_to(self._log):
            self._llm.llm_engine.engine_core.shutdown()
        del self._llm  # the log stays open: vLLM's logger keeps writing to it until the process ends
        deadline = time.monotonic() + 60
        while self._memory_above():
            if time.monotonic() > deadline:
                raise RuntimeError("the engine's GPU memory is still taken 60 s after it was stopped")
            time.sleep(0.2)

    def _memory_above(self) -> bool:
        used = platforms.gpu_memory_used(self._exam)
        return any(used[index] > before + GPU_MEMORY_SLACK for index, before in self._memory_before.items())

    @contextlib.contextmanager
    def _alive(self):
        """Raise EngineDied in the main thread as soon as a process of the engine ends.

        vLLM's synchronous client (seen with 0.32) waits for ever for the answers of a core that was killed:
        its output thread leaves without a word. A signal is what wakes a thread that waits for a queue.
        """
        died, left = [], threading.Event()

        def watch() -> None:
            while not left.wait(0.5):
                died.extend(p for p in self._processes if not _is_alive(p))
                if died:
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                    return
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        except BaseException as error:
            if died or type(error).__name__ == "EngineDeadError":
                cause = last_error(self._log_path, self._log_start) or "its process ended without a word (killed, or out of memory)"
                raise EngineDied(f"the engine died: {cause}") from None
            raise
        finally:
            left.set()
            watcher.join()

    def _sampling(self, request: Request):
        e = self._exam
        return self._sampling_params(n=1, temperature=e.temperature, top_p=e.top_p, top_k=e.top_k, seed=request.seed,
                                     max_tokens=request.max_tokens, ignore_eos=e.ignore_eos)


def start(exam: Exam, model: Path, log: Path, *, in_process: bool = False) -> OfflineEngine:
    """Start the exam's engine; see `OfflineEngine`."""
    return OfflineEngine(exam, model, log, in_process=in_process)


def engine_args(exam: Exam) -> dict[str, Any]:
    """Arguments the engine is started with; the exam's own win."""
    # vLLM drops the per-request times, and its FLOP and byte counters, unless statistics are on.
    # Its prefix cache, on by default, would feed a repetition from the one before.
    found = {"disable_log_stats": False, "enable_mfu_metrics": True, "seed": exam.seed, "enable_prefix_caching": False}
    if not platforms.gpus() and exam.temperature > 0:
        # A seeded request whose prompt is prefilled in parts kills the CPU worker of vLLM 0.32
        # ("CPU Generator does not use offset").
        found["enable_chunked_prefill"] = False
    return found | exam.engine_args


def environment(exam: Exam, in_process: bool = False) -> dict[str, str]:
    """Environment variables the engine is started with; the exam's own win."""
    found = {
        # fork after torch has used OpenMP or CUDA crashes the engine core.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1",
        "VLLM_NO_USAGE_STATS": "1",
        "NO_COLOR": "1",  # escape codes do not belong in engine.log
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not platforms.gpus():
        # vLLM keeps a core free by default; on two cores that is half of the speed.
        found["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, platforms.cores()))
        # Intel's OpenMP wakes its threads faster than GNU's (vLLM's CPU guide): it must be there before torch.
        openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
        if openmp.exists():
            found["LD_PRELOAD"] = ":".join(filter(None, [str(openmp), os.environ.get("LD_PRELOAD")]))
    return found | exam.env


def _answer(request: Request, output) -> Answer:
    completion, times = output.outputs[0], output.metrics

    def at(name: str) -> float | None:
        return getattr(times, name, 0.0) or None
    return Answer(request.prompt_id, request.sample, completion.text, list(completion.token_ids), len(output.prompt_token_ids),
                  request.max_tokens, completion.finish_reason or "none", at("queued_ts"), at("scheduled_ts"), at("first_token_ts"), at("last_token_ts"))


@contextlib.contextmanager
def _printing_to(log):
    """Send what this process and those it starts print into `log`.

    The file descriptors are what child processes inherit; `sys.stdout` is what vLLM's logger in this
    process keeps from the moment it is imported.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = {fd: os.dup(fd) for fd in (1, 2)}
    try:
        for fd in saved:
            os.dup2(log.fileno(), fd)
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield
    finally:
        for fd, copy in saved.items():
            os.dup2(copy, fd)
            os.close(copy)


def _check_names(given: dict[str, Any], known: list[str]) -> None:
    for name in given:
        if name not in known or name == "model":
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = "use key 'model'" if name == "model" else f"expected an argument of vLLM's engine{f', such as {nearest[0]!r}' if nearest else ''}"
            raise BadInput(f"key 'engine_args' has {name!r} (value {given[name]!r}); {hint}")


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def last_error(log: Path, start: int = 0) -> str:
    """The last error a process of the engine printed from byte `start` of its log on, or an empty text: why it
    died, if it had time to say."""
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines() if log.exists() else []
    # Some errors only say that another one was logged before them.
    found = (re.search(r"\b(\w+(?:Error|Exception): .+)", line) for line in reversed(lines) if "root cause" not in line)
    return next((m.group(1) for m in found if m), "")
