"""Candidates: what speaks against one, what blessing it prints and keeps, and that nothing else becomes a golden."""
import copy
import hashlib
import json
import subprocess

import numpy as np
import pandas as pd
import pytest
from conftest import command, environment
from workbook import candidates, exams, files, goldens, metrics, platforms, recording, summary, verdicts
from workbook.errors import BadInput

PLATFORM = "Test CPU x2"
EXAM = "run: x\ngates: {output_tok_s: {delta: 0.1, margin: 0.03}}\n"
SPEEDS = [[100.0, 101.0, 99.0, 100.0, 100.5], [101.0, 100.0, 100.0, 99.0, 100.0], [99.5, 100.0, 101.0, 100.0, 99.0]]


@pytest.fixture
def exam(folders):
    (folders / "params" / "x.yaml").write_text(EXAM)
    return exams.load("x")


def candidate(exam, speeds=SPEEDS, *, right=0.5, day="2026-01-01", dirty=False):
    """A candidate with these speeds in tok/s, a list a session, written where bless looks for it."""
    correct = pd.DataFrame({"prompt_id": np.repeat(range(40), 2), "sample": [0, 1] * 40, "correct": [i < 80 * right for i in range(80)]})
    sessions = []
    for number, values in enumerate(speeds):
        index = pd.MultiIndex.from_tuples([(1, i + 1) for i in range(len(values))], names=["session", "repetition"])
        frame = pd.DataFrame({"output_tok_s": values, "makespan_s": [1000 / v for v in values]}, index=index)
        record = {"params": {"run": "x"}, "work_sha256": exam.work_hash(), "prompts_sha256": "p", "controls": {"host_s": [1.0, 1.1]}, "subject": {"model": "m"},
                  "machine": {"platform": PLATFORM, "visit": "v", "git": {"commit": "c", "dirty": dirty}}, "finished": f"{day}T0{number}:00:00+00:00"}
        sessions.append(goldens.session_of(record, frame, correct, []))
    made = goldens.merge(*sessions)
    goldens.write(candidates.path_of("x"), made)
    return made


def scaled(factor):
    return [[v * factor for v in values] for values in SPEEDS]


def bless(reason="because", **more):
    said = []
    try:
        return goldens.read(candidates.bless("x", reason, "somebody", tell=said.append, **more)), "\n".join(said)
    except BadInput as error:
        return str(error), "\n".join(said)


def golden_path():
    return goldens.path_of(PLATFORM, "x")


# -- what speaks against one --------------------------------------------------------------------


def test_a_session_beside_other_work_is_no_baseline(exam):
    made = candidate(exam)
    made.metrics["others_cpu_pct"] = goldens.Samples(unit="%", direction="lower", sessions=[[1.0, 2.0], [1.0, 30.0], [0.0, 0.0]])
    assert candidates.problems(made, exam) == ["session 2 was recorded while other processes took 16 % of the cores; expected at most 5 %"]


def test_sessions_that_read_one_model_differently_are_no_baseline(exam):
    made = candidate(exam)
    made.self_drift = [0.02, 0.4]
    assert candidates.problems(made, exam) == ["its sessions read the same answers of the same weights 0.4 nats apart; expected at most 0.1, for 3 times as much would pass as no drift"]
    made.self_drift = [0.02, 0.1]
    assert candidates.problems(made, exam) == []


def damaged(change):
    values = files.read_json(candidates.path_of("x"))
    change(values)
    candidates.path_of("x").write_text(json.dumps(values))


def edit_speed(values, speeds):
    values["metrics"]["output_tok_s"]["sessions"] = speeds


