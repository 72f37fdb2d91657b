"""The bar that the overhead benches share."""
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))
import pairs


def test_passes_alternate_and_a_ratio_is_ours_over_the_others(capsys):
    order = []

    def one(name, rate):
        order.append(name)
        return rate
    assert pairs.alternate(lambda: one("A", 99.0), lambda: one("B", 100.0), 4, ("ours", "theirs")) == pytest.approx([0.99] * 4)
    assert "".join(order) == "AB" + "ABBABAAB" * 2 * 4, "a warm-up of each, then every second round the other way round"
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["pair", "ours", "theirs", "ratio"] and said[4].split() == ["4", "99.0", "100.0", "0.9900"]


def test_the_interval_is_students_on_the_logarithms():
    """Of -0.02, 0.00 and 0.02 by hand: mean 0, standard error 0.02 / sqrt(3), t(0.95; 2) = 2.920."""
    half = 2.920 * 0.02 / 3**0.5
    assert pairs.interval(list(np.exp([-0.02, 0.0, 0.02]))) == pytest.approx((np.exp(-half), np.exp(half)), rel=1e-5)


@pytest.mark.parametrize("ratios, held", [([0.99, 1.0, 0.985], True), ([0.97, 0.975, 0.972], False), ([0.8, 1.2, 1.0, 1.0], False)],
                         ids=["holds", "too slow", "too uncertain"])
def test_the_last_line_says_whether_the_bar_holds(capsys, ratios, held):
    assert pairs.report({"fine": [1.0, 1.01], "judged": ratios}) == (0 if held else 1)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"bar: median ratio at least 0.98, lower end at least 0.95: {'holds' if held else 'missed by judged'}"
