"""A/B: which pairs are judged how, what is refused, and the whole path against servers of known speed."""
import re
import signal
import subprocess
import sys
import types

import numpy as np
import pandas as pd
import psutil
import pytest
import scripted_server
from conftest import ROOT, command, environment, page_of
from workbook import ab, exams, experiment_plots, files, paired, params, paths, visit
from workbook.errors import BadInput

TINY = """
run: tiny
title: "Tiny: 4 requests of 20 tokens to a server"
subject: random
input_len: 4
output_len: 20
num_prompts: 4
chat_template: false
max_tokens: 0
ignore_eos: true
engine: endpoint
endpoint: http://127.0.0.1:9
warmup: 1
gates: {output_tok_s: {}}
"""
SAME = {"a": "", "b": ""}
NOTHING = exams.parse_set("")


@pytest.fixture
def tiny(folders):
    (folders / "params" / "tiny.yaml").write_text(TINY)
    return folders


def planned(sets=SAME, pairs=8, pythons=("one", "one")):
    """An A/B of `tiny` before its first visit."""
    both = ab.variants("tiny", sets, NOTHING)
    plan = {side: {"set": sets[side], "python": python, "params": both[side].model_dump(mode="json")} for side, python in zip("ab", pythons, strict=True)}
    files.write_json(paths.ab_folder("tiny") / paired.PLAN, {"run": "tiny", "pairs": pairs, "started": "2026-11-01T00:00:00+00:00", "variants": plan})
    return paired.read("tiny")


def visited(experiment, name, speed, control=0.1, prompts="same", **columns):
    """Leave what generate.ipynb leaves of a visit at so many tokens a second: three repetitions, 1 % of noise."""
    folder = paths.ab_folder("tiny") / "visits" / name
    place = folder / "runs" / "tiny"
    place.mkdir(parents=True)
    chance = np.random.default_rng(int(name[:2]))
    rows = []
    for repetition in (1, 2, 3):
        ends = 4 * 20 / (speed * chance.normal(1, 0.01))
        rows += [{"session": 1, "repetition": repetition, "point": 0, "prompt_id": i, "sample": 0, "replica": 0, "prompt_tokens": 4, "max_tokens": 20,
                  "output_tokens": 20, "finish_reason": "length", "arrival_s": 0.0, "queued_s": 0.0, "scheduled_s": 0.0, "first_token_s": ends / 4,
                  "last_token_s": ends, "finished_s": ends} for i in range(4)]
    pd.DataFrame(rows).assign(**columns).to_parquet(place / "requests.parquet")
    pd.DataFrame({"answer": ["x"] * 4}).to_parquet(place / "generations.parquet")
    passes = [{"session": 1, "repetition": r, "point": 0, "counters": {}, "behind": "", "measured": {"startup_s": 9.0} if r == 1 else {}} for r in (1, 2, 3)]
    files.write_json(place / "run.json", {
        "params": experiment.variants[name[-1]]["params"], "session": 1, "finished": "2026-11-01T00:00:00+00:00", "disturbed": [], "prefix_cache_hits": 0,
        "prompts_sha256": prompts, "controls": {"host_s": [control] * 3}, "repetitions": passes,
        "machine": {"gpus": [], "python": "3.11.7"}, "subject": {"weights_sha256": "unknown", "packages": {"vllm": "1.0" if name[-1] == "a" else "2.0"}}})
    files.write_json(folder / paired.OUTCOME, {"problem": ""})


def measured(speed_of, pairs=8, **more):
    """An A/B whose visit number i (from 0) of a variant ran at `speed_of(variant, i)`."""
    experiment = planned(pairs=pairs, **more)
    for i, name in enumerate(paired.order(pairs)):
        visited(experiment, name, speed_of(name[-1], i), control=1 / speed_of("a", i))
    return paired.read("tiny")


def judged(experiment):
    return {name: paired.judge(name, *experiment.samples(name)) for name in experiment.judged}


# -- the pairs ----------------------------------------------------------------------------------


def test_a_comes_first_as_often_as_b():
    names = paired.order(8)
    assert [n[-1] for n in names] == list("abba" * 4) and names[0] == "01-a" and names[-1] == "16-a" and sorted(names) == names


def test_pairs_that_do_not_differ_are_as_good(tiny):
    found = paired.judge("kv_cache_peak_pct", [[50.0]] * 8, [[50.0]] * 8)
    assert found["p"] == 1.0 and found["sentence"] == "B is no different from A in kv_cache_peak_pct (90 % interval +0.0 to +0.0 %): PASSED, a loss of 3 % is ruled out"


