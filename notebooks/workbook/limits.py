"""The limit on a notebook, as its kernel sees it: the load gives up in time to keep what it has measured."""
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

DEADLINE = "GOLDBOOK_DEADLINE"
"""Variable by which the runner tells a kernel when it will be stopped, seconds of `time.monotonic`."""
KEEP_S = 20.0
"""Seconds between the load's end and the notebook's: to write down 100,000 requests takes about five."""
KEEP_SHARE = 0.1
"""At most this part of a short limit is set aside for it."""
UP = "time is up: the load was not over in time for the limit of key 'timeout_s'"


def deadline(timeout_s: float) -> float:
    """When the load has to end, seconds of `time.monotonic`: some time before the runner stops the notebook. Where
    none watches, as in JupyterLab, the limit counts from now."""
    stopped = float(os.environ.get(DEADLINE) or time.monotonic() + timeout_s)
    return stopped - min(KEEP_S, KEEP_SHARE * timeout_s)


@contextlib.contextmanager
def told(stopped: float) -> Iterator[None]:
    """Tell the kernels started here when they will be stopped, seconds of `time.monotonic`."""
    os.environ[DEADLINE] = str(stopped)
    try:
        yield
    finally:
        del os.environ[DEADLINE]


@contextlib.contextmanager
def interrupting(at: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread at a time of `time.monotonic`, even out of a call that blocks it: a
    signal is what wakes a thread that waits."""
    up, over, one = threading.Event(), threading.Event(), threading.Lock()

    def interrupt() -> None:
        with one:  # once it is over, the signal would meet whatever comes next
            if not over.is_set():
                up.set()
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    timer = threading.Timer(min(max(0.0, at - time.monotonic()), threading.TIMEOUT_MAX), interrupt)
    timer.daemon = True
    try:
        try:
            timer.start()  # of a time that is past the signal comes before it returns
            yield
        finally:
            with one:
                over.set()
            timer.cancel()
    except KeyboardInterrupt:
        if up.is_set():
            raise TimeoutError(UP) from None
        raise
