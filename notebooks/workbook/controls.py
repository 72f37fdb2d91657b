"""Controls: fixed pieces of work that no change to the engine can touch.

If they run at another speed than when the golden was recorded, the machine changed, and a change of the
engine's speed says nothing. Two run before the engine is started, in a process of their own: the kernel must use
neither OpenMP nor CUDA until then. Small ones run beside the load, between its passes: a neighbour on a shared
machine comes and goes in less time than a session takes. Where a piece of the machine was timed at both times, the
time beside the load decides.
"""
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from workbook import paths, platforms

SAMPLES = 5
COPY_BYTES = 64 << 20
"""What is copied between the passes: more than the caches of a server's processor hold for a core."""
PRODUCT_SIDE = 1536
"""Of the matrices that are multiplied between the passes, on a CPU: a product takes a few hundredths of a second on two cores."""
SPIN_S = 0.2
"""How long numpy's threads may look for more to do before they sleep: a tenth of a second, and the next pass is not to share its cores with them."""
TOLERANCE = 0.10
"""How far outside the golden's sessions a control may be, as a fraction, with speeds still comparable."""

OTHERS_PCT = 5
"""Of the cores, what processes other than the load's may take while a CPU generates, with speeds still comparable: as
much as the smallest loss that a gate looks for."""


def measure() -> dict[str, list[float]]:
    """Seconds of each control, `SAMPLES` of each: `host_s` (a single-thread Python loop) and `device_s`
    (a copy and a matrix product on the accelerator, or on all cores)."""
    return in_own_process("workbook.controls")


def beside() -> dict[str, float]:
    """Seconds of the controls that run between the passes of a load, one of each, while the engine waits:
    `host_beside_s` (the Python loop) and `copy_beside_s` (a copy in the host's memory) in the caller's thread, and where a
    CPU is the device `device_beside_s` (a matrix product on all cores); half a second in all.

    Not before an engine is started: numpy's threads do not survive a fork."""
    source, target = np.ones(COPY_BYTES, dtype=np.uint8), np.ones(COPY_BYTES, dtype=np.uint8)  # written: the pages are there
    found = {"host_beside_s": _seconds(_host), "copy_beside_s": min(_seconds(lambda: np.copyto(target, source)) for _ in range(3))}
    if not platforms.gpus():
        a = np.random.default_rng(0).random((PRODUCT_SIDE, PRODUCT_SIDE), dtype=np.float32)
        a @ a  # its threads are awake
        found["device_beside_s"] = statistics.median(_seconds(lambda: a @ a) for _ in range(3))
        time.sleep(SPIN_S)
    return found


def deciding(names: Iterable[str]) -> list[str]:
    """Those of the controls that say whether speeds compare: `host_s` and `device_s`, a second's worth of before the
    load, only where there is no `host_beside_s` and `device_beside_s`, which were timed all through it."""
    known = set(names)
    return [name for name in names if name.removesuffix("_s") + "_beside_s" not in known]


def move(now: float, known: Sequence[float]) -> float:
    """How far a control's time lies outside those that are known, as a fraction of the nearest: 0 among them, positive
    where it is slower than the slowest, negative where faster than the fastest."""
    return now / min(max(now, min(known)), max(known)) - 1


def in_own_process(module: str) -> Any:
    """Run `python -m module` and return what its last line says, as JSON.

    Raises:
        RuntimeError: it failed, with the last line of its error.
    """
    job = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, env=paths.child_environment())
    if job.returncode:
        raise RuntimeError(f"{module} failed: {job.stderr.strip().splitlines()[-1:]}")
    return json.loads(job.stdout.splitlines()[-1])


def _host() -> None:
    total = 0
    for i in range(2_000_000):
        total += i & 7


def _device():
    """A function that does the device's work once and waits for it."""
    import torch
    on_gpu = torch.cuda.is_available()
    device, side = ("cuda", 8192) if on_gpu else ("cpu", 1536)
    torch.manual_seed(0)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    wide = torch.empty((4 if on_gpu else 1) << 26, device=device, dtype=torch.float32)

    def work() -> None:
        for _ in range(10 if on_gpu else 1):
            a @ a
            wide.clone()
        if on_gpu:
            torch.cuda.synchronize()
    return work


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _timed(work: Callable[[], None]) -> list[float]:
    work()
    return [_seconds(work) for _ in range(SAMPLES)]


if __name__ == "__main__":
    print(json.dumps({"host_s": _timed(_host), "device_s": _timed(_device())}))
