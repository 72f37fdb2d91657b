"""Controls: two fixed pieces of work that no change to the engine can touch.

If they run at another speed than when the golden was recorded, the machine changed, and a change of the
engine's speed says nothing. They run in a process of their own: the kernel must use neither OpenMP nor
CUDA before the engine is started.
"""
import json
import subprocess
import sys
import time
from typing import Any

from workbook import paths

SAMPLES = 5
TOLERANCE = 0.10
"""How far outside the golden's sessions a control may be, as a fraction, with speeds still comparable."""


def measure() -> dict[str, list[float]]:
    """Seconds of each control, `SAMPLES` of each: `host_s` (a single-thread Python loop) and `device_s`
    (a copy and a matrix product on the accelerator, or on all cores)."""
    return in_own_process("workbook.controls")


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


def _timed(work) -> list[float]:
    work()
    times = []
    for _ in range(SAMPLES):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    print(json.dumps({"host_s": _timed(_host), "device_s": _timed(_device())}))