@pytest.mark.parametrize("change, said", [
    (lambda v: edit_speed(v, [[float("nan")] * 5] * 3), "key 'metrics.output_tok_s.sessions.0.0': Input should be a finite number"),
    (lambda v: v.pop("sessions"), "key 'sessions': Field required"),
    (lambda v: v.update(schema_version=1), "key 'schema_version' is 1; expected 2, so record and bless it again"),
    (lambda v: v["key"].update(work="other"), "recorded with other parameters than params/x.yaml has now"),
    (lambda v: v.update(run="y"), "recorded for run 'y'; expected 'x'"),
    (lambda v: v["metrics"].update(output_tok=v["metrics"]["makespan_s"]), "unknown metric 'output_tok'; did you mean 'output_tok_s'"),
    (lambda v: v["metrics"].pop("output_tok_s"), "output_tok_s is gated and was not measured in every session"),
    (lambda v: edit_speed(v, SPEEDS[:2]), "output_tok_s has samples of 2 sessions; expected 3"),
    (lambda v: edit_speed(v, [[0.0] * 5] * 3), "output_tok_s has a sample that is not a positive number"),
    (lambda v: v["sessions"][1].update(dirty=True), "session 2 was recorded on a checkout with uncommitted changes"),
], ids=["nan", "no sessions", "old version", "other work", "other run", "unknown metric", "no gated metric", "lost session", "zero", "dirty"])
def test_a_candidate_that_is_not_whole_is_not_blessed(exam, change, said):
    candidate(exam)
    damaged(change)
    assert said in bless()[0] and not golden_path().exists()


def test_a_truncated_candidate_is_not_blessed(exam):
    candidate(exam)
    path = candidates.path_of("x")
    path.write_text(path.read_text()[:500])
    assert "not readable as JSON" in bless()[0] and not golden_path().exists()


@pytest.mark.parametrize("speeds, said", [
    (SPEEDS[:1], "1 session; expected at least 3 (make record RUN=x ADD=1 adds some)"),
    (SPEEDS[:2], "2 sessions; expected at least 3"),
    ([*SPEEDS[:2], SPEEDS[2][:4]], "a session of 4 repetitions; expected at least 5 in each"),
])
def test_too_little_is_not_blessed(exam, speeds, said):
    candidate(exam, speeds)
    assert said in bless()[0] and not golden_path().exists()


def test_an_exam_that_changed_since_wants_a_new_recording(exam, folders):
    candidate(exam)
    (folders / "params" / "x.yaml").write_text(EXAM + "num_prompts: 7\n")
    assert "other parameters than params/x.yaml has now" in bless()[0] and not golden_path().exists()


def test_blessing_wants_a_reason_and_a_candidate(exam):
    assert bless(" ")[0].startswith("REASON is empty")
    assert "no candidate; expected `make record RUN=x` first" in bless()[0]


def test_goldens_that_cannot_be_written(exam, folders, monkeypatch):
    candidate(exam)
    (folders / "file").touch()
    monkeypatch.setenv("GOLDBOOK_GOLDENS", str(folders / "file"))
    assert "cannot be written" in bless()[0] and "GOLDBOOK_GOLDENS names another" in bless()[0]


def test_a_trend_within_sessions_is_found_and_levels_of_sessions_are_none():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.005, (3, 5))
    rising = np.exp(np.linspace(0, 0.05, 5) + noise) * 100
    change, p = candidates.trend(rising.tolist())
    assert p < candidates.TREND_P and 0.03 < change < 0.07
    apart = np.exp(noise) * [[100], [120], [80]]
    assert candidates.trend(apart.tolist())[1] > 0.05
    assert candidates.trend([[100.0, 101.0, 102.01]])[1] < 1e-6, "a line without noise"
    assert candidates.trend([[100.0]]) == (0.0, 1.0) and candidates.trend([[100.0] * 5] * 3) == (0.0, 1.0)


def test_a_trend_is_found_as_rarely_as_said():
    """Without a trend, p is uniform: 1 % of recordings are below .01 (binomial bounds for 2,000 of them)."""
    rng = np.random.default_rng(1)
    levels = rng.normal(0, 0.02, (2000, 3, 1))
    found = sum(candidates.trend(np.exp(r).tolist())[1] < 0.01 for r in levels + rng.normal(0, 0.01, (2000, 3, 5)))
    assert 5 <= found <= 40


def test_a_recording_that_warms_up_is_refused(exam):
    candidate(exam, [[v * (1 + 0.015 * i) for i, v in enumerate(values)] for values in SPEEDS])
    assert "output_tok_s moves by +" in bless()[0] and "in the course of a session" in bless()[0]
    candidate(exam, [[v * (1 + 0.003 * i) for i, v in enumerate(values)] for values in SPEEDS])
    assert not isinstance(bless()[0], str), "a trend below 4 %, two fifths of the gate's delta of 10 %, is tolerated"


