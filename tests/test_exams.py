"""Exams as files: variants, overrides, what YAML does to values, and the pages made of them."""
import json
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, environment
from workbook import catalogue, exams, files, models, params, paths, platforms, runner, runs, sweeps
from workbook.errors import BadInput

BASE = "run: a\nseed: 5\nengine_args:\n  max_num_seqs: 8\n  enforce_eager: true\n"
VARIANTS = BASE + "variants:\n  one: {seed: 6}\n  two:\n    engine_args: {max_num_seqs: 9, enforce_eager: null}\n    seed: null\n"


@pytest.fixture
def write(folders):
    def file(text, name="a.yaml"):
        (folders / "params" / name).write_text(text)
    return file


def sentence(run="a"):
    with pytest.raises(BadInput) as caught:
        exams.load(run)
    return str(caught.value)


YAML_READS = [
    ("temperature: 1e-3", "params/a.yaml line 2: key 'temperature' is 1e-3, which YAML reads as text (a number needs a dot and a signed exponent); "
                          "expected 1.0e-3, or quotes if text is meant"),
    ("engine_args: {gpu_memory_utilization: 9e-1}",
     "params/a.yaml line 2: key 'engine_args.gpu_memory_utilization' is 9e-1, which YAML reads as text (a number needs a dot and a signed exponent); "
     "expected 9.0e-1, or quotes if text is meant"),
    ("temperature: 1.5e3", "params/a.yaml line 2: key 'temperature' is 1.5e3, which YAML reads as text (a number needs a dot and a signed exponent); "
                           "expected 1.5e+3, or quotes if text is meant"),
    ("title: on", "params/a.yaml line 2: key 'title' is on, which YAML reads as true; expected text: write \"on\""),
    ("env: {VERSION: 1.10}", "params/a.yaml line 2: key 'env.VERSION' is 1.10, which YAML reads as the number 1.1; expected text: write \"1.10\""),
    ("env:\n  THREADS: 010", "params/a.yaml line 3: key 'env.THREADS' is 010, which YAML reads as the number 8; expected 8, or quotes if text is meant"),
    ("title: 2026-11-21", "params/a.yaml line 2: key 'title' is 2026-11-21, which YAML reads as a date; expected text: write \"2026-11-21\""),
    ("num_prompts: 1:30", "params/a.yaml line 2: key 'num_prompts' is 1:30, which YAML reads as the number 90; expected 90, or quotes if text is meant"),
    ("num_prompts: on", "params/a.yaml line 2: key 'num_prompts' is on, which YAML reads as true; expected a whole number"),
    ("num_prompts: 1.0", "params/a.yaml line 2: key 'num_prompts' is 1.0, which YAML reads as the number 1.0; expected a whole number"),
    ("seed:", "params/a.yaml line 2: key 'seed' is None (nothing); expected a whole number"),
    ("seed: null", "params/a.yaml line 2: key 'seed' is null, which YAML reads as nothing; expected a whole number"),
    ("num_promts: 3", "params/a.yaml line 2: unknown key 'num_promts' (value 3); did you mean 'num_prompts'?"),
    ("seed: 1\nseed: 2", "params/a.yaml line 3: key 'seed' is given twice; expected once (it is also on line 2)"),
    ("engine_args:\n  x: 1\n  x: 2", "params/a.yaml line 4: key 'engine_args.x' is given twice; expected once (it is also on line 3)"),
]


@pytest.mark.parametrize("line, expected", YAML_READS, ids=[str(i) for i in range(len(YAML_READS))])
def test_what_yaml_did_is_said(write, line, expected):
    write(f"run: a\n{line}\n")
    assert sentence() == expected


@pytest.mark.parametrize("text, start", [
    ("run: [", "params/a.yaml line 2: not YAML: while parsing"),
    ("just text", "params/a.yaml: holds a str; expected 'key: value' lines"),
    ("", "params/a.yaml: is empty; expected 'key: value' lines"),
    ("run: b\n", "params/a.yaml: key 'run' is 'b'; expected the file's stem, 'a'"),
    ("seed: 1\n", "params/a.yaml: key 'run' is None; expected the file's stem, 'a'"),
    ("run: a\nvariants: 5\n", "params/a.yaml: key 'variants' has '': None; expected a name"),
    ("run: a\nvariants: {x: 5}\n", "params/a.yaml line 2: key 'variants' has 'x': 5; expected a name (letters, digits, . _ -) and the keys that differ"),
    ("run: a\nvariants:\n  a b: {}\n", "params/a.yaml line 3: key 'variants' has 'a b': {}; expected a name"),
    ("run: a\nvariants:\n  x: {run: y}\n", "params/a.yaml line 3: variant 'x' sets 'run'; expected other keys, the run is named after file and variant"),
])
def test_files_that_are_no_exam(write, text, start):
    write(text)
    assert sentence().startswith(start)


