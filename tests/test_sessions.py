"""The confirming session: taken once, when the first look leaves doubt, and kept whatever comes of it.

The engine is a scripted server, whose speed and faults are the test's own; the notebooks are the real ones.
"""
import contextlib
import dataclasses
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pandas as pd
import pytest
import scripted_server
import yaml
from conftest import command, environment, finished
from workbook import controls, files, goldens, measurement, metrics, params, paths, platforms, recording, results, runner, runs, schemas, sessions
from workbook.errors import BadInput
from workbook.validity import Completeness

SLOW, FAST = {"ttft": 0.2, "gap": 0.02}, {"ttft": 0.05, "gap": 0.002}
REQUESTS, REPETITIONS = 12, 3
CONTROLS = {"host_s": [1.0, 1.0], "device_s": [2.0, 2.0]}
EXAM = {"run": "x", "engine": "endpoint", "num_prompts": REQUESTS, "max_tokens": 11, "ignore_eos": True, "repetitions": REPETITIONS, "warmup": 1,
        "gates": {"output_tok_s": {"delta": 0.5, "margin": 0.4}}}
# The gate is wide so that a busy machine passes: what differs here differs by much more.


@pytest.fixture(scope="module")
def slow():
    with scripted_server.running(SLOW) as running:
        yield running


@pytest.fixture(scope="module")
def first_session(slow, tmp_path_factory):
    """A run's folder as generate.ipynb, score.ipynb and compare.ipynb leave it where there is no golden."""
    place = tmp_path_factory.mktemp("first")
    own = {f"GOLDBOOK_{name.upper()}": str(place / name) for name in ("params", "goldens", "reports")}
    for folder in ("params", "goldens"):
        (place / folder).mkdir()
    (place / "params" / "x.yaml").write_text(yaml.safe_dump(EXAM | {"endpoint": slow.url}))
    done = finished(command("run", "x"), environment(**own), 300)
    assert done.returncode == 0, done.stderr
    return place / "reports" / "runs" / "x"


@pytest.fixture
def taken(first_session, folders):
    """A copy of that folder in this test's reports."""
    return shutil.copytree(first_session, paths.run_folder("x"))


@pytest.fixture
def quick_controls(monkeypatch):
    monkeypatch.setattr(controls, "measure", lambda gpus: CONTROLS)
    monkeypatch.setattr(controls, "beside", lambda cpu: contextlib.nullcontext(dict))


def golden_of(folder, faster: float) -> goldens.Golden:
    """Bless a golden that is so many times as fast as the session in `folder`; its controls allow for any machine."""
    session = goldens.read(folder / "session.json")
    for name, samples in session.metrics.items():
        samples.sessions = [[v * (faster if samples.direction == "higher" else 1 / faster) for v in samples.sessions[0]]] * 3
    session.controls = {name: [[1e-9], [1.0], [1e9]] for name in session.controls}
    goldens.write(goldens.path_of(session.key.platform, "x"), session.model_copy(update={
        "blessing": goldens.Blessing(by="somebody", when="2026-01-01", reason="for this test")}))
    return session


def served_by(folder, url: str) -> sessions.Measured:
    """The run as if its endpoint had been another."""
    record = files.read_json(folder / "run.json")
    files.write_json(folder / "run.json", record | {"params": record["params"] | {"endpoint": url}})
    return sessions.read("x")


def compare(folder, confirm=True) -> tuple[dict, str]:
    """Execute compare.ipynb; gives the result and what the terminal was told.

    In a process of its own: the executor ends all that its process started, and so this one's server.
    """
    code = ("import sys\nfrom pathlib import Path\nfrom workbook import runner, sessions\n"
            f"sys.exit(runner.run_stage(sessions.read('x').exam, 'compare', Path({str(folder)!r}), {confirm}) or 0)")
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return files.read_json(folder / "result.json"), done.stderr


# -- compare.ipynb ------------------------------------------------------------------------------


def test_a_first_look_that_passes_stands(taken, slow):
    golden_of(taken, 1.0)
    before = slow.count()
    found, _ = compare(taken)
    assert (found["status"], len(found["looks"]), slow.count()) == ("PASSED", 1, before)
    assert "first look" not in found["sentence"] and "confirmation" not in runs.read_record("x")