def test_a_trend_that_the_gate_would_not_notice_is_none(exam, folders):
    candidate(exam, [[v * (1 + 0.015 * i) for i, v in enumerate(values)] for values in SPEEDS])
    assert "expected a trend of at most 4.0 %" in bless()[0]
    (folders / "params" / "x.yaml").write_text(EXAM.replace("0.1,", "0.2,"))
    assert not isinstance(bless()[0], str)


def test_noise_above_the_tolerance_is_refused_with_the_delta_it_allows(exam, folders):
    noisy = [[v * (1 + 0.06 * (-1) ** i) for i, v in enumerate(values)] for values in SPEEDS]
    candidate(exam, noisy)
    refused = bless()[0]
    assert "the smallest loss that a new session of 3 repetitions would show is" in refused and "above the gate's delta of 10.0 %" in refused
    delta = refused.split("a delta of ")[1].split(" ")[0]
    assert 0.1 < float(delta) < 0.2
    (folders / "params" / "x.yaml").write_text(EXAM.replace("0.1,", f"{delta},"))
    assert not isinstance(bless()[0], str), "the tolerance was raised: nothing has to be measured again"


def test_noise_is_told_from_the_first_session_on(exam, folders):
    """Two more that cannot help would be taken for nothing."""
    made = candidate(exam, [[v * (1 + 0.06 * (-1) ** i) for i, v in enumerate(SPEEDS[0])]])
    said = candidates.shortage(made)[0]
    assert said.startswith("1 session; expected at least 3 (make record RUN=x ADD=1 adds some); so far output_tok_s: the smallest loss that a new session of 3 repetitions would show is")
    made = candidate(exam, SPEEDS[:1])
    assert candidates.shortage(made) == ["1 session; expected at least 3 (make record RUN=x ADD=1 adds some)"]
    made.metrics["output_tok_s"].sessions = [[]]
    assert candidates.shortage(made) == ["1 session; expected at least 3 (make record RUN=x ADD=1 adds some)"], "a session without samples of it is told by `problems`"


@pytest.mark.parametrize("noise, advised", [(0.06, True), (0.09, False)])
def test_more_sessions_are_advised_only_where_they_would_do(exam, noise, advised):
    candidate(exam, [[v * (1 + noise * (-1) ** i) for i, v in enumerate(values)] for values in SPEEDS])
    refused = bless()[0]
    assert "above the gate's delta of 10.0 %" in refused
    assert ("more sessions (ADD=1), " in refused) is advised and ("% with 12 such sessions in the golden)" in refused) is not advised


def test_the_file_of_a_variant_is_named_with_it(exam):
    assert candidates._file(exams.load("x").model_copy(update={"run": "x@gpu1"})) == "params/x.yaml (variant gpu1)"


def test_a_metric_that_was_nothing_before_is_no_change(exam, folders):
    """Gated since; a golden of before has a sample of 0, which has no log."""
    old = candidate(exam)
    old.metrics["preemptions"] = goldens.Samples(unit="requests", direction="lower", sessions=[[0.0] * 5] * 3)
    goldens.write(candidates.path_of("x"), old)
    bless()
    (folders / "params" / "x.yaml").write_text(EXAM.replace("}}", "}, preemptions: {}}"))
    new = candidate(exam, day="2026-01-02")
    new.metrics["preemptions"] = goldens.Samples(unit="requests", direction="lower", sessions=[[3.0, 3.1, 2.9, 3.0, 3.0]] * 3)
    goldens.write(candidates.path_of("x"), new)
    made, said = bless()
    assert not isinstance(made, str), made
    assert [line.split() for line in said.splitlines() if line.startswith("preemptions")] == [["preemptions", "–", "2.999"]]


def test_the_smallest_visible_loss_is_that_of_the_verdict():
    for repetitions in (3, 5):
        seen = verdicts.visible(SPEEDS, repetitions)
        like = np.exp(np.resize([0.0, 0.01, -0.01, 0.005, -0.005], repetitions))
        found = verdicts.judge(SPEEDS, [list(100 * like)], direction="higher", margin=0.0)
        assert seen == pytest.approx(-np.expm1(-found.smallest_visible), rel=0.35)
    assert verdicts.visible(SPEEDS, 5) < verdicts.visible(SPEEDS, 3) < verdicts.visible(scaled(1)[:2], 3)