@pytest.mark.parametrize("b, status, words", [
    (0.90, "REGRESSED", r"B is slower than A by (9|10)\.\d % in output_tok_s \(90 % interval \+\d+\.\d to \+\d+\.\d %\): FAIL, more than 2 % and more than noise explains \(p = [\de.-]+\)"),
    (1.00, "PASSED", r"B is (slower than A by 0\.\d %|faster than A by 0\.\d %|as fast as A) in output_tok_s \(90 % interval -\d\.\d to \+\d\.\d %\): PASSED, a loss of 3 % is ruled out"),
    (1.10, "IMPROVED", r"B is faster than A by (9|10)\.\d % in output_tok_s .*: IMPROVED"),
])
def test_what_is_judged_how(tiny, b, status, words):
    experiment = measured(lambda side, i: 1000 * (b if side == "b" else 1))
    found = judged(experiment)
    assert paired.verdict_of(experiment, found) == (status, found["output_tok_s"]["sentence"])
    assert re.fullmatch(words, found["output_tok_s"]["sentence"]), found
    assert (found["output_tok_s"]["p"] < 0.05) == (status == "REGRESSED")


def test_answers_that_are_worth_nothing_are_no_measurement(tiny):
    """However fast they came: a visit counts the signs of degeneration where the tokenizer is, and is invalid above a ceiling."""
    experiment = measured(lambda side, i: 1000)
    place = paths.ab_folder("tiny") / "visits" / "02-b"
    free = params.check({"run": "tiny", "num_prompts": 4, "max_tokens": 8})
    rows = pd.DataFrame({"prompt_id": range(4), "answer": ["", "", "", "yes"], "token_ids": [[], [], [], [5, 6]], "finish_reason": "stop"})
    rows.to_parquet(place / "runs" / "tiny" / "generations.parquet")
    assert (found := visit.worthless(free, place / "runs" / "tiny")) == ["3 of 4 answers are empty (75 %); the ceiling of 'empty' is 10 %"]
    assert visit.worthless(experiment.exam, place / "runs" / "tiny") == [], "under ignore_eos they mean nothing"
    files.write_json(place / paired.OUTCOME, {"problem": "", "worthless": found})
    again = paired.read("tiny")
    assert again.problems == [f"visit 02-b: {found[0]}"] and paired.verdict_of(again, judged(again))[0] == "INVALID"


def test_shorter_answers_are_no_speed(tiny):
    """A request that ends after a third of the tokens ends earlier, and nothing was gained."""
    free = TINY.replace("ignore_eos: true", "ignore_eos: false").replace("random\ninput_len: 4\noutput_len: 20", "chain_sum").replace("max_tokens: 0", "max_tokens: 20")
    (tiny / "params" / "tiny.yaml").write_text(free)
    experiment = planned()
    visited(experiment, "01-a", 1000)
    visited(experiment, "02-b", 1000, output_tokens=7, finish_reason="stop")
    assert paired.read("tiny").problems == [
        "visit 02-b: its answers are 35 % as long as those of visit 01-a (7.0 tokens, 20.0 there; expected 90 % to 110 %; p = 0), so the speeds do not compare; "
        'SET="ignore_eos=true" makes all answers as long as max_tokens']


def test_an_open_loop_wants_a_gate(tiny):
    """Its throughput is the schedule's."""
    for gates, has in (("", "nothing"), ("gates: {output_tok_s: {}}", "output_tok_s")):
        (tiny / "params" / "tiny.yaml").write_text(TINY.replace("gates: {output_tok_s: {}}", f"load: poisson\nrequest_rate: 5\n{gates}"))
        with pytest.raises(BadInput, match=f"key 'load' of run 'tiny' is 'poisson' and key 'gates' has {has}: .*; expected a gate of what a request gets"):
            ab.variants("tiny", SAME, NOTHING)
    assert ab.variants("tiny", SAME, exams.parse_set("gates.e2e_p50_ms.delta=0.05"))["b"].gates


