"""Arrivals: when requests are due, and the drivers that send them then, or as soon as there is room.

An open loop sends by its schedule and never waits for replies, so a slow server cannot thin out its own load;
it measures how late it was itself. A closed loop keeps a number of requests under way.
"""
import asyncio
import concurrent.futures
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from workbook.errors import BadInput

Send = Callable[[Any], Awaitable[Any]]
"""`async def send(request) -> reply`. The drivers set `request.arrival` to when it was due, `time.monotonic`."""


def batch(n: int) -> np.ndarray:
    """All n at once. Like all schedules: seconds from the start, one a request, ascending."""
    return np.zeros(_whole("num_prompts", n))


def poisson(n: int, rate: float, seed: int) -> np.ndarray:
    """n arrivals at `rate` a second, independent of each other."""
    return gamma(n, rate, 1.0, seed)


def gamma(n: int, rate: float, burstiness: float, seed: int) -> np.ndarray:
    """n arrivals at `rate` a second whose gaps are gamma distributed with shape `burstiness`: 1 is Poisson, less
    is burstier, more is more even.

    As in vLLM's benchmark (`get_request` of `vllm/benchmarks/serve.py`), the whole is stretched to end at n / rate,
    so that every seed offers the same load.
    """
    rate, burstiness = _positive("request_rate", rate), _positive("burstiness", burstiness)
    ends = np.cumsum(np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), _whole("num_prompts", n)))
    return ends * (n / rate / ends[-1])


def burst(n: int, size: int, every_s: float) -> np.ndarray:
    """n arrivals, `size` of them at once every `every_s` seconds, the first at 0."""
    size, every_s = _whole("burst size", size), _positive("seconds between bursts", every_s)
    return np.arange(_whole("num_prompts", n)) // size * every_s


@dataclass
class Driven:
    """What a driver did.

    Attributes:
        started, finished: `time.monotonic`.
        replies: in the order of the requests; None for one that had not ended when time was up.
        late_s: how long after its time each request was sent; all 0 in a closed loop, which has no schedule.
        cpu_s: what this process computed meanwhile, on all its threads.
        complete: False if time was up first.
    """
    started: float
    finished: float = math.nan
    replies: list[Any] = field(default_factory=list, repr=False)
    late_s: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    cpu_s: float = math.nan
    complete: bool = True

    def behind(self, limit: float = 0.01) -> str:
        """A sentence if the driver itself fell behind its schedule by more than `limit` of the whole; else empty."""
        took, worst = self.finished - self.started, float(self.late_s.max(initial=0.0))
        if worst <= limit * took:
            return ""
        return (f"the load generator fell behind its schedule by up to {worst:.3f} s, {worst / took * 100:.1f} % of the {took:.3f} s it ran; "
                f"expected at most {limit * 100:.0f} %")


async def open_loop(send: Send, requests: Iterable[Any], schedule: np.ndarray, *, timeout_s: float | None = None,
                    ended: Callable[[Any], None] | None = None) -> Driven:
    """Send each request when it is due, however many are under way. `ended` is called with every reply."""
    done = Driven(time.monotonic(), replies=[None] * len(schedule), late_s=np.zeros(len(schedule)))

    async def one(index: int, request: Any) -> None:
        done.late_s[index] = time.monotonic() - request.arrival
        done.replies[index] = reply = await send(request)
        if ended:
            ended(reply)

    async with _until(done, timeout_s), asyncio.TaskGroup() as under_way:
        for index, (request, at) in enumerate(zip(requests, schedule.tolist(), strict=True)):
            request.arrival = done.started + at
            await _sleep_until(request.arrival, index)
            under_way.create_task(one(index, request))
    return done


async def closed_loop(send: Send, requests: Iterable[Any], concurrency: int, *, timeout_s: float | None = None,
                      ended: Callable[[Any], None] | None = None) -> Driven:
    """Keep `concurrency` requests under way: so many are due at the start, and each that ends makes room for the next,
    which is due at that moment.

    As many tasks as `concurrency`, however many requests there are; `requests` is consumed as they are sent.
    """
    done = Driven(time.monotonic())

    async def worker(waiting: Iterator[Any]) -> None:
        due = done.started  # not when it is sent: that waits for the sending of those before it
        for request in waiting:
            index = len(done.replies)
            done.replies.append(None)
            request.arrival = due
            done.replies[index] = reply = await send(request)
            due = time.monotonic()
            if ended:
                ended(reply)

    async with _until(done, timeout_s), asyncio.TaskGroup() as workers:
        waiting = iter(requests)
        for _ in range(_whole("concurrency", concurrency)):
            workers.create_task(worker(waiting))
    done.late_s = np.zeros(len(done.replies))
    return done


def run(main: Coroutine) -> Any:
    """Run a coroutine to its end on uvloop (asyncio's own loop where there is none). Where a loop already runs, as
    in a notebook's kernel, that is in a thread of its own; an interrupt cancels it."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run(main)
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task]] = []

    async def known() -> Any:
        running.append((asyncio.get_running_loop(), asyncio.current_task()))
        return await main
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        result = thread.submit(_run, known())
        try:
            return result.result()
        except KeyboardInterrupt:
            for loop, task in running:
                loop.call_soon_threadsafe(task.cancel)
            raise


def _run(main: Coroutine) -> Any:
    try:
        from uvloop import new_event_loop
    except ImportError:
        from asyncio import new_event_loop
    result = []

    async def kept() -> None:
        # Not the task's own result: restoring the interrupt handler makes Python write out the task's `repr`, with
        # the result in it (seen with 3.11), and that of 100,000 replies takes gigabytes.
        result.append(await main)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(kept())
    return result[0]


@contextlib.asynccontextmanager
async def _until(done: Driven, timeout_s: float | None):
    """End `done` when its work has ended or its time is up, whichever is first; requests under way are cancelled then."""
    before = time.process_time()
    try:
        async with asyncio.timeout(timeout_s) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        done.complete = False
    done.finished, done.cpu_s = time.monotonic(), time.process_time() - before


async def _sleep_until(due: float, index: int) -> None:
    """Sleep until a time, never less. Loops wake up to the millisecond, so up to one late."""
    if due <= time.monotonic():
        if index % 16 == 0:  # far behind or all at once: what was sent must get out, and replies in
            await asyncio.sleep(0)
        return
    while (wait := due - time.monotonic()) > 0:
        await asyncio.sleep(max(wait, 0.001))


def _positive(key: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise BadInput(f"key '{key}' is {value!r}; expected a number above 0")
    return value


def _whole(key: str, value: int) -> int:
    if value < 1 or value != int(value):
        raise BadInput(f"key '{key}' is {value!r}; expected a whole number of 1 or more")
    return int(value)
