"""The offline engine: `vllm.LLM`, all requests handed over at once."""
import contextlib
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from workbook import platforms
from workbook.engines.base import Answer, LocalEngine, Request, answer, printing_to, wait_for_memory
from workbook.params import Exam


class OfflineEngine(LocalEngine):
    """`vllm.LLM` in this process's tree.

    Args:
        in_process: without a GPU, run the engine core in this process and not in one of its own. It starts
            in half the time, for work that is not timed. (On a GPU only the end of a process frees its memory.)
        of_server: the engine arguments are a server's, which has checked them; those that are none of its engine's are left out.
    """

    def __init__(self, exam: Exam, model: Path, log: Path, *, in_process: bool = False, of_server: bool = False):
        super().__init__(exam, model, log, in_process and not platforms.gpus(), of_server)

    def _start(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM
        before = set(psutil.Process().children())
        # Its bar for the weights would be a notebook's output where the engine is in the kernel's process, and not go to the log.
        self._llm = LLM(**({"use_tqdm_on_load": False} | arguments))
        self._config = self._llm.llm_engine.vllm_config
        if manager := self._llm.llm_engine.logger_manager:  # none under disable_log_stats; `LLM` takes no loggers itself
            manager.stat_loggers.append(self._stat_logger()(self._config))
        self._processes = [p for p in psutil.Process().children() if p not in before]

    def generate(self, requests: list[Request], bar: Callable | bool = False) -> list[Answer]:
        """Answer all requests, submitted at once; same order. `bar` is a tqdm class, or False for none.

        Raises:
            EngineDied: a process of the engine ended, with the last error in its log.
        """
        params = [self._sampling(r) for r in requests]
        with self._alive():
            outputs = self._llm.generate([{"prompt_token_ids": r.token_ids} for r in requests], params, use_tqdm=bar, lora_request=self._lora)
        return [answer(r, o) for r, o in zip(requests, outputs, strict=True)]

    def logprobs(self, sequences: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        """Log-probabilities (natural) of given answers by teacher forcing.

        Args:
            sequences: (prompt token ids, answer token ids) of each.

        Returns:
            For each sequence one number per answer token.
        """
        params = self._sampling_params(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        with self._alive():
            outputs = self._llm.generate([{"prompt_token_ids": p + a} for p, a in sequences], params, use_tqdm=False, lora_request=self._lora)
        return [[entry[token].logprob for token, entry in zip(a, o.prompt_logprobs[len(p):], strict=True)]
                for (p, a), o in zip(sequences, outputs, strict=True)]

    def close(self) -> None:
        """Stop the engine's processes and wait until its GPU memory is free."""
        with printing_to(self._log):
            self._llm.llm_engine.engine_core.shutdown()
        del self._llm  # the log stays open: vLLM's logger keeps writing to it until the process ends
        wait_for_memory(self._exam, self._memory_before)

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
                raise self._died("its process ended without a word (killed, or out of memory)") from None
            raise
        finally:
            left.set()
            watcher.join()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
