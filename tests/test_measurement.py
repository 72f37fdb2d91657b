"""A session of any exam's load: its warm-up, and what is kept of it when it ends early, in memory and on the disk."""
import contextlib
import math
import signal
import subprocess
import threading
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import psutil
import pytest
import scripted_server
from conftest import ROOT, command, environment
from workbook import controls, executor, files, limits, load, measurement, metrics, params, paths, runs
from workbook.engines import Answer, EngineDied, http
from workbook.errors import BadInput, Stopped
from workbook.subjects import Question

QUESTIONS = [Question(i, f"question {i}", [1, 2, 3], 11, None) for i in range(6)]
EXAM = params.check({"run": "x", "num_prompts": 6, "max_tokens": 11, "repetitions": 2, "warmup": 0})


@pytest.fixture(autouse=True)
def no_controls(monkeypatch):
    """They take a process to start and two seconds each: tests of a deadline of one second are not about them."""
    monkeypatch.setattr(controls, "beside", lambda cpu: contextlib.nullcontext(dict))


def answered(request, at=1.0, reason="length"):
    return Answer(request.prompt_id, request.sample, "a", [5] * 11, 11, 3, 11, reason, at, at, at, at, 0, request.arrival)


class Paced:
    """An offline engine whose passes take the seconds it is given, the last for ever after; `fail` may raise in a pass."""

    def __init__(self, *seconds, fail=lambda number: None):
        self.seconds, self.fail, self.passes = seconds, fail, 0

    def counters(self):
        return {}

    def kv_cache_peak(self):
        return None

    def generate(self, requests, bar):
        self.passes += 1
        self.fail(self.passes)
        time.sleep(self.seconds[min(self.passes, len(self.seconds)) - 1])
        return [answered(r) for r in requests]


def measured(engine, deadline=math.inf, **values):
    exam = EXAM.model_copy(update=values)
    return measurement.measure(engine, exam, load.requests(exam, QUESTIONS), deadline)


# -- warm-up ------------------------------------------------------------------------------------


def rates(monkeypatch, *tok_s, exam=EXAM, deadline=math.inf):
    """The warm-up over passes of these rates, which are told and not slept."""
    made = iter(tok_s)

    def passing(engine, exam, batch, labels, *, deadline):
        yield load.Repetition(1, 0, 0.0, 66 / next(made), [answered(r) for r in batch], {})
    monkeypatch.setattr(load, "passing", passing)
    found = measurement.WarmUp()
    measurement.warm_up(None, exam, load.requests(exam, QUESTIONS), found, deadline)
    return found


@pytest.mark.parametrize("tok_s, stable, sentence", [
    ((812, 846, 851, 1), True, "warm-up: 3 passes at 812, 846, 851 tok/s; the last two agree within 2 %"),
    ((851, 846, 1), True, "warm-up: 2 passes at 851, 846 tok/s; the last two agree within 2 %"),
    ((100, 200, 300, 400, 416, 1), False, "warm-up: not yet stable after 5 passes: the last two differ by 4.0 %"),
])
def test_auto_warms_up_until_two_passes_agree(monkeypatch, tok_s, stable, sentence):
    found = rates(monkeypatch, *tok_s, exam=EXAM.model_copy(update={"warmup": "auto"}))
    assert (found.stable, found.sentence) == (stable, sentence)
    assert found.record() == {"passes": len(tok_s) - 1, "tok_s": pytest.approx(tok_s[:-1]), "stable": stable, "sentence": sentence}


def test_a_number_of_passes_is_taken_at_its_word(monkeypatch):
    found = rates(monkeypatch, 100, 200, exam=EXAM.model_copy(update={"warmup": 2}))
    assert (found.stable, found.sentence) == (None, "warm-up: 2 passes at 100, 200 tok/s")
    assert rates(monkeypatch, exam=EXAM).sentence == "warm-up: 0 passes"


def test_a_warm_up_leaves_the_repetitions_their_time():
    """Every pass takes half a second or more: after one, another and two repetitions would end after 2 s."""
    found, exam = measurement.WarmUp(), EXAM.model_copy(update={"warmup": "auto"})
    measurement.warm_up(Paced(0.5), exam, load.requests(exam, QUESTIONS), found, time.monotonic() + 1.9)
    assert found.sentence == "warm-up: not yet stable after 1 pass"


