"""Two stored runs held against each other."""
import pytest
from test_goldens import by_repetition, record, scores
from workbook import __main__, diffs, exams, files, goldens, paths
from workbook.errors import BadInput

SEQUENCES = [{"prompt_token_ids": [1], "token_ids": [2, 3], "logprobs": [-0.5, -0.25]}]


def stored(run, values, *, gates=None, right=(True, False, True, True), others_pct=1.0, **changes):
    """A run's folder with what compare.ipynb leaves in it."""
    session = goldens.session_of(record(**changes), by_repetition(values).assign(others_cpu_pct=others_pct), scores(right), SEQUENCES)
    folder = paths.run_folder(run)
    goldens.write(folder / "session.json", session)
    files.write_json(folder / "run.json", {"params": {"run": "x", "gates": gates or {}}})
    return folder


@pytest.mark.parametrize(("values", "code", "status"), [
    ((100.5, 99.5, 100.0), 0, "PASSED"), ((90.5, 89.5, 90.0), 1, "REGRESSED"), ((120.5, 119.5, 120.0), 0, "IMPROVED")])
def test_the_rule_of_the_goldens_holds_between_two_runs(folders, capsys, values, code, status):
    stored("before", (100.0, 101.0, 99.0))
    folder = stored("after", values, subject={"weights_sha256": "h", "packages": {"vllm": "2"}})
    assert __main__.main(["diff", "before", str(folder)]) == code  # by name, and by folder
    said = capsys.readouterr().out
    assert f"{status}: output_tok_s" in said and said.rstrip().endswith(f"B against A: {status}")
    assert "packages.vllm: 1 -> 2" in said


def test_drawn_answers_take_more_to_be_worse(folders):
    """As in a run's own verdict: at one sample a question p < .05 for greedy answers, p < .01 for drawn ones, and for those of whom it is not known."""
    stored("before", (100.0, 101.0, 99.0))
    stored("after", (100.0, 101.0, 99.0))
    (a, exam), (b, _) = diffs.load("before"), diffs.load("after")
    a, b = (x.model_copy(update={"correct": [[i >= wrong] for i in range(40)]}) for x, wrong in ((a, 0), (b, 6)))  # p = 1 / 64
    judged = [diffs.compare(a, b, of)[2] for of in (exam.model_copy(update={"temperature": 0.0}), exam.model_copy(update={"temperature": 1.0}), None)]
    assert judged == ["REGRESSED", "PASSED", "PASSED"]


def test_greedy_answers_that_part_early_count_as_in_a_run(folders):
    """Sixteen answers of which none parted in 3,200 tokens, and fourteen that do in 400."""
    stored("before", (100.0, 101.0, 99.0))
    stored("after", (100.0, 101.0, 99.0))
    (a, exam), (b, _) = diffs.load("before"), diffs.load("after")
    a, b = (x.model_copy(update={"sequences": 16 * x.sequences, "parted": parted}) for x, parted in ((a, (0, 3200)), (b, (14, 400))))
    sentences, _, status = diffs.compare(a, b, exam)
    assert status == "REGRESSED" and any(s.startswith("REGRESSED: 14 of 16 greedy answers part from A's, one in 29 tokens; in its own sessions ") for s in sentences)
    assert diffs.compare(b, a, exam)[2] == "PASSED"


def test_a_run_is_not_called_a_golden(folders, capsys):
    """Whatever judges: the gates, a band, the machine, the answers."""
    band = {"rule": "band", "low": 0.9, "high": 1.2}
    stored("before", (100.0, 101.0, 99.0))
    stored("after", (90.5, 89.5, 90.0), gates={"output_tok_s": {}, "ttft_p50_ms": band},
           controls={name: [1.3 * v for v in values] for name, values in record()["controls"].items()}, right=(True, False, False, False))
    __main__.main(["diff", "before", "after"])
    said = capsys.readouterr().out
    for words in ("output_tok_s -10.0 % against A (", "× A ", "longer than for A: ", "log-probabilities of A's answers"):
        assert words in said, said
    assert "golden" not in said


def test_the_gates_of_the_run_are_what_is_judged(folders, capsys):
    stored("before", (100.0, 101.0, 99.0))
    stored("after", (90.5, 89.5, 90.0), gates={"ttft_p50_ms": {"delta": 0.05, "margin": 0.03}})
    assert __main__.main(["diff", "before", "after"]) == 0  # lower is better there
    assert "IMPROVED: ttft_p50_ms" in capsys.readouterr().out


@pytest.mark.parametrize(("platform", "host", "others", "status", "said"), [
    ("Test CPU x2", 1.3, 1.0, "INCONCLUSIVE", "the machine itself changed"), ("Test CPU x2", 1.08, 1.0, "INCONCLUSIVE", "fixed work of the machine's, took 8.0 % longer"),
    ("Test CPU x2", 1.0, 20.0, "INCONCLUSIVE", "other processes took 20 % of the cores"), ("Test CPU x4", 1.3, 1.0, "REGRESSED", "the two platforms differ")])
def test_the_controls_have_their_say(folders, capsys, platform, host, others, status, said):
    machine = record()["machine"] | {"platform": platform}
    stored("before", (100.0, 101.0, 99.0))
    stored("after", (90.5, 89.5, 90.0), machine=machine, others_pct=others, controls={name: [host * v for v in values] for name, values in record()["controls"].items()})
    __main__.main(["diff", "before", "after"])
    found = capsys.readouterr().out
    assert f"{status}: output_tok_s" in found and said in found


def test_a_golden_can_be_either(folders, capsys):
    stored("after", (100.0, 101.0, 99.0))
    assert __main__.main(["diff", str(paths.run_folder("after") / "session.json"), "after"]) == 0


def test_other_work_and_missing_runs_get_a_sentence(folders, capsys):
    stored("before", (100.0, 101.0, 99.0))
    stored("after", (100.0, 101.0, 99.0), work_sha256="v", params={"run": "x", "num_prompts": 8, "temperature": 0.5, "n": 2})
    assert __main__.main(["diff", "before", "after"]) == 2
    assert "do not compare: they ran with other parameters; key 'num_prompts' is" in (said := capsys.readouterr().err) and "key 'n' is" in said
    stored("after", (100.0, 101.0, 99.0), prompts_sha256="q")
    assert __main__.main(["diff", "before", "after"]) == 2
    assert "do not compare: they ran with other prompts" in capsys.readouterr().err
    with pytest.raises(BadInput, match="'nothing' is no stored run; expected a name in"):
        diffs.load("nothing")
    with pytest.raises(BadInput, match=f"'/nowhere/x' is no stored run; expected a name in {paths.reports()}/runs, a run's"):
        diffs.load("/nowhere/x")
    with pytest.raises(BadInput, match="/params: is no run's folder; expected one of those in "):
        diffs.load(str(folders / "params"))
    (paths.run_folder("after") / "session.json").unlink()
    files.write_json(paths.run_folder("after") / "result.json", {"sentence": "2 of 4 answers are missing"})
    with pytest.raises(BadInput, match="holds no valid session \\(2 of 4 answers are missing\\)"):
        diffs.load("after")