def test_two_files_with_the_same_run(write):
    write("run: a\n")
    write("run: a\n", "b.yaml")
    assert sentence("b") == "params/b.yaml: key 'run' is 'a', which params/a.yaml is; expected the file's stem, 'b'"


def test_a_missing_run_names_the_nearest(write):
    write("run: smoke\n", "smoke.yaml")
    assert sentence("") == "RUN is missing; expected one of smoke"
    assert sentence("smok") == "params/smok.yaml: no such run; did you mean 'smoke'?"


# -- variants and overrides ---------------------------------------------------------------------


def test_a_file_with_variants_is_several_runs(write):
    write(VARIANTS)
    write("run: b\n", "b.yaml")
    assert exams.names() == ["a@one", "a@two", "b"] and exams.select("a") == ["a@one", "a@two"] and exams.select("a@one") == ["a@one"]
    one, two = exams.load("a@one"), exams.load("a@two")
    assert (one.run, one.seed, one.engine_args) == ("a@one", 6, {"max_num_seqs": 8, "enforce_eager": True})
    assert (two.run, two.seed, two.engine_args) == ("a@two", 0, {"max_num_seqs": 9}), "null takes a key away"
    assert sentence("a") == "params/a.yaml: is several runs; expected one of a@one, a@two"
    assert sentence("a@tow") == "params/a.yaml: has no variant 'tow'; expected one of a@one, a@two; did you mean 'a@two'?"
    assert sentence("b@one") == "params/b.yaml: has no variant 'one'; expected one of b"


def test_a_wrong_value_in_a_variant_is_found_there(write):
    write("run: a\nvariants:\n  x: {seed: on}\n")
    assert sentence("a@x") == "params/a.yaml line 3, variant x: key 'seed' is on, which YAML reads as true; expected a whole number"


def test_set_goes_over_file_and_variant(write):
    write(VARIANTS)
    asked = exams.parse_set("n=8 temperature=0.5 engine_args.max_num_seqs=64 title=", "/m")
    exam = exams.load("a@one", asked)
    assert (exam.n, exam.seed, exam.model, exam.title) == (8, 6, "/m", "")
    assert exam.engine_args == {"max_num_seqs": 64, "enforce_eager": True}
    assert exams.load("a@one", exams.parse_set("engine_args='{max_num_seqs: 7}' seed=null")).engine_args["max_num_seqs"] == 7
    with pytest.raises(BadInput) as caught:
        exams.load("a@one", exams.parse_set("num_prompts=on"))
    assert str(caught.value) == "SET: key 'num_prompts' is on, which YAML reads as true; expected a whole number"
    with pytest.raises(BadInput, match="^params/a.yaml with SET and MODEL: key 'n' is 4: temperature 0 "):
        exams.load("a@one", exams.parse_set("n=4 temperature=0", "/m"))
    with pytest.raises(BadInput, match="^SET: unknown key 'engine_arg' .*; did you mean 'engine_args'"):
        exams.load("a@one", exams.parse_set("engine_arg.max_num_seqs=5"))
    assert set(str(asked).split()) == {"model=/m", "title=", "engine_args.max_num_seqs=64", "temperature=0.5", "n=8"}
    assert str(exams.parse_set("seed=null")) == "seed=null"


@pytest.mark.parametrize("text, message", [
    ("n 8", "SET: 'n' is not an override; expected key=value"),
    ("engine_args={max_num_seqs: 8}", "SET: .* cannot be read .*; expected key=value words, values with spaces quoted"),
    ("title='x", "SET: .* cannot be read .No closing quotation.; expected key=value"),
    ("temperature=1e-3", "SET: key 'temperature' is 1e-3, which YAML reads as text"),
])
def test_overrides_that_cannot_be_read(text, message):
    with pytest.raises(BadInput, match=message):
        exams.parse_set(text)


def test_the_flat_file_is_the_exam_again(write, folders):
    write(VARIANTS)
    exam = exams.load("a@two")
    assert params.check(yaml.safe_load(exams.flat(exam))) == exam


