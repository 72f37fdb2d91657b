"""Recording through the real notebooks against a scripted server, and what the same notebooks make of damaged goldens."""
import json
import re
import subprocess
import sys

import pytest
import scripted_server
from conftest import ROOT, command, environment, finished
from workbook import candidates, exams, files, goldens, params, paths, platforms, recording, runner, runs, schemas, statuses
from workbook.errors import BadInput

EXAM = """
run: quick
title: "A scripted server"
engine: endpoint
endpoint: {url}
subject: jsonl
subject_path: {prompts}
num_prompts: 6
chat_template: false
max_tokens: 8
ignore_eos: true
load: closed
concurrency: [2]
repetitions: 2
gates: {{output_tok_s@2: {{delta: 0.6, margin: 0.5}}}}
"""
# The gate is wide on purpose: what is tested here is the path, on a machine that may be busy.
GATED = "output_tok_s@2"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A user's folders, a server that runs, and no git, so that changes to this checkout do not matter."""
    folder = tmp_path_factory.mktemp("record")
    names = ("params", "goldens", "reports")
    for name in names:
        (folder / name).mkdir()
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"word {n}"}) + "\n" for n in range(6)))
    with pytest.MonkeyPatch.context() as patch, scripted_server.running({"ttft": 0.02, "gap": 0.01}) as server:
        for name in names:
            patch.setenv(f"GOLDBOOK_{name.upper()}", str(folder / name))
        patch.setenv("GIT_DIR", str(folder / "nowhere"))
        (folder / "params" / "quick.yaml").write_text(EXAM.format(url=server.url, prompts=folder / "prompts.jsonl"))
        yield folder


def call(*words):
    return finished(command(*words), environment(), 400)


@pytest.fixture(scope="module")
def blessed(place):
    """Two sessions, one added to them, and the candidate blessed."""
    first = call("record", "quick", "--sessions", "2")
    partial = candidates.path_of("quick").read_text()
    refused = call("bless", "quick", "--reason", "too early")
    added = call("record", "quick", "--sessions", "1", "--add")
    done = call("bless", "quick", "--reason", "the first one")
    return first, partial, refused, added, done


@pytest.mark.engine
def test_sessions_are_added_until_there_are_enough(place, blessed):
    first, partial, refused, added, done = blessed
    assert first.returncode == 0 and "2 sessions; expected at least 3" in first.stderr, first.stderr
    assert len(json.loads(partial)["sessions"]) == 2
    assert str(page := place / "reports" / "index.html") in first.stderr and "as a session of a recording" in page.read_text()
    assert refused.returncode == 2 and "cannot be blessed: 2 sessions" in refused.stderr
    assert added.returncode == 0 and 'make it the golden with: make bless RUN=quick REASON="..."' in added.stderr, added.stderr
    assert done.returncode == 0, done.stderr
    (path,) = (place / "goldens").glob("*/quick.json")
    golden = goldens.read(path)
    assert [len(s) for s in golden.metrics[GATED].sessions] == [5, 5, 5] and len(golden.sessions) == len(golden.controls["host_s"]) == 3
    assert golden.recorded == sorted(golden.recorded) and {s.commit for s in golden.sessions} == {"unknown"}
    assert {s.visit for s in golden.sessions} == {platforms.visit()}
    assert any(json.loads(p.read_text())["sessions"] == json.loads(partial)["sessions"] for p in (place / "reports" / "history" / "goldens" / "candidates").glob("*.json"))


@pytest.mark.engine
def test_sessions_are_added_to_the_golden_where_no_candidate_is(place, blessed):
    """A host that is new each time: what it has is the checkout. (Before the tests that take a stage in this process: with that
    stage's processes the scripted server ends too.)"""
    (path,) = (place / "goldens").glob("*/quick.json")
    candidates.path_of("quick").unlink()
    added = call("record", "quick", "--sessions", "1", "--add")
    assert added.returncode == 0, added.stderr
    before, made = goldens.read(path), goldens.read(candidates.path_of("quick"))
    assert made.sessions[:3] == before.sessions and len(made.sessions) == 4 and (made.blessing, made.anchor, made.history) == (None, None, [])
    done = call("bless", "quick", "--reason", "a fourth", "--accept-regression")  # this machine may be busy
    assert done.returncode == 0 and "3 of the new sessions are the old ones" in done.stdout + done.stderr, done.stderr
    after = goldens.read(path)
    assert (len(after.sessions), len(after.history), after.anchor) == (4, 2, before.anchor)