def test_a_regression_is_confirmed_once_and_declared(taken, slow):
    """Then by hand again: the second session is found and used, and there is no third."""
    golden_of(taken, 20.0)
    before = pd.read_parquet(taken / "requests.parquet")
    found, said = compare(taken)
    assert found["status"] == "REGRESSED" and [look["status"] for look in found["looks"]] == ["REGRESSED", "REGRESSED"]
    assert [look["sessions"] for look in found["looks"]] == [1, 2] and found["gates"] == found["looks"][1]["gates"]
    effects = [-100 * (1 - np.exp(-look["gates"]["output_tok_s"]["effect"])) for look in found["looks"]]
    declared = (f"first look: REGRESSED (output_tok_s {effects[0]:+.1f} %); a confirming session was taken: "
                f"REGRESSED (output_tok_s {effects[1]:+.1f} %) by both together")
    assert found["sentence"].startswith("output_tok_s -9") and "would have been called one)" in found["sentence"] and found["sentence"].endswith(declared)
    assert re.fullmatch(r"output_tok_s -9\d\.\d % against the golden \(\d+ % interval [^;]*\); speed judged by 2 sessions", found["brief"])
    answers = {q["question"]: q["answer"] for q in found["questions"]}
    assert declared in answers["Faster or slower than the golden?"] and "72 of 72 answers" in answers["Did every answer arrive?"]
    assert "A confirming session is taken: endpoint engine, 3 repetitions." in said
    requests = pd.read_parquet(taken / "requests.parquet")
    assert requests.groupby("session").size().to_dict() == {1: 36, 2: 36}
    pd.testing.assert_frame_equal(requests[requests.session == 1], before)
    assert set(pd.read_parquet(taken / "telemetry.parquet").session) == {1, 2}
    assert len(found["metrics"]["output_tok_s"]["sessions"]) == 2
    kept = goldens.read(taken / "session.json")
    assert len(kept.recorded) == len(kept.controls["host_s"]) == len(kept.requests["E2E"]) == len(kept.metrics["e2e_p50_ms"].sessions) == 2
    count = slow.count()
    again, _ = compare(taken)
    assert (again["looks"], slow.count()) == (found["looks"], count) and len(pd.read_parquet(taken / "requests.parquet")) == 72


def test_a_page_that_explains(taken):
    """After a regression: the requests' distributions, with the golden's, and the slowest repetition."""
    golden = golden_of(taken, 20.0)
    assert {name: [len(s) for s in of] for name, of in golden.requests.items()} == {"E2E": [21], "TTFT": [21], "per-request tok/s": [21]}
    found, _ = compare(taken, confirm=False)
    assert found["status"] == "REGRESSED" and len(found["looks"]) == 1 and found["sentence"].endswith("; no confirming session was taken")
    page = (taken / "compare.ipynb").read_text()
    assert all(f"share of requests up to each {name}" in page for name in golden.requests) and "the slowest: its requests" in page


def test_an_interrupted_confirming_session_loses_no_first_look(taken, slow):
    """A pipeline's time is over: what the first session said is in the result."""
    golden_of(taken, 20.0)
    before = slow.count()
    code = f"from pathlib import Path\nfrom workbook import runner, runs, sessions\nruns.STAGES = ('compare',)\nrunner._take(sessions.read('x').exam, Path({str(taken)!r}))"
    with subprocess.Popen([sys.executable, "-c", code], env=environment(), stderr=subprocess.DEVNULL) as taking:
        while slow.count() == before:
            assert taking.poll() is None
            time.sleep(0.05)
        taking.send_signal(signal.SIGINT)
        taking.wait(60)
    found = schemas.read_result(taken / "result.json")
    assert found["status"] == "INVALID" and re.fullmatch(
        r"interrupted in compare\.ipynb; first look: REGRESSED \(output_tok_s -9\d\.\d %\); no confirming session was taken", found["sentence"]), found["sentence"]
    assert found["sentence"] in (taken / "compare.html").read_text()


