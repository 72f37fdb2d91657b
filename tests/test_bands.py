"""Band mode: Megatron-LM's rule on its own formats, number by number."""
import json

import pandas as pd
import pytest
import yaml
from workbook import __main__, bands, exams, goldens, params, results
from workbook.errors import BadInput

SWEEP = {"throughput_tok_per_sec": 344.0, "avg_latency_ms": 2900.0, "p50_latency_ms": 2910.0, "p99_latency_ms": 3000.0, "tpot_ms_per_tok": 23.0}


def written(folder, name, value):
    path = folder / name
    path.write_text(json.dumps(value))
    return path


def judge(folder, golden, new, *words):
    return __main__.main(["judge-band", str(written(folder, "golden.json", golden)), str(written(folder, "new.json", new)), *words])


@pytest.mark.parametrize(("samples", "code"), [
    ([1, 120, 121, 119], 0),            # the first is a warm-up, on either side
    ([500, 108.171, 108.171], 0),       # 0.9 x 120.19, the bound itself
    ([120, 108.1, 108.1], 1),
    ([120, 144.2, 144.2], 0),
    ([120, 144.3, 144.3], 1),           # above 1.2: the golden is out of date
])
def test_throughput_lists_pass_from_0_9_to_below_1_2_of_the_median(tmp_path, capsys, samples, code):
    assert judge(tmp_path, {"throughput": [22.0, 120.19, 120.19, 120.19], "0": {"generated_tokens": [1]}}, {"throughput": samples}) == code
    assert capsys.readouterr().out.startswith("FAILED" if code else "PASSED")


def test_the_upper_bound_itself_fails():
    assert not bands.judge("throughput", 100.0, 120.0).passed
    assert bands.judge("throughput", 100.0, 119.999).passed


@pytest.mark.parametrize(("change", "code"), [
    ({}, 0), ({"throughput_tok_per_sec": 309.7}, 0), ({"throughput_tok_per_sec": 309.5}, 1), ({"throughput_tok_per_sec": 413.0}, 1),
    ({"avg_latency_ms": 3189.0}, 0), ({"avg_latency_ms": 3191.0}, 1), ({"p50_latency_ms": 10.0}, 0), ({"tpot_ms_per_tok": 25.4}, 1),
    ({"p99_latency_ms": 9000.0}, 0),    # the largest of five: its configurations leave it out
])
def test_sweeps_hold_rates_within_the_band_and_times_below_1_1(tmp_path, change, code):
    assert judge(tmp_path, {"batch_8": SWEEP}, {"batch_8": SWEEP | change}) == code


def test_a_batch_or_a_metric_that_is_missing_fails(tmp_path, capsys):
    without = {k: v for k, v in SWEEP.items() if k != "tpot_ms_per_tok"}
    assert judge(tmp_path, {"batch_1": SWEEP, "batch_8": SWEEP}, {"batch_8": SWEEP}) == 1
    assert "throughput_tok_per_sec@1 is missing" in capsys.readouterr().out
    assert judge(tmp_path, {"batch_8": SWEEP}, {"batch_8": without}) == 1
    assert judge(tmp_path, {"batch_8": without}, {"batch_8": SWEEP}) == 0


def test_a_batch_of_which_nothing_would_be_judged_is_refused(tmp_path, capsys):
    assert judge(tmp_path, {"batch_1": SWEEP, "batch_8": {"throughput": 344.0}}, {"batch_1": SWEEP, "batch_8": {"throughput": 30.0}}) == 2
    assert "key 'batch_8' has throughput; expected one of throughput_tok_per_sec, avg_latency_ms" in capsys.readouterr().err


def test_platforms(tmp_path, capsys):
    golden = {"h100": {"batch_8": SWEEP}, "gb200": {"batch_8": SWEEP | {"throughput_tok_per_sec": 900.0}}}
    assert judge(tmp_path, golden, {"batch_8": SWEEP}, "--platform", "h100") == 0
    assert judge(tmp_path, golden, {"batch_8": SWEEP}, "--platform", "gb200") == 1
    assert judge(tmp_path, {"h100": {"batch_8": SWEEP}}, {"batch_8": SWEEP}) == 0
    capsys.readouterr()
    assert judge(tmp_path, golden, {"batch_8": SWEEP}) == 2
    assert "holds the platforms gb200, h100; expected one of them as --platform" in capsys.readouterr().err