def test_times_are_judged_the_other_way_round(tiny):
    (tiny / "params" / "tiny.yaml").write_text(TINY.replace("output_tok_s: {}", "e2e_p50_ms: {}, output_tok_s: {}"))
    experiment = measured(lambda side, i: 900 if side == "b" else 1000)
    found = judged(experiment)
    assert list(found) == ["e2e_p50_ms", "output_tok_s"] and {f["status"] for f in found.values()} == {"REGRESSED"}
    assert "B is slower than A by" in found["e2e_p50_ms"]["sentence"]
    assert paired.verdict_of(experiment, found | {"output_tok_s": {"status": "PASSED", "sentence": "not said"}}) == ("REGRESSED", found["e2e_p50_ms"]["sentence"])


def test_without_gates_the_throughput_is_judged(tiny):
    (tiny / "params" / "tiny.yaml").write_text(TINY.replace("gates: {output_tok_s: {}}", ""))
    assert measured(lambda side, i: 1000).judged == ["output_tok_s"]


def test_an_even_drift_cancels_and_is_said(tiny):
    """The machine loses a third of its speed from the first visit to the last; B costs nothing."""
    experiment = measured(lambda side, i: 1000 * np.exp(-0.4 * i / 15))
    assert judged(experiment)["output_tok_s"]["status"] == "PASSED"
    (note,) = paired.notes(experiment)
    assert "the fixed work of the host took 49 % longer in the last visit than in the first" in note


@pytest.mark.parametrize("times, noted", [((70, 130, 70, 72, 128, 71, 130, 131), False), ((70, 75, 80, 86, 92, 99, 106, 113), True), ((70, 71, 70, 69, 70, 71, 72, 71), False), ((70, 70, 70, 70, 70, 70), False), ((70, 75, 81), True)],
                         ids=["of two kinds", "a drift", "still", "all alike", "too few for a test"])
def test_what_rises_by_chance_is_no_drift(times, noted):
    """A loop that takes 70 or 130 ms has a line that rises by half."""
    found = paired.drift([types.SimpleNamespace(record={"controls": {"host_s": [t]}}) for t in times], "host_s")
    assert (found["drift %"] > 10) is (times[1] > 71) and bool(paired.drift_notes({"host": found}, "so")) is noted


def test_too_few_repetitions_are_said(tiny):
    (tiny / "params" / "tiny.yaml").write_text(TINY + "repetitions: 1\n")
    assert "each visit has 1 repetition: a loss of 3 % is found less often than with 3" in paired.notes(planned())[0]


@pytest.mark.parametrize("columns, more, problem", [
    ({"finish_reason": ["error: HTTP 500"] + ["length"] * 11}, {}, "visit 02-b: 1 of 12 answers are missing or failed (1 × error: HTTP 500)"),
    ({}, {"prompts": "other"}, "visit 02-b: its prompts are not those of visit 01-a (set other and same: another tokenizer or chat template?), so the speeds do not compare"),
])
def test_a_visit_that_is_not_valid(tiny, columns, more, problem):
    experiment = planned()
    visited(experiment, "01-a", 1000)
    visited(experiment, "02-b", 1000, **more, **columns)
    assert paired.verdict_of(paired.read("tiny"), {}) == ("INVALID", problem)


def test_a_gated_metric_that_is_missing(tiny):
    (tiny / "params" / "tiny.yaml").write_text(TINY.replace("output_tok_s: {}", "itl_p50_ms: {}"))
    experiment = planned()
    visited(experiment, "01-a", 1000)
    assert paired.read("tiny").problems == ["visit 01-a: itl_p50_ms is gated and could not be measured"]


def test_visits_that_are_missing(tiny):
    experiment = planned()
    visited(experiment, "01-a", 1000)
    assert paired.read("tiny").problems == ["15 of 16 visits are missing"]
    assert paired.read("tiny").samples("output_tok_s") == ([], [])


def test_what_differs_is_listed(tiny):
    experiment = planned({"a": "engine_args.max_num_seqs=8", "b": "env.OMP_NUM_THREADS=1"}, pythons=("/old/python", "/new/python"))
    for name in ("01-a", "02-b"):
        visited(experiment, name, 1000)
    rows = {r["what"]: (r["A"], r["B"]) for r in paired.differences(paired.read("tiny")).to_dict("records")}
    assert rows == {"engine_args.max_num_seqs": ("8", "absent"), "env.OMP_NUM_THREADS": ("absent", "1"), "packages.vllm": ("1.0", "2.0"),
                    "interpreter": ("/old/python", "/new/python")}


