"""Controls: fixed pieces of work that no change to the engine can touch.

If they run at another speed than when the golden was recorded, the machine changed, and a change of the
engine's speed says nothing. Two run before the engine is started, in a process of their own: the kernel must use
neither OpenMP nor CUDA until then. Small ones run beside the load, between its passes, since a neighbour on a shared
machine comes and goes in less time than a session takes; these too in a process of their own, for the engine decides
on which cores the kernel's threads run. Where a piece of the machine was timed at both times, the time beside the load
decides.
"""
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from workbook import paths, platforms
from workbook.errors import Stopped

CORES = os.sched_getaffinity(0)
"""The cores of this process before an engine in it binds its threads to some of them."""
SAMPLES = 5
COPY_BYTES = 64 << 20
"""What is copied between the passes: more than the caches of a server's processor hold for a core."""
LAYERS, ROWS, WIDTH, FFN = 30, 128, 576, 1536
"""The small transformer whose layers a CPU runs between the passes: that of the embedded model, with the requests of a batch. Of
what was tried beside `smoke` (a loop and a copy on one core or all, float32 products) its time follows the load's best."""
LAYERS_S = 1.5
"""How long it runs each time: a session has few times, and in half a second each they moved by a tenth where the load did not."""
TOLERANCE = 0.10
"""How far from the golden's a control may be, as a fraction of its time, with speeds still comparable, if its noise is less."""

OTHERS_PCT = 5
"""Of the cores, what processes other than the load's may take while a CPU generates, with speeds still comparable: as
much as the smallest loss that a gate looks for."""


def measure(gpus: int = 1) -> dict[str, list[float]]:
    """Seconds of each control, `SAMPLES` of each: `host_s` (a single-thread Python loop) and `device_s`
    (a copy and a matrix product on the accelerator, or on all cores).

    Args:
        gpus: of so many, the first of the visible ones, the slowest counts, since the others wait for it.
    """
    return in_own_process("workbook.controls", str(gpus))


@contextlib.contextmanager
def beside(cpu: bool) -> Iterator[Callable[[], dict[str, float]]]:
    """The controls that run between the passes of a load, while the engine waits: a process of their own for as long as
    the context is open, so that nothing is imported between two passes. What it gives is called for each time.

    Args:
        cpu: whether it is this machine's CPU that generates.

    Returns:
        Of a call: seconds of each control, one of each: `host_beside_s` (the Python loop) and `copy_beside_s` (a copy in
        the host's memory) on one core, and of a CPU that generates `device_beside_s` (the layers of a small transformer on
        all cores); two seconds in all, a quarter of one where a GPU generates.

    Raises:
        Stopped: that process has ended; from entering and from a call.
    """
    with subprocess.Popen([sys.executable, "-c", f"from workbook import controls; controls.serve({sorted(CORES)}, {cpu})"], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=paths.child_environment()) as process:
        try:
            _answer(process)
            yield lambda: _answer(process)
        finally:
            process.kill()
            with contextlib.suppress(BrokenPipeError):  # what a process that was dead by then has not read
                process.stdin.close()


def _answer(process: subprocess.Popen) -> dict[str, float]:
    with contextlib.suppress(BrokenPipeError):  # then there is no answer
        process.stdin.write("\n")
        process.stdin.flush()
    if line := process.stdout.readline():
        return json.loads(line)
    raise Stopped(f"the process of the controls ended with code {process.wait()}: {(process.stderr.read().strip().splitlines() or [''])[-1]}")