# -- blessing -----------------------------------------------------------------------------------


def test_the_chain_from_the_first_golden(exam, folders):
    candidate(exam)
    first, said = bless("the first\none")
    assert (first.blessing.by, first.blessing.reason, first.blessing.supersedes) == ("somebody", "the first one", None)
    assert first.anchor.medians["output_tok_s"] == 100.0 and [h.reason for h in first.history] == ["the first one"]
    assert "old: none" in said and "all new sessions are of one visit" in said
    content = golden_path().read_bytes()
    candidate(exam, scaled(0.99), day="2026-01-02")
    second, said = bless("a little slower")
    assert second.blessing.supersedes == hashlib.sha256(content).hexdigest()
    assert second.anchor == first.anchor and [h.means["output_tok_s"] for h in second.history] == pytest.approx([100.0, 99.0], rel=1e-3)
    assert [line.split() for line in said.splitlines() if line.startswith("output_tok_s")][0][:5] == ["output_tok_s", "100", "99", "-1.0", "%"]
    candidate(exam, scaled(0.98), day="2026-01-03")
    third, said = bless("a little slower again")
    assert "PASSED" in said and said.rstrip().splitlines()[-2].endswith("-2.0 %"), "drift is counted from the anchor"
    assert len(third.history) == 3 and content in [p.read_bytes() for p in (folders / "reports" / "history").rglob("*.json")]


def test_a_loss_wants_to_be_accepted(exam):
    candidate(exam)
    bless()
    before = golden_path().read_bytes()
    candidate(exam, scaled(0.85))
    refused, said = bless()
    assert "output_tok_s -15.0 %; expected no loss, or ACCEPT_REGRESSION=1" in refused and "REGRESSED" in said
    assert golden_path().read_bytes() == before
    assert bless(accept_regression=True)[0].history[-1].means["output_tok_s"] == pytest.approx(85.0, rel=1e-3)


@pytest.mark.parametrize(("margin", "refused"), [(0.03, True), (0.06, False)])
def test_a_loss_is_what_the_gate_calls_one(folders, margin, refused):
    (folders / "params" / "x.yaml").write_text(f"run: x\ngates: {{output_tok_s: {{delta: 0.1, margin: {margin}}}}}\n")
    candidate(exams.load("x"))
    bless()
    candidate(exams.load("x"), scaled(0.95))
    assert ("ACCEPT_REGRESSION=1" in bless()[0]) if refused else bless()[0].history[-1].means["output_tok_s"] == pytest.approx(95.0, rel=1e-2)


def test_a_slower_machine_excuses_no_loss_in_a_golden(exam):
    candidate(exam)
    bless()
    made = candidate(exam, scaled(0.95))
    made.controls = {"host_s": [[1.08]] * 3}
    goldens.write(candidates.path_of("x"), made)
    assert "ACCEPT_REGRESSION=1" in bless()[0]


def test_sessions_that_are_added_to_a_golden_are_what_is_judged(exam):
    """Or one slow session after the other would pass among the many that were there."""
    candidate(exam)
    bless()
    candidate(exam, SPEEDS + scaled(0.94)[:1])
    refused, said = bless()
    assert "output_tok_s -5.9 %; expected no loss" in refused and "3 of the new sessions are the old ones; the change is that of the 1 added to them" in said
    candidate(exam, SPEEDS + scaled(1.01)[:2])
    golden, said = bless()
    assert len(golden.sessions) == 5 and len(golden.history) == 2 and "PASSED" in said


def test_the_machine_of_the_added_sessions_is_what_is_judged(exam):
    candidate(exam)
    bless()
    made = candidate(exam, SPEEDS + scaled(0.94)[:1])
    made.controls = {"host_s": [[1.0], [1.0], [1.0], [1.3]]}
    goldens.write(candidates.path_of("x"), made)
    assert "the machine itself changed" in bless()[1]


