"""The summary's files, the cards, the charts, and a run's folder."""
import json
import os
import re
import subprocess
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest
from workbook import cards, files, paths, plots, progress, runs, runner, schemas, summary
from workbook.errors import BadInput

METRIC = {"unit": "tok/s", "direction": "higher", "sessions": [[90.0, 91.0]], "median": 90.5, "golden_sessions": [[100.0], [101.0]], "golden_median": 100.5}


def result(run, status, **more):
    return schemas.stopped(run, status, f"because | {status} <b>") | more


@pytest.fixture
def several(folders):
    found = [result("a", "PASSED", metrics={"output_tok_s": METRIC}, gates={"output_tok_s": {"delta": 0.05, "margin": 0.03}}), result("b", "REGRESSED"), result("c", "INVALID")]
    for r in found:
        files.write_json(paths.run_folder(r["run"]) / "result.json", r)
    (paths.run_folder("d")).mkdir()
    (paths.run_folder("e")).mkdir()
    (paths.run_folder("e") / "result.json").write_text("{")
    (folders / "params" / "f.yaml").write_text("run: f\n")
    return folders


def test_a_word_without_an_end_does_not_widen_a_table():
    assert "overflow-wrap:anywhere" in cards.table(pd.DataFrame({"answer": ["so 1" + "0" * 3000]}))
    assert "overflow-wrap" not in cards.table(pd.DataFrame({"answer": ["a word " * 100]}))
    assert "min-width" in cards.table(pd.DataFrame({"answer": ["a word " * 100]})) and "min-width" not in cards.table(pd.DataFrame({"answer": ["a word"]}))


def test_nothing_is_left_out(several):
    assert {r["run"]: r["status"] for r in summary.collect()} == {
        "a": "PASSED", "b": "REGRESSED", "c": "INVALID", "d": "NOT_RUN", "e": "INVALID", "f": "NOT_RUN"}


def test_a_run_that_was_killed_does_not_go_unreported(several):
    """The runner writes its parameters first, and its result last."""
    (paths.run_folder("d") / "params.yaml").write_text("run: d\n")
    assert {r["run"]: (r["status"], r["sentence"]) for r in summary.collect()}["d"] == ("INVALID", "was started and has no result: it was killed, or the machine went down")


def test_a_run_that_is_being_made_was_not_killed(several, monkeypatch):
    """As JupyterLab sees it meanwhile; of what was begun before, nothing is being made."""
    def found():
        return {r["run"]: (r["status"], r["sentence"]) for r in summary.collect()}["d"]
    (paths.run_folder("d") / "params.yaml").write_text("run: d\n")
    owner, begun = paths.reports() / runs.OWNER, paths.run_folder("d") / "params.yaml"
    os.utime(begun, (2e9, 2e9))
    with subprocess.Popen(["sleep", "60"]) as other:
        owner.write_text(f"process {other.pid}, started 2026-01-01T00:00:00+00:00")
        os.utime(owner, (1e9, 1e9))
        assert found() == ("NOT_RUN", f"is being run (process {other.pid}, started 2026-01-01T00:00:00+00:00)")
        os.utime(begun, (9e8, 9e8))
        assert found()[0] == "INVALID", "it was begun by a runner before this one"
        os.utime(begun, (2e9, 2e9))
        monkeypatch.setenv(progress.TERMINAL, "")
        assert found()[0] == "INVALID", "the runner's summary comes when its runs have ended"
        monkeypatch.delenv(progress.TERMINAL)
        other.kill()
    assert found()[0] == "INVALID"
    with runner.Reports():
        assert owner.read_text().startswith(f"process {os.getpid()}, started 2") and found()[0] == "INVALID"