def test_a_recording_takes_no_confirming_session(folders, monkeypatch):
    (folders / "params" / "x.yaml").write_text(yaml.safe_dump(EXAM | {"endpoint": "http://127.0.0.1:9"}))
    asked = []
    monkeypatch.setattr(runner, "run_stage", lambda exam, stage, folder, confirm=True, reference="": asked.append((confirm, reference)) or "enough")
    monkeypatch.setattr(platforms, "changed_files", list)
    monkeypatch.setattr(runner, "summarize", lambda: asked.append("summary") or "")
    with pytest.raises(BadInput, match="enough"):
        recording.record("x", None, sessions=3)
    assert asked == [(False, "own"), "summary"], "and the first session reads its own sequences, whatever golden there is"


def test_an_interrupted_recording_says_what_is_there(folders, monkeypatch, capsys):
    """In its second session: the result, a page, and how to go on."""
    (folders / "params" / "x.yaml").write_text(yaml.safe_dump(EXAM | {"endpoint": "http://127.0.0.1:9"}))
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(runner, "run_stage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recording._session(recording.exams.load("x"), "1 of this recording are kept", "")
    found = schemas.read_result(paths.run_folder("x") / "result.json")
    assert (found["status"], found["sentence"]) == ("INVALID", "interrupted in generate.ipynb, while recording")
    assert (paths.reports() / "index.html").exists() and (paths.run_folder("x") / "params.yaml").exists()
    assert "x: interrupted; the sessions before it, 1 of this recording are kept: ADD=1 goes on from there" in capsys.readouterr().err


def test_a_full_disk_is_a_sentence_and_the_next_run_is_tried(folders, monkeypatch, capsys):
    (folders / "params" / "x.yaml").write_text(yaml.safe_dump(EXAM | {"endpoint": "http://127.0.0.1:9"}))
    full = OSError(28, "No space left on device", str(paths.run_folder("x") / "result.json"))
    def refuse(*_, **__):
        raise full
    monkeypatch.setattr(schemas, "write_result", refuse)
    monkeypatch.setattr(runner, "_take", refuse)
    assert runner.run_one(recording.exams.load("x")) == "INVALID"
    said = capsys.readouterr().err
    assert "result.json: No space left on device" in said and "x: its result cannot be written: [Errno 28]" in said and "Traceback" not in said
    assert (paths.run_folder("x") / "params.yaml").exists(), "of which the summary says that it was begun"


def test_too_little_room_for_a_run_is_said_before_it(folders, monkeypatch):
    monkeypatch.setattr(runner.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=200_000))
    with pytest.raises(BadInput, match=r"reports: has 0.2 MB free; expected 20 or more, for the results of a run"), runner.Reports():
        pass


# -- what it is made of -------------------------------------------------------------------------


def test_both_sessions_are_pooled(taken, slow, quick_controls):
    """Slow, and then fast: the effect that counts is the mean of the two."""
    golden = golden_of(taken, 20.0)
    with scripted_server.running(FAST) as fast:
        alone = served_by(taken, fast.url)
        both = sessions.confirm(alone)
    look, pooled = (results.look(m.exam.gates, golden, m.by_repetition, m.controls) for m in (alone, both))
    means = [np.log(s).mean() for s in metrics.sessions(both.by_repetition, "output_tok_s")]
    assert means[1] > means[0] + 0.5, "the other server was asked"
    expected = np.log(golden.metrics["output_tok_s"].sessions[0]).mean() - np.mean(means)
    assert pooled["gates"]["output_tok_s"]["effect"] == pytest.approx(expected, rel=1e-4) and look["status"] == "REGRESSED"
    assert both.controls == [alone.record["controls"], CONTROLS]
    generations = pd.read_parquet(taken / "generations.parquet")
    complete = sessions.check(both, generations)
    assert (complete.expected, complete.arrived, complete.problems) == (72, 72, [])
    short = sessions.check(dataclasses.replace(both, requests=both.requests.iloc[:-1]), generations)
    assert short.problems == ["the confirming session is invalid: 1 of 36 answers are missing or failed (no row)"]
    first, second = both.apart()
    assert first.requests.equals(alone.requests) and not first.confirmed and first.record == alone.record
    assert second.controls == [CONTROLS] and second.by_repetition.equals(both.by_repetition.loc[[2]])


