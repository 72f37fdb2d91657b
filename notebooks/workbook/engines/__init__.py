"""Engines: the ways vLLM is driven, behind one small set of methods.

Every engine has `counters`, `kv_cache_peak`, `metrics_urls`, `window`, `attention_backend`, `load_s`, `serves` and `close`. The offline one answers a batch
(`generate`); the others answer request by request (`answer`) in a load that they run on their event loop (`run`).
Nothing outside this package imports vllm, and here only the start of an engine does.
"""
import sys
from pathlib import Path
from typing import Any

from workbook import models, orphans, platforms
from workbook.engines import arguments
from workbook.engines.base import Answer, EngineDied, Request
from workbook.params import Exam

__all__ = ["Answer", "EngineDied", "Request", "reader_args", "start", "start_reader"]


def start(exam: Exam, model: Path, log: Path):
    """Start the exam's engine, which in a kernel ends with it, whoever started that: plain papermill and JupyterLab too.

    Args:
        exam: engine, its arguments and environment, and the sampling.
        model: folder of the weights.
        log: file that gets everything the engine prints.

    Raises:
        BadInput: an engine argument that vLLM does not know, vllm is not installed, or the endpoint does not answer.
        EngineDied: it did not start; the message is the last error in its log.
    """
    arguments.require(exam)
    _end_with_kernel()
    if exam.engine == "endpoint":
        from workbook.engines.http import HttpEngine
        return HttpEngine(exam, [exam.endpoint])
    if exam.engine == "server":
        from workbook.engines.server import ServerEngine
        return ServerEngine(exam, model, log)
    if exam.engine == "async":
        from workbook.engines.asynchronous import AsyncEngine
        return AsyncEngine(exam, model, log)
    from workbook.engines.offline import OfflineEngine
    return OfflineEngine(exam, model, log)


def start_reader(exam: Exam, model: Path, log: Path):
    """Start an engine that reads given texts (`logprobs`): the exam's own, as one replica and without a draft
    model, since neither has to do with what the weights say. Nothing is timed, so without a GPU it shares this
    process, which starts in half the time. Raises as `start`."""
    from workbook.engines.offline import OfflineEngine
    _end_with_kernel()
    own = exam.model_copy(update={"engine": "offline", "engine_args": reader_args(exam, model)})
    return OfflineEngine(own, model, log, in_process=True, of_server=exam.engine == "server")


def _end_with_kernel() -> None:
    kernels = sys.modules.get("ipykernel.kernelapp")
    if kernels and kernels.IPKernelApp.initialized():  # a script of somebody's may share its process group with other programs
        orphans.end_with_this_process()


def reader_args(exam: Exam, model: Path) -> dict[str, Any]:
    """The engine arguments of the exam's reader: its own, without data parallel and draft model.

    Under data parallel vLLM spreads the experts of a mixture over the GPUs of all replicas (`FusedMoEParallelConfig.make`), and
    those of one may not hold them. So there tensor parallel takes all of them, if the machine has them and the heads allow it.
    """
    own = {k: v for k, v in exam.engine_args.items() if not k.startswith(("data_parallel", "speculative"))}
    found, workers = models.facts(model), platforms.workers(exam)
    size = exam.engine_args.get("tensor_parallel_size", 1) * exam.engine_args.get("data_parallel_size", 1)
    if found.experts and workers <= len(platforms.gpus()) and not models.undivided(found, size):
        own |= {"tensor_parallel_size": size}
    return own