def test_the_files_for_machines(several):
    summary.write(summary.collect(), several)
    whole = json.loads((several / "summary.json").read_text())
    assert whole["status"] == "INVALID" and len(whole["runs"]) == 6
    suite = ElementTree.parse(several / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors"), suite.get("skipped")) == ("6", "1", "2", "2")
    assert {c.get("name"): [e.tag for e in c] for c in suite} == {
        "a": ["system-out"], "b": ["failure"], "c": ["error"], "d": ["skipped"], "e": ["error"], "f": ["skipped"]}
    text = (several / "summary.md").read_text()
    assert "| a | **PASSED** | 90 | 100 |" in text and "because \\| REGRESSED &lt;b>" in text
    assert text.endswith("|\n\n- NOT RUN, has not been run on this machine: 2 (d; f)\n")


@pytest.mark.parametrize("answer, lines", [
    ("a; b", ["a", "b"]), ("a (b; c); d", ["a (b; c)", "d"]), ("a (b; c (d); e) f; g", ["a (b; c (d); e) f", "g"]), ("a); b", ["a)", "b"]), ("", [""])])
def test_parts_of_an_answer_stand_on_lines_of_their_own(answer, lines):
    page = cards.verdict("PASSED", "fine", [{"question": "?", "answer": answer}])
    assert re.findall(r"text-indent:-1em\">(.*?)</div>", page) == lines


def test_runs_that_were_not_taken_are_named_by_exam():
    found = [{"run": run, "status": "SKIPPED", "sentence": "no GPU"} for run in ("a", "a@x", "a@y", "b", "c@x")]
    assert summary.left_out(found) == [{"runs": "5", "status": "SKIPPED", "why": "no GPU", "which": "a @x @y; b; c @x"}]


def test_under_strict_what_fails_is_no_green_case(several, monkeypatch):
    monkeypatch.setenv("STRICT", "1")
    found = [result(status, status) for status in ("NO_GOLDEN", "INCONCLUSIVE", "PASSED")]
    found[1]["brief"] = "in brief"
    summary.write(found, several)
    suite = ElementTree.parse(several / "junit.xml").getroot()
    assert (suite.get("failures"), suite.get("skipped")) == ("2", "0")
    assert [c[0].tag for c in suite] == ["failure", "failure", "system-out"]
    text = (several / "summary.md").read_text()
    assert "| **INCONCLUSIVE** | – | – | in brief |" in text and text.endswith("|\n\n- INCONCLUSIVE: because \\| INCONCLUSIVE &lt;b>\n")
    assert suite[1][0].get("message") == "INCONCLUSIVE: in brief" and suite[1][0].text == "INCONCLUSIVE: because | INCONCLUSIVE <b>"
    assert suite[0][0].get("message") == suite[0][0].text == "NO_GOLDEN: because | NO_GOLDEN <b>"


def test_where_nothing_was_run_nothing_passed(several):
    summary.write([result("a", "NOT_RUN")], several)
    assert json.loads((several / "summary.json").read_text())["status"] == "NOT_RUN"
    assert (several / "summary.md").read_text().startswith("## Goldbook: NOT_RUN\n")


def test_what_xml_may_not_hold_costs_no_report():
    """An engine's last words may be coloured, or no text at all."""
    sentence = "died: \x1b[31mred\x1b[0m \x00\ufffe é \U0001f600 <&>"
    suite = ElementTree.fromstring(summary.junit([{"run": "x", "status": status, "sentence": sentence} for status in ("INVALID", "PASSED")]))
    assert suite[0][0].get("message") == "INVALID: died: [31mred[0m  é \U0001f600 <&>" and suite[1][0].text.startswith("PASSED: died")


def test_cards_escape_and_say_what_is_missing():
    html = cards.run_card(result("<x>", "PASSED", questions=[{"question": "q", "answer": "<script>"}]), ["generate", "score"], {"generate": "g.html"})
    assert "<script>" not in html and "&lt;x&gt;" in html and 'href="g.html"' in html and "score missing" in html
    assert "no pages: taken in JupyterLab" in cards.run_card(result("x", "PASSED", metrics={"output_tok_s": METRIC}), ["generate", "score"], {})
    assert cards.verdict("NO_GOLDEN", "no golden of x", [{"question": "Faster?", "answer": "no golden of x"}]).count("no golden of x") == 1
    only = cards.verdict("PASSED", "output_tok_s -4.6 %", [{"question": "Faster?", "answer": "output_tok_s -4.6 %"}])
    assert only.count("output_tok_s -4.6 %") == 2 and "nothing to compare" not in only, "an answer that is all there is to say of a run that passed"
    brief = cards.run_card(result("x", "PASSED", brief="in brief"), ["generate"], {})
    assert "in brief" in brief and "because" not in brief
    lines = cards.verdict("PASSED", "well", [{"question": "Faster?", "answer": "a -1 % (93 % interval; seen); b <2>"}])
    assert lines.count("<div ") == 3 and ">a -1 % (93 % interval; seen)</div>" in lines and ">b &lt;2&gt;</div>" in lines
    assert "no pages" not in cards.run_card(result("x", "INVALID"), ["generate", "score"], {}), "it was refused"


def test_tables_are_for_reading():
    html = cards.table(pd.DataFrame({"a": [1234567, 2], "b": [0.123456, float("nan")], "c": [None, "<i>"]}))
    assert "1,234,567" in html and "0.1235" in html and "–" in html and "&lt;i&gt;" in html


def test_pairs_are_read_and_not_printed():
    """The parameters and the machine: no Python literals, no head, nothing unescaped."""
    html = cards.pairs({"engine_args": {"max_model_len": 512, "attention_config": {"flash_attn_version": 2}}, "scorers": ["numeric", "verl_strict"], "env": {}, "title": "",
                        "prompt": "<b>", "gpus": [{"name": "G", "index": 0}, {"name": "G", "index": 1}], "enforce": False, "n": 0})
    for said in ("max_model_len: 512, attention_config: (flash_attn_version: 2)", "numeric, verl_strict", "(name: G, index: 0), (name: G, index: 1)", "&lt;b&gt;", ">False<", ">0<"):
        assert said in html, said
    assert html.count("–") == 2 and not any(mark in html for mark in ("{", "'", "[", "<th"))


def test_charts_draw_with_and_without_a_golden():
    assert plots.throughput_overview([result("b", "REGRESSED")]) is None
    legend = plots.throughput_overview([result(run, "PASSED", metrics={"output_tok_s": METRIC | more}) for run, more in (("a", {"golden_median": None}), ("b", {}), ("c", {}))])
    assert sorted(text.get_text() for text in legend.axes[0].get_legend().get_texts()) == ["golden", "this run", "this run, no golden"]
    figure = plots.throughput_overview([result("a", "PASSED", metrics={"output_tok_s": METRIC}, gates={"output_tok_s": {"delta": 0.05, "margin": 0.03}}),
                                        result("n", "NO_GOLDEN", metrics={"output_tok_s": METRIC | {"golden_sessions": None, "golden_median": None}})])
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["a", "n"]
    assert figure.axes[0].get_title(loc="left") == "Throughput against golden (n = 2 runs)"
    figure = plots.samples_against_golden("output_tok_s", "tok/s", "higher", [[1.0, 2.0]], [[2.0], [2.0]], 0.05)
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["golden 1", "golden 2", "new 1"]


def test_one_of_a_kind_is_counted_as_one():
    alone = plots.throughput_overview([result("a", "PASSED", metrics={"output_tok_s": METRIC})])
    assert alone.axes[0].get_title(loc="left") == "Throughput against golden (n = 1 run)"
    new = plots.throughput_overview([result("a", "NO_GOLDEN", metrics={"output_tok_s": METRIC | {"golden_sessions": None, "golden_median": None}})])
    assert new.axes[0].get_title(loc="left") == "Throughput, no golden (n = 1 run)" and "golden" not in new.axes[0].get_xlabel() and "band" not in new.axes[0].get_xlabel()
    curve = plots.scaling({"x, replicas, against x@gpu1": [(1, 1.0), (2, 1.9)]})
    assert curve.axes[0].get_title() == "Scaling (n = 1 run; higher is better)"
    single = plots.samples_against_golden("output_tok_s", "tok/s", "higher", [[1.0]], None, None)
    assert single.axes[0].get_title() == "output_tok_s by session (n = 1 repetition; higher is better)"
    assert plots.counted(1024, "run") == "n = 1,024 runs"


def test_the_distribution_of_requests_is_drawn_beside_the_goldens():
    (axes,) = plots.cdf("E2E", "s", [np.array([3.0, 1.0, 2.0, 4.0])], [[1.0, 2.0, 3.0]] * 2).axes
    golden, _, new = axes.lines
    assert golden.get_xydata().tolist() == [[1, 0], [2, 50], [3, 100]] and new.get_xydata().tolist() == [[1, 25], [2, 50], [3, 75], [4, 100]]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["golden, each session", "new 1"]


def test_a_sweep_is_drawn_over_its_points():
    table = {f"output_tok_s@{size}": METRIC | {"sessions": [[size * 9.0, size * 10.0]], "golden_sessions": [[size * 10.0]]} for size in (1, 8, 64)}
    figure = plots.sweep(table)
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["1", "8", "64"]
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["golden, median", "this run, median"]
    assert len(plots.sweep({k: v | {"golden_sessions": None} for k, v in table.items()}).axes[0].get_legend().get_texts()) == 1


def test_charts_of_the_answers():
    axes = plots.pass_at_k([0.3, 0.5, 0.6], [0.35, 0.5, 0.65]).axes[0]
    assert [line.get_ydata().tolist() for line in axes.lines] == [[35, 50, 65], [30, 50, 60]] and len(axes.get_legend().get_texts()) == 2
    assert len(plots.pass_at_k([0.3, 0.5], None).axes[0].lines) == 1
    lengths = np.array([[3, 4], [48, 48]])
    axes = plots.answer_lengths(lengths, lengths[:1]).axes[0]
    assert axes.get_title() == "Length of the answers (n = 4)" and [t.get_text() for t in axes.get_legend().get_texts()] == ["golden, mean 3.5", "this run, mean 25.8"]
    for longest in (100, 200, 256, 1024):  # of those at the limit none is left out
        step = plots.answer_lengths(np.array([[1, longest, longest, longest]]), None).axes[0].patches[0].get_path().vertices
        assert step[:, 1].max() == 75 and step[:, 0].max() > longest
    assert plots.answer_lengths(np.full((2, 2), 1), None).axes[0].get_xlabel() == "output tokens"


def test_a_chain_of_goldens_is_drawn_with_the_present_run():
    points = [("2026-01-01T00:00:00+00:00", 100.0), ("2026-02-01T00:00:00+00:00", 98.0)]
    figure = plots.golden_history("a", "output_tok_s@8", "tok/s", points, 97.0)
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["2026-02-01", "2026-01-01", "now"]
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["golden, mean", "the first one", "this run, median"]
    assert len(plots.golden_history("a", "output_tok_s", "tok/s", points, None).axes[0].get_legend().get_texts()) == 2


def test_days_of_two_blessings_say_the_hour_and_many_are_not_all_named():
    points = [(f"2026-01-{1 + day // 2:02d}T{day:02d}:30:00+00:00", 100.0) for day in range(13)]
    labels = [[t.get_text() for t in plots.golden_history("a", "output_tok_s", "tok/s", points[:many], None).axes[0].get_xticklabels()] for many in (3, 13)]
    assert labels[0] == ["2026-01-02", "2026-01-01\n01:30", "2026-01-01\n00:30", "now"] and labels[1][:2] == ["2026-01-06\n10:30", "2026-01-04\n07:30"] and len(labels[1]) == 5


def test_a_timeline_of_many_requests_draws_some_and_says_so():
    rows = pd.DataFrame({"arrival_s": 0.0, "first_token_s": np.arange(3000.0), "last_token_s": np.arange(3000.0) + 5})
    axes = plots.request_timeline(rows).axes[0]
    assert axes.get_title() == "Requests of one repetition (n = 3,000, 400 of them shown)"
    drawn = axes.collections[1].get_segments()
    assert len(drawn) == 400 and drawn[0][0].tolist() == [0, 0] and drawn[-1][0].tolist() == [2999, 2999]
    assert plots.request_timeline(rows.head(400)).axes[0].get_title() == "Requests of one repetition (n = 400)"


def test_earlier_results_are_kept(folders):
    for value in (1, 2, 3):
        folder = runs.start("a")
        files.write_json(folder / "result.json", result("a", "PASSED", seconds=value))
    kept = [json.loads(p.read_text())["seconds"] for p in sorted((folders / "reports" / "history" / "a").glob("*/result.json"))]
    assert kept == [1, 2] and files.read_json(paths.run_folder("a") / "result.json")["seconds"] == 3
    assert [r["status"] for r in summary.history()] == ["PASSED", "PASSED"]
    for status in ("SKIPPED", "PASSED"):
        files.write_json(runs.start("b") / "result.json", result("b", status))
    assert [r["run"] for r in summary.history()] == ["a", "a"], "what this machine could not take is no result of it"


def test_a_run_without_results_says_what_to_do(folders):
    with pytest.raises(BadInput, match="run 'a' has no results in .*; expected generate.ipynb to have been run for it first"):
        runs.read_record("a")


def test_reports_are_for_one_at_a_time(folders):
    with runner.Reports(), pytest.raises(BadInput, match=r"in use by another run \(process \d+, started 2"):
        runner.Reports().__enter__()
    with runner.Reports():
        pass


def test_reports_that_cannot_be_written(folders, monkeypatch):
    (folders / "file").write_text("")
    monkeypatch.setenv("GOLDBOOK_REPORTS", str(folders / "file"))
    with pytest.raises(BadInput, match="cannot be written .*; expected a writable folder, GOLDBOOK_REPORTS names another"):
        runner.Reports().__enter__()
    with pytest.raises(BadInput, match="cannot be written"):
        runs.start("a")


def test_a_card_links_from_where_it_is_shown(folders, monkeypatch):
    """The runner's page lies in `reports/`; in JupyterLab it is the notebook in `notebooks/`, and `make lab` has both in sight."""
    monkeypatch.setattr(paths, "NOTEBOOKS", folders / "notebooks")
    assert summary.links("a", summary.shown_in()) == {}
    files.write_text(paths.run_folder("a") / "score.html", "")
    assert summary.links("a", summary.shown_in()) == {"score": "../reports/runs/a/score.html"}
    monkeypatch.setenv(progress.TERMINAL, "")
    assert summary.links("a", summary.shown_in()) == {"score": "runs/a/score.html"}
