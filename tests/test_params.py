"""The schema, and the exact sentence each kind of wrong input gets."""
import json

import nbformat
import pytest
import yaml
from conftest import ROOT
from workbook import params
from workbook.errors import BadInput

GOOD = {"run": "x"}
WRONG = [
    ({"num_promts": 5}, "parameters: unknown key 'num_promts' (value 5); did you mean 'num_prompts'?"),
    ({"zebra": 5}, "parameters: unknown key 'zebra' (value 5)"),
    ({"num_prompts": "5"}, "parameters: key 'num_prompts' is '5' (str); expected a valid integer"),
    ({"num_prompts": 0}, "parameters: key 'num_prompts' is 0 (int); expected greater than or equal to 1"),
    ({"num_prompts": True}, "parameters: key 'num_prompts' is True (bool); expected a valid integer"),
    ({"temperature": "1e-3"}, "parameters: key 'temperature' is '1e-3' (str); expected a valid number"),
    ({"temperature": True}, "parameters: key 'temperature' is True (bool); expected a valid number"),
    ({"ignore_eos": "yes"}, "parameters: key 'ignore_eos' is 'yes' (str); expected a valid boolean"),
    ({"engine": "warp"}, "parameters: key 'engine' is 'warp' (str); expected 'offline'"),
    ({"requires": {"gpu": 1}}, "parameters: unknown key 'requires.gpu' (value 1)"),
    ({"gates": {"output_tok_s": {"delta": 5.0}}}, "parameters: key 'gates.output_tok_s.delta' is 5.0 (float); expected less than 1"),
    ({"gates": {"output_tok": {}}}, "parameters: key 'gates' names the metric 'output_tok'; expected one that is measured; did you mean 'output_tok_s'?"),
    ({"n": 4}, "parameters: key 'n' is 4: temperature 0 gives the same answer every time; expected n = 1 or a temperature above 0"),
    ({"max_tokens": 0}, "parameters: key 'max_tokens' is 0: subject 'chain_sum' has no answer lengths of its own; expected 1 or more"),
    ({"run": "a/b"}, "parameters: key 'run' is 'a/b' (str); expected to match pattern '^[A-Za-z0-9][A-Za-z0-9._@-]*$'"),
]


@pytest.mark.parametrize("values, sentence", WRONG, ids=[next(iter(w[0])) + str(i) for i, w in enumerate(WRONG)])
def test_wrong_parameters_get_a_sentence(values, sentence):
    with pytest.raises(BadInput) as caught:
        params.check(GOOD | values)
    assert str(caught.value) == sentence


def test_run_is_mandatory():
    with pytest.raises(BadInput, match="key 'run' is missing"):
        params.check({})


def test_an_integer_is_a_fine_number():
    assert params.check(GOOD | {"temperature": 1}).temperature == 1.0
    assert params.check(GOOD | {"gates": {"output_tok_s": {"margin": 0}}}).gates["output_tok_s"].margin == 0.0


def test_a_namespace_of_a_notebook_is_filtered():
    exam = params.check(GOOD | {"In": ["x"], "Out": {}, "_i1": "x", "json": json, "print": print, "exit": 1})
    assert exam.run == "x"


def test_the_file_must_be_named_like_its_run(folders):
    (folders / "params" / "a.yaml").write_text("run: b\n")
    with pytest.raises(BadInput, match="params/a.yaml: key 'run' is 'b'; expected the file's stem, 'a'"):
        params.load("a")


@pytest.mark.parametrize("text, sentence", [
    ("run: [", "params/a.yaml: not YAML: while parsing"),
    ("just text", "params/a.yaml: holds a str; expected 'key: value' lines"),
    ("", "params/a.yaml: holds a NoneType; expected 'key: value' lines"),
])
def test_files_that_are_no_params(folders, text, sentence):
    (folders / "params" / "a.yaml").write_text(text)
    with pytest.raises(BadInput) as caught:
        params.load("a")
    assert str(caught.value).startswith(sentence)


def test_a_missing_run_names_the_nearest(folders):
    (folders / "params" / "smoke.yaml").write_text("run: smoke\n")
    with pytest.raises(BadInput, match="params/smok.yaml: no such run; expected one of smoke; did you mean 'smoke'?"):
        params.load("smok")


def test_set_overrides_are_read_as_yaml():
    assert params.parse_set("n=8 temperature=0.5 env={A:1} ignore_eos=true title=") == {
        "n": 8, "temperature": 0.5, "env": {"A:1": None}, "ignore_eos": True, "title": ""}
    assert params.parse_set("engine_args='{max_num_seqs: 8}'") == {"engine_args": {"max_num_seqs": 8}}
    with pytest.raises(BadInput, match="SET: 'n' is not an override; expected key=value"):
        params.parse_set("n 8")
    with pytest.raises(BadInput, match="SET: .* cannot be read .*; expected key=value words, values with spaces quoted"):
        params.parse_set("engine_args={max_num_seqs: 8}")


def test_work_hash_ignores_what_is_under_test():
    base = params.check(GOOD)
    assert base.work_hash() == params.check({"run": "y", "model": "/m", "engine_args": {"max_num_seqs": 1}, "repetitions": 9}).work_hash()
    assert base.work_hash() != params.check(GOOD | {"seed": 1}).work_hash()


@pytest.mark.parametrize("run", ["smoke", "sharegpt-smollm2"])
def test_the_shipped_exams_are_right(run):
    assert params.load(run).run == run


def test_generate_defaults_are_the_smoke_exam():
    """Restart-and-Run-All in JupyterLab takes the smoke exam, and every key of the schema is declared."""
    notebook = nbformat.read(ROOT / "notebooks" / "generate.ipynb", as_version=4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    namespace: dict = {}
    exec(cell.source, namespace)
    declared = {k: v for k, v in namespace.items() if not k.startswith("__")}
    assert set(declared) == set(params.Exam.model_fields)
    smoke = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
    assert params.check(declared) == params.check(smoke)
    assert all("#" in line for line in cell.source.splitlines())
