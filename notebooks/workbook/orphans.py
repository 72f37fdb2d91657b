"""What a process has started ends with it, however it ends."""
import ctypes
import os
import signal
import subprocess
import threading
from functools import cache

PR_SET_PDEATHSIG = 1
"""Of `linux/prctl.h`."""

# Waits at a pipe that the kernel alone holds open. Who is interrupted is the kernel.
GUARD = "trap '' INT; read -r _; kill -KILL 0"


@cache
def end_with_this_process() -> None:
    """Once: have a shell wait for this process's end and then kill its process group, of which it must be the leader, as a kernel is.

    A kernel whose runner was killed leaves at once (ipykernel looks for its parent every second), and vLLM's engine core, which waits for
    requests and not for its parent, would keep the GPU's memory for ever. A parent-death signal is no help: vLLM starts it, and not we.
    The shell is of the group that it kills, whose number can be nobody else's as long.
    """
    if os.getpgrp() != os.getpid():
        return
    reading, _ = os.pipe()  # the other end is closed by the end of this process alone, and no program that it starts inherits it
    guard = subprocess.Popen(["/bin/sh", "-c", GUARD], stdin=reading, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(reading)
    # A kernel that ends in order terminates its children and waits until they are gone, which one that nobody waits for never is:
    # it would be killed, before its own `atexit`.
    threading.Thread(target=guard.wait, daemon=True).start()


def stop_with_parent() -> None:
    """In a process that has just been forked: be told to stop (SIGTERM) when the one that started it ends, even if that was killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