def test_the_charts_draw_whole_and_broken_experiments():
    figure = experiment_plots.visits_in_order("output_tok_s", "tok/s", "higher", [("a", [1.0, 2.0]), ("b", [])])
    assert "n = 2 repetitions" in figure.axes[0].get_title()
    figure = experiment_plots.differences_by_pair("output_tok_s", [0.01, -0.02], -0.1, 0.1, 0.02, 0.9)
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["90 % interval of the mean", "2 % slower", "a pair"]


# -- the page -----------------------------------------------------------------------------------


def page():
    return page_of(paths.ab_folder("tiny"))


def test_the_notebook_judges_and_the_page_says_it(tiny):
    measured(lambda side, i: 900 if side == "b" else 1000)
    (paths.ab_folder("tiny") / "visits" / "03-b" / "runs" / "tiny" / "generate.html").write_text("")
    assert ab.report("tiny", strict=False) == 1
    text, result = page()
    assert (result["status"], result["schema_version"], len(result["visits"])) == ("REGRESSED", 1, 16)
    assert result["judged"]["output_tok_s"]["status"] == "REGRESSED" and len(result["metrics"]["e2e_p50_ms"]["a"]) == 8
    assert "FAIL" in text and result["sentence"].split(" in ")[0] in text and text.index("FAIL") < text.index("What is compared")
    assert result["metrics"]["startup_s"]["a"] == [[9.0]] * 8, "measured once a visit"
    assert "packages.vllm" in text and "visits/03-b/runs/tiny/generate.html" in text


def test_the_page_of_an_invalid_one(tiny, capsys):
    experiment = planned()
    files.write_json(paths.ab_folder("tiny") / "visits" / "01-a" / paired.OUTCOME, {"problem": "EngineDied: the engine died"})
    assert ab.report("tiny", strict=False) == 2
    _, result = page()
    assert (result["status"], result["sentence"]) == ("INVALID", "visit 01-a: EngineDied: the engine died") and experiment.pairs == 8
    assert "tiny: INVALID: visit 01-a: EngineDied: the engine died" in capsys.readouterr().err


# -- before anything starts ---------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [6, 9, 0])
def test_too_few_pairs_or_an_odd_number(tiny, pairs):
    with pytest.raises(BadInput, match=f"PAIRS is {pairs}; expected an even number from 8 on"):
        ab.take("tiny", SAME, SAME, pairs, NOTHING)


@pytest.mark.parametrize("sets, said", [
    ({"a": "num_prompts=8", "b": "engine_args.x=1"}, "A and B are not the same work: key 'num_prompts' is 8 in A and 4 in B; expected only model, "),
    ({"a": "repetitions=5 n=2 temperature=1.0", "b": "n=3 temperature=1.0"}, "key 'n' is 2 in A and 3 in B; key 'repetitions' is 5 in A and 3 in B; "),
    ({"a": "", "b": "temprature=1.0"}, "B: unknown key 'temprature' (value 1.0); did you mean 'temperature'?"),
    ({"a": "word", "b": ""}, "A: 'word' is not an override; expected key=value"),
])
def test_variants_that_cannot_be_compared(tiny, sets, said):
    with pytest.raises(BadInput, match=re.escape(said)):
        ab.variants("tiny", sets, NOTHING)


def test_what_is_under_test_may_differ_and_the_rest_is_for_both(tiny):
    sets = {"a": "model=/a env.X=true", "b": "engine_args.max_num_seqs=8 endpoint=http://127.0.0.1:10"}
    both = ab.variants("tiny", sets, exams.parse_set("num_prompts=2"))
    assert both["a"].work_hash() == both["b"].work_hash() and (both["b"].num_prompts, both["a"].env) == (2, {"X": "true"}) and both["b"].endpoint.endswith(":10")


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_an_interpreter_that_cannot_take_an_exam(tiny):
    exam = params.check({"run": "x"})
    with pytest.raises(BadInput, match=r"B_PYTHON is '/no/python': no such program; expected the Python interpreter of an environment"):
        ab.interpreter("b", "/no/python", exam)
    bare = script(tiny / "python", f'exec {sys.executable} -S -I "$@"')
    with pytest.raises(BadInput, match=r"A_PYTHON is .*: it cannot take an exam \(ModuleNotFoundError: No module named 'ipykernel'\); expected an environment with"):
        ab.interpreter("a", bare, exam)
    assert ab.interpreter("a", "", exam) == sys.executable


