"""The async engine: `AsyncLLM`, which sends each request by itself and can run data parallel."""
import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from workbook.engines.base import Answer, LocalEngine, Request, answer, printing_to, wait_for_memory


class AsyncEngine(LocalEngine):
    """`AsyncLLM` on an event loop in a thread of its own; engine cores are processes that it reaches over ZMQ.

    With `data_parallel_size` there are several, and each request goes to the least loaded. Outputs are asked
    for once, at the end (`FINAL_ONLY`): a client that takes every token as it comes costs the engine more than
    half of a fast GPU. The engine's own statistics still say when the first token came.
    """

    def _start(self, arguments: dict[str, Any]) -> None:
        from vllm import AsyncEngineArgs
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.async_llm import AsyncLLM
        self._final_only = RequestOutputKind.FINAL_ONLY
        self._replica_of: dict[str, asyncio.Future[int]] = {}
        self._submitted = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-loop", daemon=True)
        self._thread.start()

        async def create():  # on the loop, so that the engine's output task runs there
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[self._stat_logger()])
        self._llm = self._run(create())
        self._config = self._llm.vllm_config

    def _record_step(self, scheduler_stats, iteration_stats, core: int) -> None:
        """Note also which engine core finished which request."""
        super()._record_step(scheduler_stats, iteration_stats, core)
        for finished in iteration_stats.finished_requests if iteration_stats else ():
            if found := self._replica_of.pop(finished.request_id, None):
                found.set_result(core)

    def run(self, work: Callable[[], Coroutine], at_once: int = 0) -> Any:
        """Run a load on the engine's loop, however many of its requests are due at once.

        Raises:
            EngineDied: a process of the engine ended, with the last error in its log.
        """
        from vllm.v1.engine.exceptions import EngineDeadError
        try:
            return self._run(work())
        except BaseException as error:
            if isinstance(error, EngineDeadError) or isinstance(error, BaseExceptionGroup) and error.subgroup(EngineDeadError):
                raise self._died("its process ended without a word (killed, or out of memory)") from None
            raise

    async def answer(self, request: Request) -> Answer:
        """Answer one request; called in a load that `run` runs."""
        self._submitted += 1
        name = f"{request.prompt_id}-{request.sample}-{self._submitted}"
        replica = self._replica_of[name] = self._loop.create_future()
        outputs = self._llm.generate({"prompt_token_ids": request.token_ids}, self._sampling(request, output_kind=self._final_only), name, lora_request=self._lora)
        async for output in outputs:
            final = output
        return answer(request, final, await replica)  # the statistics follow the output, in the same turn of the loop

    def close(self) -> None:
        """Stop the engine's processes and wait until its GPU memory is free."""
        async def stop() -> None:
            self._llm.shutdown()
        with printing_to(self._log):
            self._run(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        del self._llm
        wait_for_memory(self._exam, self._memory_before)

    def _run(self, work: Coroutine) -> Any:
        running = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return running.result()
        except BaseException:  # an interrupted load must not go on behind our back
            running.cancel()
            raise