def serve(cores: list[int], cpu: bool) -> None:
    """What the process of `beside` does: a line of times for each line it reads. It is told its cores, for the thread
    that started it may have been bound to some of them by an engine."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is for the kernel, which ends this process
    os.sched_setaffinity(0, cores)
    source, target = np.ones(COPY_BYTES, dtype=np.uint8), np.ones(COPY_BYTES, dtype=np.uint8)  # written: the pages are there
    layers = _layers() if cpu else None
    for _ in sys.stdin:
        found = {"host_beside_s": statistics.median(_seconds(_host) for _ in range(SAMPLES)),
                 "copy_beside_s": min(_seconds(lambda: np.copyto(target, source)) for _ in range(3))}
        if layers:
            layers()  # its threads are awake
            began, passes = time.perf_counter(), 0
            while time.perf_counter() - began < LAYERS_S:
                layers()
                passes += 1
            found["device_beside_s"] = (time.perf_counter() - began) / passes
        print(json.dumps(found), flush=True)


def deciding(names: Iterable[str]) -> list[str]:
    """Those of the controls that say whether speeds compare: `host_s` and `device_s`, a second's worth of before the
    load, only where there is no `host_beside_s` and `device_beside_s`, which were timed all through it."""
    known = set(names)
    return [name for name in names if name.removesuffix("_s") + "_beside_s" not in known]


def outside(now: float, known: Sequence[float]) -> float:
    """How far a control's time lies outside those that are known, as a fraction of the nearest: 0 among them, positive
    where it is slower than the slowest, negative where faster than the fastest."""
    return now / min(max(now, min(known)), max(known)) - 1


def in_own_process(module: str, *words: str) -> Any:
    """Run `python -m module words` and return what its last line says, as JSON.

    Raises:
        RuntimeError: it failed, with the last line of its error.
    """
    job = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, env=paths.child_environment())
    if job.returncode:
        raise RuntimeError(f"{module} failed: {job.stderr.strip().splitlines()[-1:]}")
    return json.loads(job.stdout.splitlines()[-1])


def _host() -> None:
    total = 0
    for i in range(2_000_000):
        total += i & 7


def _devices(gpus: int) -> list[float]:
    """Of the device's work, the slowest of so many GPUs at each time; on all cores where there is none."""
    import torch
    each = [_timed(_device(f"cuda:{index}")) for index in range(min(gpus, torch.cuda.device_count()))] or [_timed(_device("cpu"))]
    return [max(times) for times in zip(*each, strict=True)]


def _device(device: str) -> Callable[[], None]:
    """A function that does the device's work once and waits for it."""
    import torch
    on_gpu = device != "cpu"
    side = 8192 if on_gpu else 1536
    torch.manual_seed(0)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    wide = torch.empty((4 if on_gpu else 1) << 26, device=device, dtype=torch.float32)

    def work() -> None:
        for _ in range(10 if on_gpu else 1):
            a @ a
            wide.clone()
        if on_gpu:
            torch.cuda.synchronize(device)
    return work


def _layers() -> Callable[[], None]:
    """A function that runs the layers of a small transformer once, without attention, on all cores, in what the engine computes in."""
    import torch
    dtype = getattr(torch, platforms.matrix_dtype())
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    sizes = [(WIDTH, WIDTH + WIDTH // 3 * 2), (WIDTH, WIDTH), (WIDTH, 2 * FFN), (FFN, WIDTH)]  # queries, keys and values of a third; output; gate and up; down
    weights = [[torch.randn(size, dtype=dtype) / size[0] ** 0.5 for size in sizes] for _ in range(LAYERS)]
    rows = torch.randn(ROWS, WIDTH, dtype=dtype)

    @torch.inference_mode()
    def work() -> None:
        x = rows
        for attention, output, up, down in weights:
            x = torch.nn.functional.layer_norm(x + (x @ attention)[:, :WIDTH] @ output, (WIDTH,))
            gate, value = (x @ up).chunk(2, dim=1)
            x = x + torch.nn.functional.silu(gate) * value @ down
    return work


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _timed(work: Callable[[], None]) -> list[float]:
    work()
    return [_seconds(work) for _ in range(SAMPLES)]


if __name__ == "__main__":
    print(json.dumps({"host_s": _timed(_host), "device_s": _devices(int(sys.argv[1]))}))
