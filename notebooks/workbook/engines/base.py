"""What all engines that run vLLM here share: arguments, environment, log, and the wait for free memory."""
import contextlib
import dataclasses
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from workbook import models, platforms
from workbook.errors import BadInput
from workbook.params import Exam

GPU_MEMORY_SLACK = 512 << 20
"""Bytes above the level before the start that count as free again: CUDA contexts come and go."""
GPU_MEMORY_WAIT_S = 60


@dataclasses.dataclass(slots=True)
class Request:
    """One sample of one question, to be answered in at most `max_tokens` tokens. The load sets `arrival` to when
    it is due, seconds of `time.monotonic`."""
    prompt_id: int
    sample: int
    token_ids: list[int]
    max_tokens: int
    seed: int | None
    arrival: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A finished request.

    Attributes:
        finish_reason: stop or length; anything else is a failure, and says which.
        queued, scheduled, first_token, last_token: seconds of `time.monotonic`, taken by the engine where it is in
            this process's tree, by the client where it is reached over HTTP; None if there is none.
        replica: which data-parallel engine or server answered.
        arrival: when the request was due; None where all were handed over at once.
        token_ids: empty where a server does not return them; `output_tokens` counts them all the same.
        chunk_times: when a streaming client got tokens.
    """
    prompt_id: int
    sample: int
    text: str
    token_ids: Sequence[int]
    output_tokens: int
    prompt_tokens: int
    max_tokens: int
    finish_reason: str
    queued: float | None
    scheduled: float | None
    first_token: float | None
    last_token: float | None
    replica: int = 0
    arrival: float | None = None
    chunk_times: Sequence[float] = ()


class EngineDied(RuntimeError):
    """A process of the engine ended while it was needed."""


class LocalEngine:
    """An engine whose processes are in this process's tree.

    Attributes:
        load_s: seconds from the start of the import to an engine that answers.
        metrics_urls: servers that say how full their KV cache is: none.
        serves: the exam's model.
    """

    metrics_urls = ()
    _kv_cache_peak: float | None = None

    def __init__(self, exam: Exam, model: Path, log: Path, in_process: bool = False, of_server: bool = False):
        self.serves, self._memory_before = exam.model, platforms.gpu_memory_used(exam)
        os.environ.update(environment(exam, in_process))
        began = time.monotonic()
        self._log_path, self._log = log, log.open("a", buffering=1)
        self._log_start = log.stat().st_size
        with printing_to(self._log):
            try:
                from vllm import EngineArgs, SamplingParams
            except ImportError as error:
                raise BadInput(f"vllm cannot be imported ({error}); expected the packages of requirements.txt or requirements-cpu.txt") from error
            self._sampling_params = SamplingParams
            if of_server:
                known = [f.name for f in dataclasses.fields(EngineArgs)]
                exam = exam.model_copy(update={"engine_args": {k: v for k, v in exam.engine_args.items() if k in (*known, "lora_modules")}})
            self._exam = exam
            self._lora = _lora_request(exam)
            try:
                self._start({"model": str(model)} | engine_args(exam))
            except Exception as error:
                raise EngineDied(f"the engine did not start: {keyed(last_error(log, self._log_start) or refusal(error, exam.engine_args))}") from error
        self.load_s = time.monotonic() - began

    def _start(self, arguments: dict[str, Any]) -> None:
        """Start vLLM with the arguments and set `self._config`, its configuration."""
        raise NotImplementedError

    def counters(self) -> dict[str, float]:
        """The engine's own counters by name, summed over their labels."""
        from vllm.v1.metrics.reader import get_metrics_snapshot
        totals: dict[str, float] = {}
        for metric in get_metrics_snapshot():
            if isinstance(getattr(metric, "value", None), int | float):
                totals[metric.name] = totals.get(metric.name, 0.0) + metric.value
        return totals

    def kv_cache_peak(self) -> float | None:
        """The largest share of the KV cache in use at the end of a step, in any of the engine cores, since this was
        last asked, in per cent; None without steps or statistics."""
        peak, self._kv_cache_peak = self._kv_cache_peak, None
        return peak

    def _stat_logger(self):
        """A class of vLLM's loggers that hands over what each step of an engine core says of itself."""
        from vllm.v1.metrics.loggers import StatLoggerBase
        record_step = self._record_step

        class Recorder(StatLoggerBase):
            def __init__(self, vllm_config, engine_index: int = 0):
                pass

            def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx: int = 0) -> None:
                record_step(scheduler_stats, iteration_stats, engine_idx)

            def log_engine_initialized(self) -> None:
                pass
        return Recorder

    def _record_step(self, scheduler_stats, iteration_stats, core: int) -> None:
        """Note what vLLM's statistics of one step of an engine core say."""
        share = getattr(scheduler_stats, "kv_cache_usage", None)
        if share is not None:
            self._kv_cache_peak = max(100 * share, self._kv_cache_peak or 0.0)

    def window(self) -> int:
        """The most tokens a sequence may have, prompt and answer together."""
        return self._config.model_config.max_model_len

    def slots(self) -> int:
        """Requests that may run at once, in all engine cores together. vLLM's default depends on the machine and on how it is used."""
        return self._config.scheduler_config.max_num_seqs * self._config.parallel_config.data_parallel_size

    def attention_backend(self) -> str:
        """The attention back end, as `chosen_attention`."""
        return chosen_attention(self._log_path, self._log_start)

    def _died(self, fallback: str) -> EngineDied:
        return EngineDied(f"the engine died: {last_error(self._log_path, self._log_start) or fallback}")

    def _sampling(self, request: Request, **more: Any):
        e = self._exam
        return self._sampling_params(n=1, temperature=e.temperature, top_p=e.top_p, top_k=e.top_k, seed=request.seed,
                                     max_tokens=request.max_tokens, ignore_eos=e.ignore_eos, **more)