def test_without_an_ab_the_notebook_says_what_to_do(tiny):
    with pytest.raises(BadInput, match="run 'tiny' has no A/B in .*; expected make ab RUN=tiny A=... B=... first"):
        paired.read("tiny")


def test_make_passes_every_word_on():
    said = subprocess.run(["make", "-n", "ab", "PY=python3", "RUN=x", "A=n=1 m=2", "B=", "PAIRS=10", "B_PYTHON=/p", "SET=k=1"], cwd=ROOT, capture_output=True, text=True).stdout
    assert 'workbook ab "x" --a "$A" --b "$B" --pairs "10"' in said and '--python-b "/p"' in said and '--set "$SET"' in said and "--python-a" not in said


# -- the whole path -----------------------------------------------------------------------------


def in_its_first_visit(url):
    """A/B of `tiny` that has come to its first visit's controls: its process, and all that this has started."""
    run = subprocess.Popen(command("ab", "tiny", "--set", f"endpoint={url}"), env=environment(), stderr=subprocess.PIPE, text=True)
    for line in run.stderr:
        if "Controls" in line:
            break
    return run, psutil.Process(run.pid).children(recursive=True)


def running(processes):
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_an_interruption_keeps_what_is_there(tiny):
    """No process is left, and the result says where it was."""
    with scripted_server.running({"gap": 0.2}) as server:
        run, tree = in_its_first_visit(server.url)
        run.send_signal(signal.SIGTERM)
        run.stderr.read()
        assert run.wait(timeout=60) == 130
    assert len(tree) >= 2 and running(tree) == []
    result = files.read_json(paths.ab_folder("tiny") / "result.json")
    assert (result["status"], result["sentence"]) == ("INVALID", "visit 01-a: interrupted")


def test_a_visit_ends_with_an_experiment_that_is_killed(tiny):
    """It would write into the folder of the visit that is made in its place."""
    with scripted_server.running({"gap": 0.2}) as server:
        run, tree = in_its_first_visit(server.url)
        assert any("workbook.visit" in p.cmdline() for p in tree)
        run.kill()
        run.wait()
        _, alive = psutil.wait_procs(tree, timeout=60)
    run.stderr.close()
    assert running(alive) == []
    assert not (paths.ab_folder("tiny") / "visits" / "01-a" / paired.OUTCOME).exists(), "it did not just come to its end"


@pytest.mark.engine
@pytest.mark.timeout(1500)
def test_a_slower_server_fails_and_a_broken_one_is_invalid(tiny, workbook):
    """Sixteen visits, B's tokens 10 % further apart and B's interpreter another one; then a B that does not answer."""
    # The time between tokens is what a busy machine leaves alone.
    (tiny / "params" / "tiny.yaml").write_text(TINY.replace("output_tok_s", "tpot_p50_ms"))
    python = script(tiny / "other-python", f'echo "$@" >> {tiny}/calls\nexec {sys.executable} "$@"')
    slow, broken = {"gap": 0.022}, {"fault": "truncate"}
    with scripted_server.running({"gap": 0.02}) as a, scripted_server.running(slow) as b, scripted_server.running(broken) as c:
        done = workbook("ab", "tiny", "--a", f"endpoint={a.url}", "--b", f"endpoint={b.url}", "--python-b", python, timeout=1200)
        assert done.returncode == 1, done.stderr
        _, result = page()
        assert result["status"] == "REGRESSED" and re.match(r"B is slower than A by \d+\.\d % in tpot_p50_ms .*: FAIL, ", result["sentence"])
        assert a.count() == b.count() == 8 * (1 + 4 * 4), "eight visits of a probe and four passes of four requests"
        assert "after 2 of 8 pairs: B is" in done.stderr and "visit 16-a: A, 16 of 16" in done.stderr
        calls = [line for line in (tiny / "calls").read_text().splitlines() if "workbook.visit" in line]
        assert len(calls) == 8 and all(line.endswith("-b") for line in calls)
        done = workbook("ab", "tiny", "--a", f"endpoint={a.url}", "--b", f"endpoint={c.url}")
    assert done.returncode == 2 and re.search("INVALID: visit 02-b: .*not one request was answered", done.stderr), done.stderr
    assert len(list((paths.ab_folder("tiny") / "visits").iterdir())) == 2, "no visit after the invalid one"
    assert list((tiny / "reports" / "history" / "ab" / "tiny").glob("*/result.json")), "the A/B before it is kept"
