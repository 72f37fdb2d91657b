"""What tests/bench/golden_rates.py makes of a golden: sessions of one visit are judged by those of the others."""
import sys

import pytest
from conftest import ROOT
from test_goldens import SEQUENCES, by_repetition, record, scores
from workbook import exams, goldens, metrics
from workbook.params import Gate

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import golden_rates  # noqa: E402

GATES = {"output_tok_s": Gate(rule="interval", delta=0.05, margin=0.03)}


def golden(*visits: str) -> goldens.Golden:
    quiet = by_repetition().drop(columns=metrics.OTHERS)  # where every metric is 100, others would have all of the cores
    one = [goldens.session_of(record(machine=record()["machine"] | {"visit": visit}, finished=f"2026-01-0{day}T00:00:00+00:00"), quiet, scores(), SEQUENCES)
           for day, visit in enumerate(visits, start=1)]
    whole = one[0]
    for more in one[1:]:
        whole = goldens.merge(whole, more)
    return whole


@pytest.mark.parametrize("loss, said", [(0.0, "PASSED"), (0.2, "REGRESSED")])
def test_each_session_is_judged_by_those_of_other_visits(loss, said):
    assert list(golden_rates.verdicts_of(golden("a", "a", "b", "b"), GATES, loss)) == [said] * 4


def test_a_golden_of_one_visit_says_nothing():
    assert list(golden_rates.verdicts_of(golden("a", "a", "a"), GATES, 0.0)) == []


def test_a_part_has_its_own_samples_and_fixed_work():
    whole = golden("a", "b", "b")
    whole.controls["host_s"][2] = [9.0]
    some = golden_rates.part(whole, [0, 2])
    assert [s.visit for s in some.sessions] == ["a", "b"] and some.controls["host_s"] == [[1.0, 1.1], [9.0]]
    assert len(some.metrics["output_tok_s"].sessions) == 2 and len(whole.metrics["output_tok_s"].sessions) == 3


@pytest.mark.parametrize("path", sorted((ROOT / "goldens").glob("*/*.json")), ids=lambda path: f"{path.parent.name}, {path.stem}")
def test_no_golden_here_calls_its_own_visits_slower(path):
    """One that does has a gate below what its visits differ by, and a pipeline that is red by chance."""
    golden = goldens.read(path)
    if len({session.visit for session in golden.sessions}) == 1:
        pytest.skip("of one visit: its sessions cannot be held against another's")
    assert "REGRESSED" not in golden_rates.verdicts_of(golden, exams.load(path.stem).gates, 0.0)
