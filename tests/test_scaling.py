"""Scaling against one GPU: from results and goldens made up in folders of the test's own."""
import pandas as pd
import pytest
from workbook import exams, files, goldens, metrics, params, paths, platforms, plots, results, scaling
from workbook.validity import Completeness

GPU = {"index": 0, "name": "G", "memory_bytes": 1}
MANY = {"output_tok_s@8": 1000.0, "output_tok_s@64": 19_000.0, "ttft_p50_ms@8": 5.0}
ONE = {"output_tok_s@8": 1000.0, "output_tok_s@64": 10_000.0}


def exam(variant="gpu2", **values):
    return params.check({"run": f"x@{variant}", "engine": "async", "num_prompts": 64, "concurrency": [8, 64],
                         "engine_args": {"data_parallel_size": int(variant[3:]), "max_num_seqs": 64}} | values)


def record(asked: params.Exam, gpus: int, finished="2026-05-01T10:00:00+00:00", **subject):
    return {"params": asked.model_dump(), "work_sha256": asked.work_hash(), "prompts_sha256": "p", "finished": finished,
            "machine": {"platform": f"G x{gpus}", "gpus": [GPU] * gpus}, "busy": {}, "telemetry_problem": "", "bound": [],
            "subject": {"model": "m", "weights_sha256": "w", "env": {}, "engine_args": asked.engine_args} | subject}


def store(run: str, status="PASSED", medians=ONE, **changes):
    asked = exam("gpu1", **changes.pop("values", {}))
    files.write_json(paths.run_folder(run) / "run.json", record(asked, 1) | changes)
    files.write_json(paths.run_folder(run) / "result.json", {"status": status, "metrics": {name: {"median": value} for name, value in medians.items()}})


def found(asked=None, **changes):
    asked = asked or exam()
    return scaling.against_one(asked, record(asked, 2) | changes, MANY)


def test_a_stored_result_on_one_gpu(folders):
    store("x@gpu1")
    assert found() == {"accelerators": 2, "against": "x@gpu1", "when": "2026-05-01T10:00:00+00:00", "unlike": "", "points": {
        "output_tok_s@8": {"speedup": 1.0, "efficiency": 0.5}, "output_tok_s@64": {"speedup": 1.9, "efficiency": 0.95}}, "each": {}}
    assert scaling.sentence(found()) == "2 GPUs give 1.90 × one (95 % efficiency), against x@gpu1 of 2026-05-01"
    assert scaling.sentence(None) == ""


def test_curves_over_the_gpus():
    """Replicas apart from tensor parallel; runs without scaling have no line."""
    def run(variant, accelerators, speedup, **values):
        return {"run": f"x@{variant}", "params": {"replicas": 1, "engine_args": {}} | values, "scaling": {
            "accelerators": accelerators, "against": "x@gpu1", "points": {"output_tok_s@8": {"speedup": 1.1}},
            "each": {"output_tok_s@8": {"of": "output_tok_s@4", "speedup": 1.0}, f"output_tok_s@{512 * accelerators}": {"of": "output_tok_s@512", "speedup": speedup}}}}
    tensor = run("gpu4-tp4", 4, 1.5, engine_args={"tensor_parallel_size": 4, "data_parallel_size": 1})
    whole = run("gpu2-dp", 2, 9.9, engine_args={"data_parallel_size": 2})
    whole["scaling"] |= {"each": {}, "points": {"output_tok_s": {"speedup": 1.9}}}
    curves = scaling.curves([run("gpu4", 4, 3.2, replicas=4), run("gpu2", 2, 1.9, replicas=2), tensor, whole, {"run": "y", "scaling": None}, {"run": "z"}])
    assert curves == {"x, replicas, 512 on each, against x@gpu1": [(1, 1.0), (2, 1.9), (4, 3.2)],
                      "x, tensor parallel, 512 on each, against x@gpu1": [(1, 1.0), (4, 1.5)], "x, data parallel, against x@gpu1": [(1, 1.0), (2, 1.9)]}
    figure = plots.scaling(curves)
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[1, 2, 4], [1, 1.9, 3.2], [1, 1.5], [1, 1.9]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.90 × (95 %)", "3.20 × (80 %)", "1.50 × (38 %)", "1.90 × (95 %)"]
    assert figure.axes[0].get_title() == "Scaling (n = 4 runs; higher is better)" and scaling.curves([]) == {}