def test_a_sweep_is_warm_when_all_its_points_together_are(monkeypatch):
    """Points of 11 tokens in 1 s and of 66 in 3 s: 77 in 4 s, and not the mean of 11 and 22."""
    exam = EXAM.model_copy(update={"concurrency": [1, 6], "warmup": 1})
    batch = load.requests(exam, QUESTIONS)

    def passing(*_, **__):
        for point, seconds in ((1, 1.0), (6, 3.0)):
            yield load.Repetition(1, point, 100.0, 100.0 + seconds, [answered(r) for r in batch[:point]], {})
    monkeypatch.setattr(load, "passing", passing)
    found = measurement.WarmUp()
    measurement.warm_up(None, exam, batch, found)
    assert found.tok_s == pytest.approx([77 / 4])


def test_controls_are_timed_beside_the_load_and_not_in_it(monkeypatch):
    """Before the first measured pass and after each; a pass is no longer for it."""
    times = []
    monkeypatch.setattr(controls, "beside", lambda cpu: contextlib.nullcontext(lambda: times.append(time.monotonic()) or {"host_beside_s": 0.3}))
    found = measured(Paced(0.05))
    assert found.controls == {"host_beside_s": [0.3] * 3}
    first, second = found.done
    assert times[0] <= first.arrival and first.finished <= times[1] <= second.arrival and second.finished <= times[2]


@pytest.mark.parametrize("at, whole", [(1, 0), (2, 1)])
def test_an_interruption_between_two_passes_loses_nothing(monkeypatch, at, whole):
    times = iter(range(1, 9))

    def interrupted():
        if next(times) == at:
            raise KeyboardInterrupt
        return {}
    monkeypatch.setattr(controls, "beside", lambda cpu: contextlib.nullcontext(interrupted))
    found = measured(Paced(0.0))
    assert (found.stopped, found.interrupted, len(found.done)) == ("interrupted", True, whole)


def test_what_the_client_made_late_is_no_latency_of_the_engine():
    request = load.Request(0, 0, (1,), 4, None)
    waits = [replace(answered(request), arrival=0.0, first_token=0.1)] * 100
    assert load.late(np.full(100, 0.019), waits) == "" and load.late(np.zeros(0), []) == ""
    assert load.late(np.full(100, 0.03), waits) == ("the load generator sent its requests late: 30 ms of the 100 ms to the first token are its own (p50); "
                                                    "expected at most 10 %")
    few = np.where(np.arange(1000) % 20, 0.0, 0.05)
    assert "50 ms of the 100 ms to the first token are its own (p99)" in load.late(few, waits * 10)
    assert load.late(few[:100], waits) == "", "of a hundred requests the 99th percentile is one's own"
    tenth = np.where(np.arange(900) < 100, 5.0, 0.0)
    assert "5000 ms of the 5100 ms to the first token are its own (p90)" in load.late(tenth, [replace(a, first_token=0.1 + late) for a, late in zip(waits * 9, tenth, strict=True)])


def test_every_point_of_a_sweep_is_measured_in_each_repetition():
    exam = EXAM.model_copy(update={"concurrency": [1, 6]})
    assert [r.point for r in measurement.measure(Paced(0.0), exam, load.requests(exam, QUESTIONS)).done] == [1, 6, 1, 6]


# -- a load that ends early ---------------------------------------------------------------------


def raising(error, at):
    def fail(number):
        if number == at:
            raise error
    return fail


@pytest.mark.parametrize("engine, stopped, whole", [
    (lambda: Paced(0.0, fail=raising(EngineDied("the engine died: RuntimeError: out of paper"), 2)),
     "the engine died: RuntimeError: out of paper (in repetition 2/2, with 0 of 6 answers)", 1),
    (lambda: Paced(0.0, fail=raising(ExceptionGroup("unhandled errors in a TaskGroup", [ValueError("token ids exceed\nthe window")]), 2)),
     "ValueError: token ids exceed the window (in repetition 2/2, with 0 of 6 answers)", 1),
    (lambda: Paced(0.0, fail=raising(KeyboardInterrupt(), 2)), "interrupted (in repetition 2/2, with 0 of 6 answers)", 1),
    (lambda: Paced(0.0, 60.0), f"{limits.UP} (in repetition 2/2, with 0 of 6 answers)", 1),
    (lambda: Paced(60.0), f"{limits.UP} (in repetition 1/2, with 0 of 6 answers)", 0),
])
def test_what_was_measured_is_there(engine, stopped, whole):
    began = time.monotonic()
    found = measured(engine(), began + 1)
    assert found.stopped == stopped and [len(r.answers) for r in found.done] == [6] * whole + [0]
    assert time.monotonic() - began < 30