@pytest.mark.parametrize(("golden", "said"), [
    ({"throughput": [1.0]}, "expected a list of two numbers or more"),
    ({"throughput": [1.0, -2.0]}, "key 'throughput.1' is -2.0; expected a number above 0"),
    ({"throughput": [1.0, float("nan")]}, "expected a number above 0"),
    ({}, "holds neither 'throughput' nor 'batch_<size>'"),
    ([1, 2], "holds neither"),
    ({"batch_x": SWEEP}, "key 'batch_x' is not a batch"),
    ({"batch_8": SWEEP | {"avg_latency_ms": "fast"}}, "key 'batch_8.avg_latency_ms' is 'fast'"),
])
def test_a_file_of_no_such_format_gets_a_sentence(tmp_path, golden, said):
    with pytest.raises(BadInput, match=said.replace("(", r"\(")):
        bands.read(written(tmp_path, "golden.json", golden))


def test_bounds_that_are_no_band(tmp_path, capsys):
    assert judge(tmp_path, {"throughput": [1, 2]}, {"throughput": [1, 2]}, "--low", "90") == 2
    assert "the band is 90 to 1.2; expected 0 < low <= 1 < high" in capsys.readouterr().err


def test_two_formats_do_not_compare(tmp_path, capsys):
    assert judge(tmp_path, {"batch_8": SWEEP}, {"throughput": [1, 2]}) == 2
    assert "expected what" in capsys.readouterr().err


@pytest.mark.parametrize(("direction", "new", "status"), [
    ("higher", 95.0, "PASSED"), ("higher", 89.0, "REGRESSED"), ("higher", 121.0, "IMPROVED"),
    ("lower", 109.0, "PASSED"), ("lower", 111.0, "REGRESSED"), ("lower", 50.0, "PASSED"),
])
def test_a_gate_with_the_rule_band(direction, new, status):
    golden = goldens.Golden.model_construct(metrics={"m": goldens.Samples(unit="", direction=direction, sessions=[[99.0, 100.0], [101.0]])})
    assert results.judge_metric("m", params.Gate(rule="band"), golden, [[new]])["status"] == status


def test_a_gate_mixes_no_rules():
    assert params.check(params.check({"run": "x", "gates": {"output_tok_s": {"rule": "band", "low": 0.8}}}).model_dump())
    with pytest.raises(BadInput, match="key 'gates' has delta: 0.1 with rule: band; expected low and high"):
        params.check({"run": "x", "gates": {"output_tok_s": {"rule": "band", "delta": 0.1}}})
    with pytest.raises(BadInput, match="key 'gates' has low: 0.8 with rule: interval"):
        params.check({"run": "x", "gates": {"output_tok_s": {"low": 0.8}}})


@pytest.mark.parametrize(("exam", "file", "name", "value"), [
    ({"gates": {"request_tok_s_p50": {"rule": "band"}}}, {"throughput": [22.0, 120.0, 121.0, 122.0]}, "request_tok_s_p50", 121.0),
    ({"load": "batch", "concurrency": [8], "num_prompts": 8, "gates": {"output_tok_s@8": {"rule": "band"}}}, {"h100": {"batch_8": SWEEP}}, "output_tok_s@8", 344.0),
])
def test_an_imported_golden_is_found_and_judges_by_its_band(folders, tmp_path, exam, file, name, value):
    (folders / "params" / "x.yaml").write_text(yaml.safe_dump({"run": "x", **exam}))
    path = written(tmp_path, "golden_values.json", file)
    words = ["import-golden", str(path), "--run", "x", "--platform", "Some GPU x8"]
    assert __main__.main(words) == 0
    key = goldens.Key(work=exams.load("x").work_hash(), prompts="whatever they are", platform="Some GPU x8")
    golden, why = goldens.find("x", key)
    assert why == "" and golden.metrics[name].sessions == [[value]] and golden.blessing.reason == "imported from golden_values.json"
    judged = results.look(exams.load("x").gates, golden, pd.DataFrame({name: [0.8 * value]}, index=pd.MultiIndex.from_tuples([(1, 1)], names=["session", "repetition"])),
                          [{"host_s": [1.0]}])
    assert judged["status"] == "REGRESSED" and judged["controls"]["comparable"]
    assert __main__.main(words) == 2, "one that is there is not replaced"


def test_a_golden_is_imported_for_gates_by_a_band_only(folders, tmp_path, capsys):
    (folders / "params" / "x.yaml").write_text(yaml.safe_dump({"run": "x", "gates": {"output_tok_s": {"delta": 0.1}}}))
    path = written(tmp_path, "golden_values.json", {"throughput": [1.0, 2.0]})
    assert __main__.main(["import-golden", str(path), "--run", "x", "--platform", "P"]) == 2
    assert "key 'gates' has rule: band for none; expected it for some of request_tok_s_p50" in capsys.readouterr().err