def test_a_file_that_papermill_lays_over_another_exam_is_refused(write):
    """What it leaves out would be the notebook's own exam's, and a run under its name another one than `make run` takes."""
    write("run: a\nsubject: gsm8k\nnum_prompts: 8\ntemperature: 1.0\nn: 2\n")
    own = exams._notebooks_own()
    for meant in (exams.load("a"), exams.load("a", exams.parse_set("max_tokens=48 seed=3"))):
        assert exams.of_notebook(yaml.safe_load(exams.flat(meant))) == meant, "as the runner gives it"
    assert exams.of_notebook(own | {"run": "a", "subject": "gsm8k", "subject_args": {}}).subject_args == {}, "more than the file says was stated, so it is nobody's accident"
    with pytest.raises(BadInput, match=r"params/a.yaml: title, subject_args, engine_args, max_tokens, .*gates.* are not stated, and would be those of the notebook's own exam \(smoke\); "
                                       "expected a file that states every key: python -m workbook params a prints it"):
        exams.of_notebook(own | {"run": "a", "subject": "gsm8k", "num_prompts": 8, "temperature": 1.0, "n": 2})
    assert exams.of_notebook(own).run == "smoke" and exams.of_notebook(own | {"run": "nowhere"}).run == "nowhere"


def test_a_file_of_the_wrong_ending_is_an_error_and_not_overlooked(write, folders, monkeypatch):
    monkeypatch.setattr(runner, "_report", lambda statuses, strict: statuses)
    write("run: b\n", "b.yml")
    assert exams.misnamed() == ["b.yml"] and "params/b.yml: not read; expected the ending .yaml" in catalogue.listing()
    assert runner.run_all() == ["INVALID"]
    result = json.loads((folders / "reports" / "runs" / "b.yml" / "result.json").read_text())
    assert result["sentence"] == "params/b.yml: not read; expected the ending .yaml"


def test_a_mistake_that_was_corrected_is_forgotten(write, folders, monkeypatch):
    """What was said of parameters that could not be read is no run's result for ever; results of a run without a file stay."""
    monkeypatch.setattr(runner, "_report", lambda statuses, strict: statuses)
    monkeypatch.setattr(platforms, "gpus", lambda: ())
    write("run: a\nvariants: {x: [", "a.yaml")
    write("run: b\n", "b.yml")
    assert runner.run_all() == ["INVALID", "INVALID"]
    brought = folders / "reports" / "runs" / "elsewhere"  # of another params folder, say: an engine that did not start
    brought.mkdir()
    (brought / "result.json").write_text("{}")
    write("run: a\nvariants:\n  x: {requires: {device: gpu, gpus: 1}}\n", "a.yaml")
    (folders / "params" / "b.yml").unlink()
    assert runner.run_all() == ["SKIPPED"]
    assert sorted(p.name for p in (folders / "reports" / "runs").iterdir()) == ["a@x", "elsewhere"]
    assert len(list((folders / "reports" / "history").glob("*/*/result.json"))) == 2
    write("", "c.yaml")
    assert runner.run_all() == ["INVALID", "SKIPPED"]
    (folders / "params" / "c.yaml").unlink()
    runner.summary_only()
    assert not (folders / "reports" / "runs" / "c").exists(), "make report forgets it too"


def test_variants_that_do_not_fit_are_skipped_with_the_reason(write, folders, monkeypatch):
    monkeypatch.setattr(runner, "_report", lambda statuses, strict: statuses)
    monkeypatch.setattr(platforms, "gpus", lambda: ())
    write("run: a\nvariants:\n  gpu1: {requires: {gpus: 1}}\n  gpu8: {requires: {device: gpu, gpus: 8}}\n")
    assert runner.run("a") == ["SKIPPED", "SKIPPED"]
    result = json.loads((folders / "reports" / "runs" / "a@gpu8" / "result.json").read_text())
    assert (result["status"], result["sentence"]) == ("SKIPPED", "needs an NVIDIA GPU; this machine has none")


def test_a_folder_of_goldens_that_is_not_there_is_no_machine_without_any(write, folders, monkeypatch):
    """Every run would be NO_GOLDEN, and exit with 0 whatever happened."""
    monkeypatch.setattr(runner, "_report", lambda statuses, strict: statuses)
    monkeypatch.setattr(platforms, "gpus", lambda: ())
    write("run: a\nrequires: {device: gpu, gpus: 1}\n")
    monkeypatch.setenv("GOLDBOOK_GOLDENS", str(folders / "golden"))
    for start in (runner.run_all, lambda: runner.run("a")):
        with pytest.raises(BadInput, match="/golden: no such folder; expected GOLDBOOK_GOLDENS to name the one with the goldens, an empty one if there are none yet"):
            start()
    (folders / "golden").mkdir()
    assert runner.run_all() == ["SKIPPED"]