def test_other_software_is_said_and_comes_last(folders):
    """After an upgrade it would be the upgrade that scales."""
    new = record(exam(), 2)["subject"] | {"packages": {"vllm": "0.30.0", "torch": "2.11"}, "driver": "600"}
    old = record(exam("gpu1"), 1)["subject"] | {"packages": {"vllm": "0.26.0", "torch": "2.11"}, "driver": "580"}
    store("x@gpu1", subject=old)
    assert scaling.sentence(found(subject=new)).endswith("against x@gpu1 of 2026-05-01, which had driver 580 (now 600), vllm 0.26.0 (now 0.30.0)")
    store("x@gpu1-b", subject=record(exam("gpu1"), 1)["subject"] | {k: new[k] for k in ("packages", "driver")}, finished="2026-04-01T10:00:00+00:00")
    assert (found(subject=new)["against"], found(subject=new)["unlike"]) == ("x@gpu1-b", "")


def test_the_same_load_on_each(folders):
    """Of a sweep of batches of random prompts the largest on two is held against half of it on one."""
    random = {"subject": "random", "input_len": 8, "output_len": 8, "max_tokens": 0, "ignore_eos": True, "chat_template": False, "load": "batch"}
    store("x@gpu1", values=random)
    asked = exam(**random, num_prompts=128, concurrency=[8, 16, 128])
    many = {"output_tok_s@8": 1100.0, "output_tok_s@16": 1800.0, "output_tok_s@128": 18_000.0}
    scaled = scaling.against_one(asked, record(asked, 2) | {"prompts_sha256": "more of them"}, many)
    assert scaled["points"] == {"output_tok_s@8": {"speedup": 1.1, "efficiency": 0.55}}
    assert scaled["each"] == {"output_tok_s@16": {"of": "output_tok_s@8", "speedup": 1.8, "efficiency": 0.9},
                              "output_tok_s@128": {"of": "output_tok_s@64", "speedup": 1.8, "efficiency": 0.9}}
    assert scaling.sentence(scaled) == "2 GPUs give 1.80 × one with 64 on each (90 % efficiency), against x@gpu1 of 2026-05-01"
    assert [row["metric"] for row in scaling.table(scaled)] == ["output_tok_s@8", "output_tok_s@16", "output_tok_s@128"]
    assert scaling.table(scaled)[0] == {"metric": "output_tok_s@8", "speedup": 1.1, "efficiency": 0.55, "speedup, same on each": None, "efficiency, same on each": None}
    longer = exam(**random | {"output_len": 9}, num_prompts=128, concurrency=[8, 16, 128])
    assert scaling.against_one(longer, record(longer, 2), many) is None, "longer answers are other work"


def test_a_schedule_does_not_scale(folders):
    """Whatever keeps up with it ends with it."""
    paced = {"load": "poisson", "request_rate": 4.0, "concurrency": []}
    store("x@gpu1", values=paced, medians={"output_tok_s": 100.0})
    asked = exam(**paced)
    assert scaling.against_one(asked, record(asked, 2), {"output_tok_s": 100.0}) is None


def test_replicas_and_parallel_sizes_are_how_it_is_spread(folders):
    store("x@gpu1")
    spread = {"engine": "server", "replicas": 2, "engine_args": {"tensor_parallel_size": 2, "max_num_seqs": 64}}
    assert found(exam(**spread)) is None, "another engine is other work"
    store("x@gpu1", values={"engine": "server"})
    asked = exam(**spread)
    assert scaling.against_one(asked, record(asked, 4), MANY)["against"] == "x@gpu1"


def test_several_engines_on_each_gpu_are_held_against_as_many_on_one(folders):
    spread = {"engine": "server", "engine_args": {"max_num_seqs": 64}}
    store("x@gpu1", values=spread | {"replicas": 1})
    assert found(exam(**spread, replicas=8)) is None, "one engine on a GPU is another exam than four"
    store("x@gpu1-tuned", values=spread | {"replicas": 4})
    assert found(exam(**spread, replicas=8))["against"] == "x@gpu1-tuned"