@pytest.mark.parametrize("script, problem", [
    ({"fault": "truncate"}, "the confirming session failed: Stopped: not one request was answered: 12 × error: the connection closed"),
    (None, "the confirming session failed: BadInput: key 'endpoint' is 'http://127.0.0.1:9': no server answers there"),
], ids=["no answers", "no engine"])
def test_a_confirming_session_that_breaks_makes_the_run_invalid(taken, quick_controls, script, problem):
    """And never asks for another; the first one's rows are all there."""
    before = sessions.read("x")
    if script:
        with scripted_server.running(SLOW | script) as broken:
            after = sessions.confirm(served_by(taken, broken.url))
    else:
        after = sessions.confirm(served_by(taken, "http://127.0.0.1:9"))
    complete = sessions.check(after, pd.read_parquet(taken / "generations.parquet"))
    assert complete.problems[0].startswith(problem), complete.problems
    assert not sessions.wanted(after, "REGRESSED") and after.apart()[0].requests.equals(before.requests)
    assert (len(after.each), len(after.requests)) == (1, 36)


def test_a_crash_before_the_record_is_written_loses_nothing(taken, quick_controls, monkeypatch):
    before = sessions.read("x")
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sessions.confirm(before)
    assert len(pd.read_parquet(taken / "requests.parquet")) == 72, "rows of which run.json says nothing"
    left = sessions.read("x")
    assert left.requests.equals(before.requests) and not left.confirmed and sessions.wanted(left, "REGRESSED")
    assert len(sessions.confirm(left).requests) == 72


@pytest.mark.parametrize("status, changes, expected", [
    ("REGRESSED", {}, True), ("INCONCLUSIVE", {}, True), ("PASSED", {}, False), ("IMPROVED", {}, False), ("INVALID", {}, False),
    ("REGRESSED", {"confirmation": {"problem": "the engine died"}}, False),
    ("REGRESSED", {"machine": {"platform": "elsewhere"}}, False),
])
def test_when_a_confirming_session_is_wanted(taken, status, changes, expected):
    measured = sessions.read("x")
    measured.record.update(changes)
    assert sessions.wanted(measured, status) is expected


def test_another_subject_is_not_pooled(taken, quick_controls):
    record = files.read_json(taken / "run.json")
    files.write_json(taken / "run.json", record | {"prompts_sha256": "other", "subject": record["subject"] | {"packages": {}}})
    after = sessions.confirm(sessions.read("x"))
    assert after.record["confirmation"]["problem"] == "RuntimeError: changed since the first session: packages, prompts"


def test_an_interrupted_session_is_no_outcome(taken, quick_controls, monkeypatch):
    monkeypatch.setattr(measurement, "measure", lambda *_: measurement.Session(stopped="interrupted", interrupted=True))
    with pytest.raises(KeyboardInterrupt):
        sessions.confirm(sessions.read("x"))
    assert sessions.wanted(sessions.read("x"), "REGRESSED")


# -- the verdict over two looks -----------------------------------------------------------------

GOLDEN = goldens.Golden(
    run="x", key=goldens.Key(work="w", prompts="p", platform="P"), subject={}, environment={}, controls={"host_s": [[1.0], [1.02]]}, correct=None, sequences=[],
    metrics={"output_tok_s": goldens.Samples(unit="tok/s", direction="higher", sessions=[[99.5, 100.0, 100.5], [100.5, 101.0, 100.0], [99.0, 99.5, 100.0]])},
    sessions=[goldens.Session(finished="2026-01-01", visit="v", commit="c", dirty=False)] * 3)


def looks(speeds: list[list[float]], host: list[float]) -> list[dict]:
    """The first look and, with two sessions, the one at both."""
    index = [(session, number) for session, values in enumerate(speeds, 1) for number in range(1, len(values) + 1)]
    frame = pd.DataFrame({"output_tok_s": np.concatenate(speeds)}, index=pd.MultiIndex.from_tuples(index, names=["session", "repetition"]))
    gates = {"output_tok_s": params.Gate()}
    return [results.look(gates, GOLDEN, frame.loc[list(range(1, count + 1))], [{"host_s": [h]} for h in host[:count]]) for count in range(1, len(speeds) + 1)]