def test_answers_that_are_the_goldens_own_are_not_held_against_it(exam):
    """A golden that grows keeps the answers of its first session; "+0.0 points" would say that the added ones were as good."""
    candidate(exam)
    assert "points on the same" not in bless()[1]
    candidate(exam, SPEEDS + scaled(1.01)[:1], right=0.1)
    golden, said = bless()
    assert not isinstance(golden, str) and "points on the same" not in said and "right answers and lengths stay those of the first" in said
    candidate(exam, right=0.0, day="2026-01-02")
    assert "points on the same 40 questions" in bless()[1], "all sessions are new"


def test_a_session_whose_answers_are_worse_is_not_added(exam):
    """The candidate keeps those of its first session, so nobody would see it later."""
    first, worse, same = candidate(exam), candidate(exam, right=0.1), candidate(exam, scaled(0.5))
    assert candidates.worse(same, first, exam) == [] and [said[:20] for said in candidates.worse(worse, first, exam)] == ["accuracy -40.0 points"[:20]]


def test_loops_in_the_added_sessions_are_not_lost_among_the_others(exam, folders):
    """Eight questions that loop in one session of four would be one answer in eighty."""
    signs = {"loop": [0] * 40}
    candidate(exam)
    made = goldens.read(candidates.path_of("x")).model_copy(update={"rates": {"loop": (0, 480)}, "signs": signs})
    goldens.write(candidates.path_of("x"), made)
    bless()
    made = candidate(exam, SPEEDS + SPEEDS[:1]).model_copy(update={"rates": {"loop": (8, 640)}, "signs": {"loop": [1] * 8 + [0] * 32}})
    goldens.write(candidates.path_of("x"), made)
    assert "8 of 160" in bless()[0]
    made.rates, made.signs = {"loop": (0, 640)}, signs
    goldens.write(candidates.path_of("x"), made)
    assert bless()[0].rates == {"loop": (0, 640)}


def test_two_that_grew_from_one_golden_lose_nothing(exam):
    """The second does not drop what the first has added, nor hide its own loss among the sessions that both have."""
    candidate(exam)
    bless()
    candidate(exam, SPEEDS + scaled(1.0)[:1])
    bless()
    made = candidate(exam, SPEEDS + scaled(0.9)[:1])
    made.sessions[3].finished = "2026-01-09T00:00:00+00:00"
    goldens.write(candidates.path_of("x"), made)
    refused, said = bless()
    assert "1 of the golden's 4 sessions are not in the candidate, which has the other 3: it was made from an older golden (move it away, and record its other sessions anew with ADD=1)" in refused
    assert "output_tok_s -9.9 %" in refused and len(goldens.read(golden_path()).sessions) == 4
    assert bless(accept_regression=True)[0].sessions == made.sessions, "where that is what is meant"


def test_what_sessions_are_added_to_where_the_golden_has_grown_elsewhere(exam):
    """A candidate that was blessed stays in the reports: the golden that has all of it and more is what grows. One with sessions of its own
    would be recorded in vain, and is refused before it is."""
    candidate(exam)
    bless()
    assert recording._base(exam, PLATFORM) == candidates.path_of("x"), "the same sessions"
    elsewhere = candidate(exam, SPEEDS + scaled(1.0)[:1])
    bless()
    candidate(exam)
    assert recording._base(exam, PLATFORM) == golden_path()
    own = candidate(exam, SPEEDS + scaled(1.0)[:1])
    own.sessions[3].mark = "0123456789ab"
    goldens.write(candidates.path_of("x"), own)
    assert own.sessions[3].finished == elsewhere.sessions[3].finished, "in the same second, on another card"
    with pytest.raises(BadInput, match="x.json: cannot be added to: it lacks 1 of the golden's 4 sessions and has others, so that it would never be blessed; expected it moved away"):
        recording._base(exam, PLATFORM)
    candidate(exam, day="2026-02-01")
    assert recording._base(exam, PLATFORM) == candidates.path_of("x"), "a new recording shares none"


def test_how_far_readings_differ_is_kept_of_all_that_are_pooled(exam):
    """In whichever order their files come."""
    quiet, noisy = candidate(exam), candidate(exam, day="2026-01-02")
    quiet.self_drift, noisy.self_drift = [0.01, 0.0], [0.4, 0.0]
    assert sorted(goldens.merge(quiet, noisy).self_drift) == sorted(goldens.merge(noisy, quiet).self_drift) == [0.0, 0.0, 0.01, 0.4]