@pytest.mark.engine
def test_candidates_of_several_machines_are_pooled(place, blessed, folders):
    """The golden's sessions as files of their own, and put together again; nothing is measured."""
    (path,) = (place / "goldens").glob("*/quick.json")
    golden = goldens.read(path)
    (folders / "params" / "quick.yaml").write_text((place / "params" / "quick.yaml").read_text())

    def part(number, **changed):
        alone = golden.model_copy(deep=True)
        for samples in alone.metrics.values():
            samples.sessions = [samples.sessions[number]]
        alone.controls, alone.requests = ({name: [found[number]] for name, found in kept.items()} for kept in (alone.controls, alone.requests))
        alone.sessions = [alone.sessions[number]]
        goldens.write(folders / f"machine {number}.json", alone.model_copy(update=changed))
        return f"machine {number}.json"
    names = [part(number, work=None) for number in range(3)]  # as recorded before goldens said what was asked

    def pooled(*more, places=names):
        return finished(command("record", "quick", "--from", " ".join(f"'{folders / name}'" for name in places), *more), environment(GIT_DIR=str(place / "nowhere")))
    done = pooled()
    assert done.returncode == 0 and "3 sessions" in done.stderr, done.stderr
    made = goldens.read(candidates.path_of("quick"))
    assert made.sessions == golden.sessions[:3] and made.blessing is None and made.work == golden.work is not None
    assert made.metrics[GATED].sessions == golden.metrics[GATED].sessions[:3] and made.controls["host_s"] == golden.controls["host_s"][:3]

    for said, done in (("its session of .* is in the candidate already", pooled(places=[names[0], names[0]])),
                       ("its session of .* is in the candidate already", pooled("--add")),
                       ("SESSIONS: FROM takes the sessions that are in its files", pooled("--sessions", "2")),
                       ("FROM is empty", pooled(places=[])),
                       ("none.json", pooled(places=["none.json"])),
                       ("key 'run' is 'other'", pooled(places=[part(1, run="other")])),
                       ("other parameters than run 'quick' has now", pooled(places=[part(1, key=golden.key.model_copy(update={"work": "x"}))])),
                       (r"machine 1.json: sessions of 'quick' differ in what was run: driver", pooled(places=[names[0], part(1, subject=golden.subject | {"driver": "1"})])),
                       ("FROM is .*: No closing quotation", finished(command("record", "quick", "--from", "'a"), environment()))):
        assert done.returncode == 2 and re.search(said, done.stderr) and done.stderr.count("\n") == 1, (said, done.stderr)
    part(1)
    assert goldens.read(candidates.path_of("quick")) == made  # what was refused has changed nothing
    candidates.path_of("quick").unlink()
    again = pooled(places=names[:1])
    assert again.returncode == 0 and "1 session; expected at least 3" in again.stderr
    grown = pooled("--add", places=names[1:])
    assert grown.returncode == 0 and goldens.read(candidates.path_of("quick")).sessions == golden.sessions[:3], grown.stderr


@pytest.fixture
def whole(place, blessed):
    """The golden's file, put back after the test, and a function that compares the last session with it again."""
    (path,) = (place / "goldens").glob("*/quick.json")
    before = path.read_text()

    def compared():
        folder, exam = paths.run_folder("quick"), params.check(runs.read_record("quick")["params"])
        (folder / "result.json").unlink(missing_ok=True)
        if problem := runner.run_stage(exam, "compare", folder):
            return "INVALID", problem
        found = schemas.read_result(folder / "result.json")
        return found["status"], found["sentence"]
    yield path, compared
    for file in path.parent.parent.glob("*/quick.json"):
        file.unlink()
    files.write_text(path, before)


@pytest.mark.engine
@pytest.mark.parametrize("damage, status, said", [
    (lambda text: text, "PASSED", f"{GATED} "),
    (lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "metrics"} | {"metrics": {}}), "NO_GOLDEN", f"{GATED} is gated and the golden does not have it"),
    (lambda text: text[:900], "INVALID", "not readable as JSON"),
    (lambda text: text.replace('"sessions": [[', '"sessions": [[NaN, ', 1).replace('"sessions": [\n', '"sessions": [[NaN],\n', 1), "INVALID", "Input should be a finite number"),
    (lambda text: text.replace('"schema_version": 2', '"schema_version": 1'), "INVALID", "so record and bless it again"),
    (lambda text: text.replace('"work": "', '"work": "0'), "NO_GOLDEN", "recorded with other parameters"),
    (lambda text: json.dumps(json.loads(text) | {"key": json.loads(text)["key"] | {"platform": "Other"}}), "NO_GOLDEN", "was recorded on 'Other'"),
], ids=["whole", "metric dropped", "truncated", "nan", "old version", "other work", "other platform"])
def test_a_golden_and_its_verdict(whole, damage, status, said):
    path, compared = whole
    path.write_text(damage(path.read_text()))
    found, sentence = compared()
    assert (found in ("PASSED", "INCONCLUSIVE") if status == "PASSED" else found == status) and said in sentence, (found, sentence)
    assert statuses.exit_code([found], strict=True) == (2 if status in ("INVALID", "NO_GOLDEN") else statuses.STRICT_EXIT_CODES.get(found, 0))


