"""`result.json` is checked when it is written and when it is read, and the schemas that are published are these."""
import json

import pytest
from conftest import ROOT
from workbook import files, goldens, params, paths, results, schemas, summary
from workbook.errors import BadInput

METRIC = {"unit": "tok/s", "direction": "higher", "sessions": [[0.1 + 0.2, None]], "median": 0.1 + 0.2, "golden_sessions": None, "golden_median": None}


def result(**more):
    return schemas.stopped("a", "INVALID", "because", params.check({"run": "a"}), "generate") | {"metrics": {"output_tok_s": METRIC}} | more


def test_a_result_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "result.json"
    schemas.write_result(path, result(seconds=1.0))
    found = schemas.read_result(path)
    assert found["metrics"]["output_tok_s"]["median"] == 0.3 and found["stopped_in"] == "generate"
    before = path.read_bytes()
    schemas.write_result(path, found)
    assert path.read_bytes() == before


@pytest.mark.parametrize("change, message", [
    ({"staus": "PASSED"}, "key 'staus': Extra inputs are not permitted"),
    ({"status": "GREEN"}, "key 'status': Input should be 'INVALID', 'REGRESSED'"),
    ({"title": None}, "key 'title': Input should be a valid string"),
    ({"metrics": {"output_tok_s": METRIC | {"median": float("nan")}}}, "key 'metrics.output_tok_s.median': Input should be a finite number"),
    ({"metrics": {"output_tok_s": {"unit": "tok/s"}}}, "key 'metrics.output_tok_s.direction': Field required"),
    ({"schema_version": 99}, "key 'schema_version' is 99; expected 1: run it again with this version"),
])
def test_a_result_that_is_none_is_neither_written_nor_read(tmp_path, change, message):
    path = tmp_path / "result.json"
    with pytest.raises(BadInput, match=message):
        schemas.write_result(path, result(**change))
    assert not path.exists()
    path.write_text(json.dumps(result(**change)))
    with pytest.raises(BadInput, match=message):
        schemas.read_result(path)


@pytest.mark.parametrize("text, said", [
    ("{", "not readable as JSON"), ("[]", "key 'schema_version' is 'list'"), ('{"schema_version": 99}', "key 'schema_version' is 99; expected 1"),
    ('{"schema_version": 1, "run": "a"}', "key 'title': Field required"),
])
def test_a_broken_result_is_invalid_in_the_summary(folders, text, said):
    for place in (paths.run_folder("a"), folders / "reports" / "history" / "a" / "20260101"):
        files.write_text(place / "result.json", text)
    (found,) = summary.collect()
    assert found["status"] == "INVALID" and said in found["sentence"]
    assert [r["status"] for r in summary.history()] == ["INVALID"]
    summary.write([found], folders / "reports")


@pytest.mark.parametrize("name", schemas.FILES)
def test_the_published_schema_is_the_one_in_use(name):
    assert (ROOT / "docs" / "schemas" / f"{name}.json").read_text() == schemas.json_schema(name), "make docs"


def test_every_committed_golden_can_be_read():
    found = [goldens.read(path) for path in (ROOT / "goldens").glob("*/*.json")]
    assert found and all(g.blessing and g.anchor and g.history[-1].when == g.blessing.when for g in found)