def wait_for_memory(exam: Exam, before: dict[int, int]) -> None:
    """Wait until the exam's GPUs have as much memory in use as `before` the start: the next engine will want it."""
    deadline = time.monotonic() + GPU_MEMORY_WAIT_S
    while any(now > before[gpu] + GPU_MEMORY_SLACK for gpu, now in platforms.gpu_memory_used(exam).items()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the engine's GPU memory is still taken {GPU_MEMORY_WAIT_S} s after it was stopped")
        time.sleep(0.2)


def engine_args(exam: Exam) -> dict[str, Any]:
    """Arguments the engine is started with; the exam's own win."""
    # vLLM drops the per-request times, and its FLOP and byte counters, unless statistics are on.
    # Its prefix cache, on by default, would feed a repetition from the one before.
    found = {"disable_log_stats": False, "enable_mfu_metrics": True, "seed": exam.seed, "enable_prefix_caching": False}
    if not platforms.gpus() and exam.temperature > 0:
        # A seeded request whose prompt is prefilled in parts kills the CPU worker of vLLM 0.32
        # ("CPU Generator does not use offset").
        found["enable_chunked_prefill"] = False
    if (dtype := platforms.matrix_dtype()) != "bfloat16":
        found["dtype"] = dtype
    if exam.weights == "dummy":
        found["load_format"] = "dummy"
    if adapter := models.adapter(exam):
        # Only the layers that the adapter has: elsewhere vLLM would carry empty ones along, and its CPU build
        # cannot give prompt log-probabilities through one on the output layer.
        found |= {"enable_lora": True, "max_lora_rank": adapter.rank, "lora_target_modules": adapter.targets or None}
    return found | {k: v for k, v in exam.engine_args.items() if k != "lora_modules"}


def environment(exam: Exam, in_process: bool = False) -> dict[str, str]:
    """Environment variables the engine is started with; the exam's own win."""
    found = {
        # fork after torch has used OpenMP or CUDA crashes the engine core.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1",
        "VLLM_NO_USAGE_STATS": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # NVML's, so that what is watched is what runs
        "NO_COLOR": "1",  # escape codes do not belong in engine.log
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not platforms.gpus():
        # vLLM keeps a core free by default; on two cores that is half of the speed.
        found["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(platforms.shares(platforms.workers(exam)))
        # Intel's OpenMP wakes its threads faster than GNU's (vLLM's CPU guide): it must be there before torch.
        openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
        if openmp.exists():
            found["LD_PRELOAD"] = ":".join(filter(None, [str(openmp), os.environ.get("LD_PRELOAD")]))
    return found | exam.env


def answer(request: Request, output, replica: int = 0) -> Answer:
    """What vLLM's `RequestOutput` says of a finished request."""
    completion, times = output.outputs[0], output.metrics

    def at(name: str) -> float | None:
        return getattr(times, name, 0.0) or None
    ids = list(completion.token_ids)
    return Answer(request.prompt_id, request.sample, completion.text, ids, len(ids), len(output.prompt_token_ids), request.max_tokens,
                  completion.finish_reason or "none", at("queued_ts"), at("scheduled_ts"), at("first_token_ts"), at("last_token_ts"), replica, request.arrival)


@contextlib.contextmanager
def printing_to(log):
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


def _lora_request(exam: Exam):
    """The adapter that every request asks for, or None."""
    if not (adapter := models.adapter(exam)):
        return None
    from vllm.lora.request import LoRARequest
    return LoRARequest(adapter.name, 1, str(adapter.folder))


def last_error(log: Path, start: int = 0) -> str:
    """The last error a process of the engine printed from byte `start` of its log on, or an empty text: why it
    died, if it had time to say."""
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines() if log.exists() else []
    # Some errors only say that another one was logged before them, and some warnings name one that never came.
    lines = [line for line in lines if "root cause" not in line and not re.search(r"\b(?:INFO|WARNING) \d\d-\d\d ", line)]
    found = (re.search(r"\b(\w+(?:Error|Exception): .+|error: (?:unrecognized|argument) .+)", line) for line in reversed(lines))
    return next((m.group(1) for m in found if m), "")


def refusal(error: Exception, engine_args: Mapping[str, Any]) -> str:
    """What an engine says that did not begin to start, in one line, with the arguments that it may mean: of pydantic's errors each with its key."""
    if isinstance(error, pydantic.ValidationError):
        found = [(".".join(map(str, e["loc"][:1])), e) for e in error.errors()]
        return "; ".join(dict.fromkeys(f"engine_args.{key} is {e['input']!r}: {e['msg']}" if key in engine_args else ": ".join(filter(None, [key, e["msg"]])) for key, e in found))
    return f"{type(error).__name__}: {' '.join(str(error).split())} (engine_args: {', '.join(f'{key} {value!r}' for key, value in engine_args.items()) or 'none'})"


def keyed(why: str) -> str:
    """vLLM's advice of its own command line, and where that is said here."""
    return why + ("; here these are keys: engine_args.gpu_memory_utilization, a share of the memory, or engine_args.kv_cache_memory_bytes" if re.search(r"gpu[-_]memory[-_]utilization", why) else "")


def chosen_attention(log: Path, start: int = 0) -> str:
    """The attention back end that the processes of an engine named from byte `start` of its log on, with the version of
    FlashAttention where it is one: vLLM chooses both by the GPU, the model and what is installed, whatever it was asked for.
    `unknown` where none is named, as on a CPU, which has one."""
    said = log.read_bytes()[start:].decode(errors="replace") if log.exists() else ""
    # It chose one, or took the exam's; other kernels have back ends too.
    found = [*re.findall(r"Using ([A-Z0-9_]+) attention backend", said), *re.findall(r"Using AttentionBackendEnum\.([A-Z0-9_]+) backend", said),
             *(f"FlashAttention {version}" for version in re.findall(r"Using FlashAttention version (\d+)", said))]
    return ", ".join(dict.fromkeys(found)) or "unknown"
