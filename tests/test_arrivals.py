"""Schedules offer the load they say; the drivers keep to them, and say when they could not."""
import asyncio
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from workbook import arrivals
from workbook.errors import BadInput


def requests(n):
    return [SimpleNamespace(arrival=None, number=number) for number in range(n)]


def answering_after(seconds):
    async def send(request):
        await asyncio.sleep(seconds)
        return request.number
    return send


@pytest.mark.parametrize("make", [lambda seed: arrivals.poisson(5000, 20.0, seed), lambda seed: arrivals.gamma(5000, 20.0, 0.25, seed),
                                  lambda seed: arrivals.gamma(5000, 20.0, 8.0, seed)])
def test_a_schedule_has_its_rate_and_follows_its_seed(make):
    schedule = make(7)
    assert np.array_equal(schedule, make(7)) and not np.array_equal(schedule, make(8))
    assert (np.diff(schedule) >= 0).all() and schedule[0] > 0
    assert len(schedule) / schedule[-1] == pytest.approx(20.0)
    # The middle of it has the rate too, and not only its end.
    assert np.searchsorted(schedule, 125.0) == pytest.approx(2500, rel=0.12)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 8.0])
def test_burstiness_is_that_of_a_gamma_distribution(burstiness):
    gaps = np.diff(arrivals.gamma(20_000, 50.0, burstiness, 1))
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness ** -0.5, rel=0.05)


def test_batch_and_burst():
    assert arrivals.batch(3).tolist() == [0.0, 0.0, 0.0]
    assert arrivals.burst(5, 2, 1.5).tolist() == [0.0, 0.0, 1.5, 1.5, 3.0]


@pytest.mark.parametrize("make, said", [
    (lambda: arrivals.poisson(10, 0, 1), "key 'request_rate' is 0; expected a number above 0"),
    (lambda: arrivals.poisson(10, -2.0, 1), "key 'request_rate' is -2.0; expected a number above 0"),
    (lambda: arrivals.poisson(10, float("nan"), 1), "key 'request_rate' is nan; expected a number above 0"),
    (lambda: arrivals.gamma(10, 1.0, 0.0, 1), "key 'burstiness' is 0.0; expected a number above 0"),
    (lambda: arrivals.batch(0), "key 'num_prompts' is 0; expected a whole number of 1 or more"),
    (lambda: arrivals.burst(10, 0, 1.0), "key 'burst size' is 0; expected a whole number of 1 or more"),
])
def test_an_impossible_schedule_is_refused(make, said):
    with pytest.raises(BadInput, match=f"^{said}$"):
        make()


def test_an_open_loop_does_not_wait_for_replies():
    schedule = arrivals.poisson(100, 200.0, 3)
    done = arrivals.run(arrivals.open_loop(answering_after(0.3), batch := requests(100), schedule))
    assert done.complete and done.replies == list(range(100))
    assert [r.arrival - done.started for r in batch] == pytest.approx(schedule.tolist())
    assert done.finished - done.started == pytest.approx(0.8, abs=0.15)
    assert (done.late_s >= 0).all() and np.median(done.late_s) < 0.002


def test_an_open_loop_says_how_late_it_was():
    async def send(request):
        time.sleep(0.02)  # a client that holds the loop up
    done = arrivals.run(arrivals.open_loop(send, requests(50), arrivals.poisson(50, 100.0, 3)))
    assert 0.2 < done.late_s.max() < 1.0
    assert done.behind().startswith("the load generator fell behind its schedule by up to 0.")
    assert done.behind().endswith("s it ran; expected at most 1 %")
    assert arrivals.Driven(0.0, 10.0, late_s=np.array([0.0, 0.09])).behind() == ""


def test_a_closed_loop_keeps_so_many_under_way():
    now = most = 0
    ended = []

    async def send(request):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001 * (request.number % 7))
        now -= 1
        return request.number
    done = arrivals.run(arrivals.closed_loop(send, iter(requests(200)), 8, ended=ended.append))
    assert most == 8 and done.replies == list(range(200)) and sorted(ended) == list(range(200))
    assert done.behind() == ""


def test_the_first_requests_of_a_closed_loop_are_due_when_it_begins():
    """However long the sending of those before them takes; the next ones when there is room, whatever is done with the reply."""
    async def send(request):
        time.sleep(0.02)  # holds up the loop, as making many connections does
        await asyncio.sleep(0.001)
    asked, told = requests(6), []
    done = arrivals.run(arrivals.closed_loop(send, asked, 3, ended=lambda reply: told.append(time.monotonic())))
    assert [r.arrival for r in asked[:3]] == [done.started] * 3
    assert all(done.started + 0.02 < r.arrival <= at for r, at in zip(asked[3:], told, strict=False))


def test_a_closed_loop_of_many_requests_stays_small():
    async def send(request):
        await asyncio.sleep(0)
        return 1

    async def main():
        tracemalloc.start()
        try:
            done = await arrivals.closed_loop(send, (SimpleNamespace(arrival=None) for _ in range(20_000)), 64)
            return len(done.replies), tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()  # it makes every allocation of the tests that follow several times as slow
    replies, peak = arrivals.run(main())
    assert replies == 20_000 and peak < 2e6  # bytes: a task each would be 20 MB


@pytest.mark.parametrize("drive", [lambda: arrivals.open_loop(answering_after(0.1), requests(3), np.array([0.0, 0.1, 60.0]), timeout_s=0.4),
                                   lambda: arrivals.closed_loop(answering_after(0.15), requests(9), 1, timeout_s=0.4)])
def test_time_is_up(drive):
    began = time.monotonic()
    done = arrivals.run(drive())
    assert time.monotonic() - began < 1.0
    assert not done.complete and done.replies[:2] == [0, 1] and set(done.replies[2:]) == {None}


def test_a_driver_runs_where_a_loop_runs_already():
    async def kernel():
        return arrivals.run(arrivals.closed_loop(answering_after(0), requests(3), 2))
    assert asyncio.run(kernel()).replies == [0, 1, 2]


def test_the_result_is_never_written_out():
    """Python's signal module does so with a finished task, result and all, which takes gigabytes for many replies."""
    class Result:
        def __repr__(self):
            raise AssertionError("repr of the result")

    async def main():
        return Result()
    assert isinstance(arrivals.run(main()), Result)