def test_the_terminal_counts_what_was_skipped(write, folders, monkeypatch, capsys):
    """Of thirty exams five are taken on a small machine, and their lines have to be found."""
    monkeypatch.setattr(runner, "summarize", lambda: "")
    monkeypatch.setattr(platforms, "gpus", lambda: ())
    write("run: a\nvariants:\n  gpu2: {requires: {device: gpu, gpus: 2}}\n  gpu8: {requires: {device: gpu, gpus: 8}}\n")
    assert runner.run("a") == 0
    assert capsys.readouterr().err.count("\n2 SKIPPED: needs an NVIDIA GPU; this machine has none\n") == 1


def test_what_was_overridden_stands_on_the_runs_card(write):
    write("run: a\ntitle: Sums\n")
    assert runner._load("a", exams.parse_set("num_prompts=8 engine_args.max_num_seqs=4", "/m")).title.startswith("Sums, with ")
    assert runner._load("a", None).title == runner._load("a", exams.parse_set("")).title == "Sums"


def test_a_page_that_is_set_aside_still_leads_to_the_summary(folders):
    for folder, history in ((paths.run_folder("x"), paths.reports() / "history" / "x"), (paths.reports() / "ab" / "x", paths.reports() / "history" / "ab" / "x")):
        files.write_text(folder / "compare.html", '<a href="../../index.html">summary</a> <a href="score.html">score</a>')
        runs.keep(folder, history)
        page = next(history.glob("*/compare.html"))
        address = page.read_text().split('"')[1]
        assert (page.parent / address).resolve() == (paths.reports() / "index.html").resolve() and 'href="score.html"' in page.read_text()


# -- pages --------------------------------------------------------------------------------------


def test_params_say_where_they_come_from(write):
    write(VARIANTS)
    said = catalogue.flat_with_origins("a@two", exams.parse_set("n=2 temperature=1.0"))
    origins = {line.split(":")[0].strip(): line.partition("# ")[2] for line in said.splitlines()}
    assert origins["n"] == "SET" and origins["seed"] == "params/a.yaml line 10, variant two" and origins["top_p"] == "default"
    assert origins["max_num_seqs"] == "params/a.yaml line 9, variant two"
    deep = catalogue.flat_with_origins("a@two", exams.parse_set("engine_args.attention_config.flash_attn_version=2"))
    assert next(line for line in deep.splitlines() if "attention_config" in line).endswith("  # SET")
    assert params.check(yaml.safe_load(said)) == exams.load("a@two", exams.parse_set("n=2 temperature=1.0"))


def test_a_list_of_a_folder_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("GOLDBOOK_PARAMS", str(tmp_path / "none"))
    with pytest.raises(BadInput, match="none: no such folder; expected the params files there, or GOLDBOOK_PARAMS to name another"):
        catalogue.listing()


def test_the_list_says_what_each_needs(write, monkeypatch):
    monkeypatch.setattr(platforms, "gpus", lambda: ())
    write("run: a\ntitle: Eight of them\nrequires: {device: gpu, gpus: 8}\n")
    write("run: b\nrequires: {device: cpu}\n", "b.yaml")
    write("run: c\nsead: 1\n", "c.yaml")
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in catalogue.listing().splitlines()}
    assert lines["a"] == "8 GPUs needs an NVIDIA GPU; this machine has none Eight of them"
    assert lines["b"] == "a CPU, no GPU yes"
    assert lines["c"] == "? no: params/c.yaml line 2: unknown key 'sead' (value 1); did you mean 'seed'?"


def test_the_reference_is_kept_true():
    assert (ROOT / "docs" / "params.md").read_text() == catalogue.reference(), "outdated: run `make docs`"


# -- the exams that are shipped -----------------------------------------------------------------


@pytest.mark.parametrize("run", exams.names())
def test_the_shipped_exams_are_right(run):
    exam = exams.load(run)
    assert exam.run == run and exam.title
    if exam.model in models.shapes():
        models.check(exam, models.facts_of((models.SHAPES / f"{exam.model}.json").read_text()))


def test_every_gpu_exam_has_variants_for_1_2_4_and_8():
    for file in ("verl-qwen2.5-0.5b-gsm8k", "verl-smollm2-gsm8k", "megatron-583m-dp8-sharegpt", "megatron-583m-static"):
        for count in (1, 2, 4, 8):
            exam = exams.load(f"{file}@gpu{count}")
            assert exam.requires.gpus == count == platforms.workers(exam) * exam.replicas