def test_an_imported_golden_is_not_replaced_by_a_loss_unseen(exam):
    """It does not know the prompts, and judges all the same."""
    candidate(exam)
    imported, _ = bless()
    imported.key.prompts = ""
    goldens.write(golden_path(), imported)
    candidate(exam, scaled(0.5))
    assert "output_tok_s -50.0 %; expected no loss, or ACCEPT_REGRESSION=1" in bless()[0]
    assert bless(accept_regression=True)[0].key.prompts == "p"


def test_what_another_scorer_judged_is_not_compared(exam):
    candidate(exam, right=0.7)
    golden, _ = bless()
    golden.scorer = "numeric"
    goldens.write(golden_path(), golden)
    made = candidate(exam, right=0.4)
    made.scorer = "verl_strict"
    goldens.write(candidates.path_of("x"), made)
    assert bless()[0].scorer == "verl_strict"


def test_answers_that_got_worse_want_to_be_accepted(exam):
    candidate(exam, right=0.7)
    bless()
    candidate(exam, right=0.4)
    assert "accuracy -30.0 points on the same 40 questions" in bless()[0]
    assert bless(accept_regression=True)[0].blessing


def test_another_exam_starts_another_chain(exam, folders):
    candidate(exam)
    bless()
    (folders / "params" / "x.yaml").write_text(EXAM + "num_prompts: 7\n")
    candidate(exams.load("x"), scaled(0.5))
    golden, said = bless()
    assert "the two do not compare" in said and len(golden.history) == 1 and golden.anchor.medians["output_tok_s"] == 50.0
    assert golden.blessing.supersedes


def test_a_golden_that_cannot_be_read_is_not_replaced_by_accident(exam):
    candidate(exam)
    bless()
    golden_path().write_text(golden_path().read_text()[:300])
    assert "the golden there cannot be read, so a loss would not show" in bless()[0]
    assert bless(accept_regression=True)[0].blessing


def test_two_at_once_lose_nothing(exam, folders):
    """Three processes bless at the same time: every golden is in the chain or replaced and kept, and each names the one before."""
    candidate(exam)
    reasons = [f"number {n}" for n in range(3)]
    jobs = [subprocess.Popen(command("bless", "x", "--reason", r), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in reasons]
    assert [(j.communicate(timeout=120)[1], j.returncode)[1] for j in jobs] == [0] * 3
    last = goldens.read(golden_path())
    kept = {hashlib.sha256(p.read_bytes()).hexdigest(): goldens.read(p) for p in (folders / "reports" / "history" / "goldens").rglob("*.json")}
    assert sorted(h.reason for h in last.history) == reasons and len(kept) == 2
    chain = [last]
    while chain[-1].blessing.supersedes:
        chain.append(kept[chain[-1].blessing.supersedes])
    assert [g.blessing.reason for g in chain] == [h.reason for h in reversed(last.history)]


def test_bless_from_the_command_line(exam, workbook):
    candidate(exam)
    done = workbook("bless", "x", "--reason", "because")
    assert done.returncode == 0 and "output_tok_s" in done.stdout and "golden: " in done.stderr
    candidate(exam, scaled(0.8))
    refused = workbook("bless", "x", "--reason", "because")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "ACCEPT_REGRESSION=1" in refused.stderr and "REGRESSED" in refused.stdout
    assert workbook("bless", "x", "--reason", "because", "--accept-regression").returncode == 0


def test_the_summary_has_the_chain(exam):
    candidate(exam)
    history = [h.model_dump() for h in (bless()[0], bless("again")[0])[1].history]
    metric = {"unit": "tok/s", "direction": "higher", "sessions": [[99.0]], "median": 99.0, "golden_sessions": None, "golden_median": None}
    found = [{"run": "x", "metrics": {"output_tok_s": metric}, "golden": {"history": history}}, {"run": "y", "metrics": {}, "golden": None},
             {"run": "z", "metrics": {"output_tok_s": metric}, "golden": {"history": history[:1]}}]
    [(run, name, unit, points, now)] = summary.chains(copy.deepcopy(found))
    assert (run, name, unit, now) == ("x", "output_tok_s", "tok/s", 99.0) and [round(v) for _, v in points] == [100, 100]
    assert metrics.kind(name).unit == unit and platforms.visit()