@pytest.mark.engine
def test_a_golden_of_another_platform_is_named(whole):
    path, compared = whole
    other = path.parent.parent / "Other CPU x2" / path.name
    other.parent.mkdir()
    path.rename(other)
    status, sentence = compared()
    assert status == "NO_GOLDEN" and "the nearest with one is 'Other CPU x2'" in sentence


@pytest.mark.engine
def test_a_metric_that_the_run_lacks(whole, place):
    """A gated one makes the run INVALID, before there is a golden too; another one is listed as missing."""
    path, compared = whole
    values = json.loads(path.read_text())
    values["metrics"]["goodput_s@2"] = values["metrics"]["requests_s@2"]
    path.write_text(json.dumps(values))
    compared()
    assert schemas.read_result(paths.run_folder("quick") / "result.json")["metrics"]["goodput_s@2"]["sessions"] == []
    record = paths.run_folder("quick") / "run.json"
    kept = record.read_text()
    record.write_text(json.dumps(json.loads(kept) | {"params": json.loads(kept)["params"] | {"gates": {"energy_j_per_token@2": {}}}}))
    try:
        for golden in (True, False):
            if not golden:
                path.unlink()
            status, sentence = compared()
            assert status == "INVALID" and "energy_j_per_token@2 is gated and could not be measured" in sentence
    finally:
        record.write_text(kept)


@pytest.mark.engine
def test_an_invalid_session_is_not_recorded(place, blessed):
    before = candidates.path_of("quick").read_text()
    with scripted_server.running({"ttft": 0.0, "fault": "truncate"}) as broken:
        done = call("record", "quick", "--sessions", "1", "--set", f"endpoint={broken.url}")
    assert done.returncode == 2 and "cannot be recorded: " in done.stderr and "not one request was answered" in done.stderr, done.stderr
    assert [r["status"] for r in json.loads((place / "reports" / "summary.json").read_text())["runs"] if r["run"] == "quick"] == ["INVALID"]
    assert candidates.path_of("quick").read_text() == before and not (paths.run_folder("quick") / "session.json").exists()


# -- refused before anything starts -------------------------------------------------------------


def test_a_changed_checkout_is_refused(place, monkeypatch):
    monkeypatch.setattr(platforms, "changed_files", lambda: ["a.py", "b.py", "c.py", "d.py"])
    with pytest.raises(BadInput, match=r"the checkout has uncommitted changes \(a.py, b.py, c.py and 1 more\); expected a clean one"):
        recording.record("quick")


def test_an_exam_that_is_not_in_git_is_not_recorded(place, monkeypatch):
    """Its golden would name a commit that does not hold it."""
    monkeypatch.setattr(platforms, "untracked", lambda path: path.name == "quick.yaml")
    with pytest.raises(BadInput, match="^params/quick.yaml: is not in git; expected it committed, so that the golden's commit says what was measured$"):
        recording.record("quick")


@pytest.mark.parametrize("take", [recording.record, runner.run])
def test_an_argument_that_vllm_does_not_know_is_refused(place, take):
    params_file = place / "params" / "own.yaml"
    params_file.write_text("run: own\nengine_args: {max_num_seq: 8}\n")
    try:
        with pytest.raises(BadInput, match="^key 'engine_args' has 'max_num_seq' .value 8.; expected an argument of vLLM's engine; did you mean 'max_num_seqs'"):
            take("own")
    finally:
        params_file.unlink()
    assert not paths.run_folder("own").exists() and not candidates.path_of("own").exists()