def test_a_warm_up_that_ends_early_measures_nothing():
    found = measured(Paced(0.0, fail=raising(EngineDied("the engine died: x"), 1)), warmup=1)
    assert found.stopped == "the engine died: x (in warm-up 1, with 0 of 6 answers)" and found.done == []


def test_time_is_up_in_a_load_over_http():
    """The answers that came are kept, those under way are given up, and the same holds where somebody interrupts."""
    with scripted_server.running({"gap": 0.02}) as server:
        exam = params.check({"run": "x", "engine": "endpoint", "endpoint": server.url, "num_prompts": 6, "max_tokens": 11, "load": "closed", "concurrency": 1,
                             "repetitions": 3, "warmup": 0})
        engine = http.HttpEngine(exam, [server.url])
        batch = load.requests(exam, QUESTIONS[:2] + [Question(2, "long", [1], 100_000, None)])
        found = measurement.measure(engine, exam, batch, time.monotonic() + 2)
        assert found.stopped == f"{limits.UP} (in repetition 1/3, closed of 1, with 2 of 3 answers)"
        assert [a.prompt_id for a in found.done[0].answers] == [0, 1] and len(load.requests_frame(found.done)) == 2
        threading.Timer(2, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
        found = measurement.measure(engine, exam, batch)
        assert found.interrupted and found.stopped == "interrupted (in repetition 1/3, closed of 1, with 2 of 3 answers)"


def test_a_load_that_nobody_answers_ends_with_its_first_pass():
    with scripted_server.running({"fault": "status"}) as server:
        exam = params.check({"run": "x", "engine": "endpoint", "endpoint": server.url, "num_prompts": 6, "max_tokens": 11})
        engine, batch = http.HttpEngine(exam, [server.url]), load.requests(exam, QUESTIONS)
        sentence = "not one request was answered: 6 × error: the server answered HTTP 500: the engine is on fire"
        assert measurement.measure(engine, exam, batch).stopped == f"{sentence} (in warm-up 1)"
        found = measurement.measure(engine, exam.model_copy(update={"warmup": 0}), batch)
        assert found.stopped == f"{sentence} (in repetition 1/3)" and len(found.done[0].answers) == 6


def test_the_load_gives_up_before_the_runner_does(monkeypatch):
    with limits.told(1000.0):
        assert (limits.deadline(1800), limits.deadline(10)) == (980, 999)
    assert limits.deadline(1800) == pytest.approx(time.monotonic() + 1780, abs=5)


def test_a_time_limit_that_is_not_reached_interrupts_nothing():
    with limits.interrupting(time.monotonic() + 0.2):
        pass
    with limits.interrupting(math.inf), pytest.raises(ZeroDivisionError):
        1 / 0  # noqa: B018
    time.sleep(0.4)


@pytest.mark.parametrize("after_s", [-1, 0, 1e-5, 0.01])
def test_a_time_limit_is_no_interruption_wherever_it_falls(after_s):
    """One that is past when it is asked for too, as between two passes."""
    for _ in range(20):
        with pytest.raises(TimeoutError, match="time is up"), limits.interrupting(time.monotonic() + after_s):
            time.sleep(5)


# -- on the disk --------------------------------------------------------------------------------


def kept(folder, found):
    return measurement.keep(folder, EXAM, found, QUESTIONS, pd.DataFrame({"time": [1.0]}), found.record() | {"machine": {}})


def test_a_partial_session_is_kept_marked_and_never_judged(folders):
    folder = paths.run_folder("x")
    found = measured(Paced(0.0, fail=raising(EngineDied("the engine died: x"), 2)))
    with pytest.raises(Stopped, match="^the engine died: x "):
        kept(folder, found)
    assert len(pd.read_parquet(folder / "requests.parquet")) == 6 and len(pd.read_parquet(folder / "generations.parquet")) == 6
    assert files.read_json(folder / "run.json")["partial"] == found.stopped
    assert (files.read_json(folder / "result.json")["status"], files.read_json(folder / "result.json")["sentence"]) == ("INVALID", found.stopped)
    with pytest.raises(BadInput, match=r"^run 'x' is partial: the engine died: x \(in repetition 2/2, .*\); expected one whose load was measured to its end$"):
        runs.read_record("x")


def test_the_answers_that_are_judged_are_those_of_a_sweeps_last_point(folders):
    """A closed loop asks every question at each: what breaks under load alone has to be seen."""
    def passed(number, point):
        answers = [replace(answered(r), text=f"{number}, {point} at once") for r in load.requests(EXAM, QUESTIONS)]
        return load.Repetition(number, point, 0.0, 1.0, answers, {})
    _, judged = kept(paths.run_folder("x"), measurement.Session(done=[passed(*at) for at in ((1, 1), (1, 6), (2, 1), (2, 6))]))
    assert set(judged.answer) == {"1, 6 at once"}


def test_what_a_kv_connector_found_counts_as_found_in_the_cache():
    done = [load.Repetition(i, 0, 0.0, 1.0, [], {"vllm:prefix_cache_hits": 1.0, "vllm:external_prefix_cache_hits": 30.0, "vllm:external_prefix_cache_queries": 40.0}) for i in (1, 2)]
    assert measurement.Session(done=done).record()["prefix_cache_hits"] == 62
    assert metrics._of_counters(done[0].counters)["prefix_hit_pct"] == pytest.approx(77.5)


def test_a_session_without_an_answer_can_be_kept(folders):
    with pytest.raises(Stopped):
        kept(paths.run_folder("x"), measurement.Session(stopped="why"))
    assert len(pd.read_parquet(paths.run_folder("x") / "requests.parquet")) == len(pd.read_parquet(paths.run_folder("x") / "generations.parquet")) == 0


SERVED = """
run: served
engine: endpoint
endpoint: {url}
num_prompts: 6
max_tokens: 11
warmup: 0
repetitions: 3
load: closed
concurrency: 1
timeout_s: 300
"""


@pytest.fixture
def run_of_an_endpoint(folders):
    """`python -m workbook run` against a server that answers slowly, once two passes have been asked for."""
    with scripted_server.running({"gap": 0.02}) as server:
        (folders / "params" / "served.yaml").write_text(SERVED.format(url=server.url))
        with subprocess.Popen(command("run", "served"), env=environment(), stderr=subprocess.PIPE, text=True) as run:
            while server.count() < 9 and run.poll() is None:
                time.sleep(0.05)
            yield run, server, psutil.Process(run.pid).children(recursive=True)


def said_and_left(run, tree):
    said = run.stderr.read()
    code = run.wait(timeout=60)
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in tree)
    return code, said