@pytest.mark.parametrize("stem", ["megatron-583m-static", "verl-smollm2-gsm8k"])
def test_every_variant_of_the_exams_for_several_gpus_has_one_for_one(stem, monkeypatch):
    """Or its report could not say how well they pull together."""
    monkeypatch.setattr(platforms, "gpus", lambda: tuple(platforms.Gpu(i, "G", 1) for i in range(8)))
    asked = {name: exams.load(name) for name in exams.select(stem)}
    alone = [each for each in asked.values() if each.requires.gpus == 1]
    for name, many in asked.items():
        if many.requires.gpus > 1:
            there, batches = record(many, many.requires.gpus), many.subject == "random" and many.load == "batch"
            assert any(scaling._is_same_work(many, there, goldens.key_of(record(one, 1)), record(one, 1)["subject"], one.points if batches else []) for one in alone), name


@pytest.mark.parametrize("changes", [
    {"status": "INVALID"}, {"medians": {}}, {"prompts_sha256": "q"}, {"values": {"num_prompts": 32, "concurrency": [8, 32]}},
    {"machine": {"platform": "H x1", "gpus": [GPU]}}, {"subject": {"model": "other", "weights_sha256": "w", "env": {}, "engine_args": {"max_num_seqs": 64}}},
    {"subject": {"model": "m", "weights_sha256": "w", "env": {}, "engine_args": {"max_num_seqs": 8}}},
    {"subject": {"model": "m", "weights_sha256": "w", "env": {"A": "1"}, "engine_args": {"max_num_seqs": 64}}}, {"medians": {"output_tok_s@8": None, "output_tok_s@64": None}}],
    ids=["invalid", "stopped", "prompts", "work", "gpu", "model", "arguments", "environment", "unmeasured"])
def test_what_does_not_compare_is_not_compared(folders, changes):
    store("x@gpu1", **changes)
    assert found() is None


def test_damaged_results_and_other_files_are_passed_over(folders):
    store("xy@gpu1")
    store("x@half")
    (paths.run_folder("x@half") / "result.json").write_text("{")
    (paths.run_folder("x@empty")).mkdir()
    assert found() is None
    store("x@gpu1", finished="2026-04-01T10:00:00+00:00")
    store("x@one", finished="2026-04-02T10:00:00+00:00")
    assert found()["against"] == "x@one", "the latest"


def golden(run="x@gpu1", platform="G x1", known=None, **values):
    samples = {name: goldens.Samples(unit="tok/s", direction="higher", sessions=[[value * 0.9, value], [value * 1.1]]) for name, value in ONE.items()}
    alone = record(exam("gpu1", **values), 1)
    goldens.write(goldens.path_of(platform, run), goldens.Golden(
        run=run, key=goldens.key_of(alone), subject=known or alone["subject"], environment={}, controls={}, metrics=samples, correct=None, sequences=[],
            sessions=[goldens.Session(finished="2026-03-01T00:00:00+00:00", visit="v", commit="c", dirty=False)],
            blessing=goldens.Blessing(by="somebody", when="2026-03-01T00:00:00+00:00", reason="first")))


def test_else_the_golden_of_one_gpu(folders):
    golden()
    goldens.path_of("G x1", "x@gpu0").write_text("{")
    golden("y@gpu1")
    assert scaling.sentence(found()) == "2 GPUs give 1.90 × one (95 % efficiency), against the golden of x@gpu1 of 2026-03-01"
    store("x@gpu1")
    assert found()["against"] == "x@gpu1", "a result of this machine comes first"


def test_an_imported_golden_is_of_no_known_engine(folders):
    random = {"subject": "random", "input_len": 8, "output_len": 8, "max_tokens": 0, "ignore_eos": True, "chat_template": False, "load": "batch"}
    golden(**random)
    asked = exam(**random)
    assert found(asked)["against"] == "the golden of x@gpu1"
    golden(known={"imported": "golden_values.json"}, **random)
    assert found(asked) is None


def test_one_accelerator_scales_to_nothing(folders):
    store("x@gpu1")
    asked = exam("gpu1")
    assert scaling.against_one(asked, record(asked, 1), ONE) is None
    assert scaling.against_one(asked, record(asked, 1) | {"machine": {"platform": "CPU x2", "gpus": []}}, ONE) is None