def test_changes_to_goldens_are_none(tmp_path, monkeypatch):
    monkeypatch.delenv("GIT_DIR", raising=False)
    for words in (("init", "-q"), ("config", "user.name", "x"), ("config", "user.email", "x@example.org")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    for name in ("goldens/a.json", "notebooks/b.py", "notebooks/workbook/verdicts.py", "README.md"):
        files.write_text(tmp_path / name, "1")

    def commit():
        subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
        subprocess.run(["git", "commit", "-qm", "x"], cwd=tmp_path, check=True)
        return platforms.git_state()["commit"]
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    first = commit()
    files.write_text(tmp_path / "goldens/a.json", "2")
    files.write_text(tmp_path / "untracked", "2")
    assert platforms.changed_files() == [] and platforms.git_state() == {"commit": first, "dirty": False}
    assert platforms.untracked(tmp_path / "untracked") and not platforms.untracked(tmp_path / "README.md") and not platforms.untracked(tmp_path.parent / "elsewhere")
    files.write_text(tmp_path / "README.md", "2")
    files.write_text(tmp_path / "notebooks/workbook/verdicts.py", "2")
    assert platforms.changed_files() == ["README.md", "notebooks/workbook/verdicts.py"] and platforms.git_state()["dirty"]
    changes = platforms.git_state()["changes"]
    files.write_text(tmp_path / "README.md", "3")
    assert platforms.git_state()["changes"] != changes, "as many files, changed otherwise"
    second = commit()
    assert platforms.same_code(first, second)
    cell = {"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": [], "source": ["1 + 1"]}
    book = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    files.write_json(tmp_path / "notebooks/c.ipynb", book)
    commit()
    files.write_json(tmp_path / "notebooks/c.ipynb", book | {"cells": [cell | {"execution_count": 1, "outputs": [{"output_type": "stream", "name": "stdout", "text": "2"}], "source": "1 + 1"}]})
    assert platforms.changed_files() == [] and not platforms.git_state()["dirty"], "as JupyterLab leaves it when it was run"
    for changed in ({"cells": [cell | {"source": ["1 + 2"]}]}, {"cells": [cell | {"metadata": {"tags": ["parameters"]}}]}, {"cells": []}, {}):
        files.write_json(tmp_path / "notebooks/c.ipynb", changed)
        assert platforms.changed_files() == ["notebooks/c.ipynb"] and platforms.git_state()["dirty"]
    files.write_json(tmp_path / "notebooks/c.ipynb", book)
    files.write_text(tmp_path / "notebooks/b.py", "2")
    third = commit()
    assert platforms.changed_code(second, third) == ["notebooks/b.py", "notebooks/c.ipynb"] and not platforms.same_code(first, third)
    for unknown in ("unknown", None, "f" * 40, f"--output={tmp_path / 'written'}"):
        assert platforms.changed_code(first, unknown) is None and not platforms.same_code(unknown, second)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("words, said", [
    (("--sessions", "0"), "SESSIONS is 0; expected 1 or more"),
    (("--sessions", "abc"), "SESSIONS is 'abc'; expected a whole number"),
    (("--set", "num_prompts=3"), "SET changes the work of run 'quick'"),
])
def test_what_could_not_be_blessed_is_not_recorded(place, words, said):
    done = call("record", "quick", *words)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_adding_wants_the_same_thing(place, folders):
    (folders / "params" / "quick.yaml").write_text((place / "params" / "quick.yaml").read_text())
    with pytest.raises(BadInput, match="no golden, and no candidate, to add to; expected `make record RUN=quick` without ADD=1 first"):
        recording.record("quick", add=True)
    exam = exams.load("quick")
    subject = {"engine_args": {"max_num_seqs": 4}, "env": {}, "packages": platforms.versions(), "driver": platforms.driver(), "commit": platforms.git_state()["commit"]}
    key = goldens.Key(work="other", prompts="p", platform=platforms.platform_id(exam))
    goldens.write(candidates.path_of("quick"), goldens.Golden(run="quick", key=key, subject=subject, environment={}, controls={}, metrics={}, correct=None, sequences=[], sessions=[]))
    with pytest.raises(BadInput, match=r"cannot be added to: work is .* and not 'other'; engine_args.max_num_seqs is None and not 4; expected"):
        recording.record("quick", add=True)


def test_what_is_in_quotes_stays_so(tmp_path):
    """A golden keeps its reason for good. (The workbook is a program that shows its words.)"""
    (tmp_path / "python").write_text('#!/bin/sh\nfor word in "$@"; do echo "<$word>"; done\n')
    (tmp_path / "python").chmod(0o755)
    def said(*words):
        return subprocess.run(["make", "-s", f"PY={tmp_path / 'python'}", *words], cwd=ROOT, capture_output=True, text=True).stdout
    assert '<it\'s "fast" now>' in said("bless", "RUN=x", 'REASON=it\'s "fast" now') and '<prompt_suffix="a b">' in said("run", "RUN=x", 'SET=prompt_suffix="a b"')


def test_make_hands_its_words_on(place):
    def said(*words):
        return subprocess.run(["make", "-n", f"PY={sys.executable}", *words], cwd=ROOT, capture_output=True, text=True).stdout
    assert 'record "x" --sessions "2" --add' in said("record", "RUN=x", "SESSIONS=2", "ADD=1")
    assert '--from "$FROM"' in said("record", "RUN=x", "FROM=a b")
    assert "--add" not in said("record", "RUN=x", "ADD=0") and "--accept" not in said("bless", "RUN=x", "REASON=y")
    assert 'bless "x" --reason "$REASON" --accept-regression' in said("bless", "RUN=x", "REASON=y", "ACCEPT_REGRESSION=1")