@pytest.mark.parametrize("speeds, host, statuses, declared", [
    ([[95.0, 95.5, 94.5], [100.0, 100.5, 100.0]], [1.0, 1.0], ["REGRESSED", "PASSED"],
     "first look: REGRESSED (output_tok_s -5.0 %); a confirming session was taken: PASSED (output_tok_s -2.4 %) by both together"),
    ([[95.0, 95.5, 94.5], [95.0, 94.5, 95.5]], [1.0, 1.0], ["REGRESSED", "REGRESSED"],
     "first look: REGRESSED (output_tok_s -5.0 %); a confirming session was taken: REGRESSED (output_tok_s -5.0 %) by both together"),
    ([[101.0, 101.5, 100.5], [101.0, 101.5, 100.5]], [0.85, 1.01], ["INCONCLUSIVE", "PASSED"],
     "first look: INCONCLUSIVE (output_tok_s +1.0 %, the machine itself changed); a confirming session was taken: PASSED (output_tok_s +1.0 %) by both together"),
    ([[100.0, 100.5, 99.5], [100.0, 100.5, 99.5]], [0.7, 0.7], ["INCONCLUSIVE", "INCONCLUSIVE"], None),
    ([[93.0, 93.5, 92.5], [93.0, 92.5, 93.5]], [1.3, 1.3], ["INCONCLUSIVE", "INCONCLUSIVE"], None),
    ([[93.0, 93.5, 92.5], [93.0, 92.5, 93.5]], [0.7, 0.7], ["REGRESSED", "REGRESSED"], None),
    ([[100.0, 100.5, 99.5]], [1.3], ["PASSED"], ""),
    ([[100.0, 100.5, 99.5]], [1.0], ["PASSED"], ""),
    ([[93.0, 93.5, 92.5], [93.0, 92.5, 93.5]], [1.09, 1.09], ["INCONCLUSIVE", "INCONCLUSIVE"],
     "first look: INCONCLUSIVE (output_tok_s -7.0 %, the machine may have caused it); a confirming session was taken: "
     "INCONCLUSIVE (output_tok_s -7.0 %, the machine may have caused it) by both together"),
    ([[93.0, 93.5, 92.5], [93.0, 92.5, 93.5]], [1.09, 1.0], ["INCONCLUSIVE", "REGRESSED"],
     "first look: INCONCLUSIVE (output_tok_s -7.0 %, the machine may have caused it); a confirming session was taken: REGRESSED (output_tok_s -7.0 %) by both together"),
], ids=["recovers", "confirmed", "disturbed briefly", "a pass on a faster machine", "a loss on a slower one", "a loss on a faster one",
     "a pass on a slower one", "settled", "slower machine", "slower machine for one session"])
def test_two_looks(speeds, host, statuses, declared):
    found = looks(speeds, host)
    assert [look["status"] for look in found] == statuses
    if declared is not None:
        assert results.declaration(found, len(found) > 1) == declared
    status, _ = results.verdict_of(Completeness(1, 1, 0.0, 0.0, []), GOLDEN, "", found[-1]["gates"], None, None)
    assert status == statuses[-1], "the pooled data decide"
    assert [look["gates"]["output_tok_s"]["status"] for look in found] == statuses, "a metric says what the run says"


def test_a_golden_without_distributions_still_reads(taken):
    path = taken / "session.json"
    values = files.read_json(path)
    del values["requests"]
    files.write_json(path, values)
    old = goldens.read(path)
    assert old.requests == {} and goldens.merge(old, old).requests == {}


def test_distributions_are_merged_by_session(taken):
    session = goldens.read(taken / "session.json")
    merged = goldens.merge(session, session, session)
    assert [len(s) for s in merged.requests["E2E"]] == [21] * 3
    e2e = merged.requests["E2E"][0]
    assert e2e == sorted(e2e) and 0.39 < e2e[0], "the script's 0.2 s and 10 gaps of 0.02 s"