def test_the_first_screen_says_it(folders):
    store("x@gpu1")
    asked = exam()
    requests = pd.DataFrame({"session": [1] * 4, "repetition": [1] * 4, "point": [8, 8, 64, 64], "replica": [0, 1] * 2, "output_tokens": [5, 6] * 2,
                             "arrival_s": 1.0, "first_token_s": [1.1, 1.1, 1.1, 1.4], "last_token_s": [2.0, 2.0, 3.0, 5.0]})
    answers = {q["question"]: q["answer"] for q in results.five_questions(asked, Completeness(2, 2, 0.0, 0.0, []), record(asked, 2) | {"telemetry_problem": "it ended"}, requests, {}, "no golden", None, None, found())}
    assert answers["Do they pull together?"] == ("2 replicas answered, with 10, 12 output tokens: the busiest has 1.09 × the mean; at 64 they stand idle 25 % of the time on average, until the slowest is done; "
                                                 "the answer that ended last was coming for 90 % of the time, which more replicas shorten only as far as each token comes faster; "
                                                 "2 GPUs give 1.90 × one (95 % efficiency), against x@gpu1 of 2026-05-01")
    assert answers["Are the accelerators full?"] == "the load was too short to sample; it ended"
    many = record(asked, 8) | {"busy": {"cpu_busy_pct": 9.0} | {f"gpu{i}_busy_pct": 30.0 + i for i in range(8)}}
    spread = pd.DataFrame({"session": 1, "repetition": 1, "point": 0, "replica": range(8), "output_tokens": range(100, 108), "arrival_s": 0.0, "first_token_s": 3.0, "last_token_s": 9.0})
    paced = asked.model_copy(update={"load": "poisson"})
    answers = {q["question"]: q["answer"] for q in results.five_questions(paced, Completeness(2, 2, 0.0, 0.0, []), many, spread, {}, "no golden", None, None)}
    assert answers["Are the accelerators full?"] == "CPU 9 % busy, 8 GPUs 34 % busy (30 to 37)", "eight of them are not read one by one"
    assert answers["Do they pull together?"] == "8 replicas answered, with 100 to 107 output tokens: the busiest has 1.03 × the mean", "the end is the schedule's"
    answers = {q["question"]: q["answer"] for q in results.five_questions(asked, Completeness(2, 2, 0.0, 0.0, []), many, spread, {}, "no golden", None, None)}
    assert answers["Do they pull together?"].endswith("they stand idle 0 % of the time on average, until the slowest is done"), "and its tokens came for two thirds"
    answers = {q["question"]: q["answer"] for q in results.five_questions(paced, Completeness(2, 2, 0.0, 0.0, []), many, spread.assign(output_tokens=1000), {}, "no golden", None, None)}
    assert answers["Do they pull together?"] == "8 replicas answered, each with 1,000 output tokens"
    assert metrics.headline(found()["points"]) == "output_tok_s@64"
    behind = asked.model_copy(update={"engine": "server", "engine_args": {"data_parallel_size": 4}})
    answers = {q["question"]: q["answer"] for q in results.five_questions(behind, Completeness(2, 2, 0.0, 0.0, []), record(asked, 4), requests.assign(replica=0), {}, "no golden", None, None)}
    assert answers["Do they pull together?"] == "4 data-parallel engines behind one server: how they share the work is not seen from here"
    few = asked.model_copy(update={"engine": "async", "engine_args": {"data_parallel_size": 8}, "load": "poisson", "ignore_eos": False, "max_tokens": 0})
    for rows, said in ((requests.assign(replica=0), "1 of 8 replicas answered; the others had no request, and the busiest had 100 % of the output tokens"),
                       (requests, "2 of 8 replicas answered; the others had no request, and the busiest had 55 % of the output tokens")):
        answers = {q["question"]: q["answer"] for q in results.five_questions(few, Completeness(2, 2, 0.0, 0.5, []), record(asked, 8), rows, {}, "no golden", None, None)}
        assert answers["Do they pull together?"] == said
    assert "50 % cut off at their own lengths" in answers["Did every answer arrive?"]