def test_a_server_that_dies_in_the_second_of_three_repetitions(run_of_an_endpoint):
    run, server, tree = run_of_an_endpoint
    server.process.kill()
    code, said = said_and_left(run, tree)
    folder = paths.run_folder("served")
    result, record = files.read_json(folder / "result.json"), files.read_json(folder / "run.json")
    assert (code, result["status"], result["stopped_in"]) == (2, "INVALID", "generate"), said
    assert result["sentence"].startswith("generate.ipynb failed: not one request was answered: 6 × error: nothing listens at ")
    assert record["partial"] in result["sentence"] and [p["repetition"] for p in record["repetitions"]] == [1, 2, 3]
    requests = pd.read_parquet(folder / "requests.parquet")
    assert (requests[requests.repetition == 1].finish_reason == "length").all() and len(requests) == 18 and len(pd.read_parquet(folder / "generations.parquet")) == 6
    for stage in ("score", "compare"):
        problem = executor.execute(ROOT / "notebooks" / f"{stage}.ipynb", folder / f"{stage}.ipynb", {"run": "served"}, timeout_s=60, label="t").problem
        assert problem.startswith("run 'served' is partial: not one request was answered")
    assert not (folder / "session.json").exists()


def test_a_run_that_is_cancelled_keeps_what_it_has(run_of_an_endpoint):
    run, _, tree = run_of_an_endpoint
    run.terminate()
    code, said = said_and_left(run, tree)
    folder = paths.run_folder("served")
    assert (code, files.read_json(folder / "result.json")["sentence"]) == (130, "interrupted in generate.ipynb"), said
    assert said.splitlines()[-1] == "goldbook: interrupted; results so far are in the reports folder" and "Traceback" not in said
    assert files.read_json(folder / "run.json")["partial"].startswith("interrupted (in repetition 2/3, closed of 1, with ")
    assert (pd.read_parquet(folder / "requests.parquet").repetition == 1).sum() == 6