@pytest.mark.parametrize("exam", [exam for exam in (
    *map(exams.load, [*exams.select("megatron-583m-static"), *exams.select("verl-smollm2-gsm8k")]), *sweeps.load("megatron-583m-static@gpu1").settings.values()) if "kv_cache_memory_bytes" in exam.engine_args],
    ids=lambda exam: f"{exam.replicas} replicas of {exam.run}")
def test_a_kv_cache_of_fixed_size_holds_what_may_run_at_once(exam):
    """Else requests are preempted, and the exam measures prompts that are read twice."""
    shape = json.loads((models.resolve(exam) / "config.json").read_text())
    head_size = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    a_token = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head_size * 2  # keys and values, two bytes each
    longest = 300 + exam.max_tokens if exam.subject == "gsm8k" else exam.input_len + exam.output_len
    assert exam.engine_args["max_num_seqs"] * longest * a_token <= exam.engine_args["kv_cache_memory_bytes"]


def test_verls_exam_is_as_verl_writes_it():
    exam = exams.load("verl-qwen2.5-0.5b-gsm8k@gpu8")
    assert (exam.num_prompts, exam.n, exam.temperature, exam.top_p, exam.top_k, exam.max_tokens) == (1319, 4, 1.0, 0.7, 50, 1024)
    assert exam.prompt_suffix == " Let's think step by step and output the final answer after \"####\"."
    assert (exam.engine, exam.replicas, exam.engine_args["tensor_parallel_size"]) == ("server", 4, 2)
    assert exam.engine_args["max_model_len"] == 2048 + 1024 and exam.engine_args["gpu_memory_utilization"] == 0.9


def test_validating_every_exam_is_quick_and_needs_neither_vllm_nor_torch():
    code = ("import sys, time; began = time.perf_counter()\nfrom workbook import exams\nfor run in exams.names(): exams.load(run)\n"
            "print(len(exams.names()), time.perf_counter() - began, *sorted({'vllm', 'torch', 'transformers'} & set(sys.modules)))")
    count, seconds, *loaded = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True).stdout.split()
    assert int(count) >= 15 and float(seconds) < 2 and loaded == []


def test_null_takes_a_key_away_whatever_stands_before_it():
    for text in ("engine_args.max_num_seqs=8 engine_args.enforce_eager=null", "engine_args.enforce_eager=null engine_args.max_num_seqs=8"):
        found = exams.load("smoke", exams.parse_set(text))
        assert found.engine_args["max_num_seqs"] == 8 and "enforce_eager" not in found.engine_args
    assert exams.load("smoke", exams.parse_set("gates=null n=1")).gates == {}


def test_an_alias_to_itself_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("GOLDBOOK_PARAMS", str(tmp_path))
    (tmp_path / "a.yaml").write_text("run: a\nengine_args: &x [*x]\n")
    with pytest.raises(BadInput, match="an alias stands for something that it is in itself; expected none that does"):
        exams.read(tmp_path / "a.yaml")


def test_a_relative_folder_counts_from_the_checkout(monkeypatch, tmp_path):
    """And not from where make, a kernel or a test happens to be."""
    monkeypatch.setenv("GOLDBOOK_GOLDENS", "somewhere/goldens")
    monkeypatch.chdir(tmp_path)
    assert paths.goldens() == ROOT / "somewhere" / "goldens"


@pytest.mark.parametrize("words, said", [
    ('n=8 n=4', "SET: key 'n' is given twice; expected it once"),
    ('run=other', "SET: key 'run' is 'other'; it is the params file's name, and is not overridden: expected RUN=other"),
    ("gates.output_tok_s.delta=0.1 n=2 gates.output_tok_s.delta=0.2", "SET: key 'gates.output_tok_s.delta' is given twice; expected it once")])
def test_what_is_said_twice_is_not_taken_by_chance(words, said):
    with pytest.raises(BadInput, match=said):
        exams.parse_set(words)


def test_a_path_and_a_folder_that_is_not_there(folders, monkeypatch):
    with pytest.raises(BadInput, match="^RUN is '../a'; expected a run's name and no path"):
        exams.load("../a")
    monkeypatch.setenv("GOLDBOOK_PARAMS", str(folders / "none"))
    with pytest.raises(BadInput, match="none: no such folder; expected the params files there, or GOLDBOOK_PARAMS to name another"):
        exams.load("a")
