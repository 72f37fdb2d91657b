"""A run of many requests leaves a small page: the bench of 100,000 (`make bench`), at a size that the suite can wait for."""
import sys

from conftest import ROOT

sys.path.append(str(ROOT / "tests" / "bench"))
import report_scale  # noqa: E402


def test_the_page_of_thousands_of_requests_is_small(tmp_path):
    found = report_scale.measured(tmp_path, requests=3000, tokens=16, repetitions=2)
    assert found["page_mb"] < 1 and found["kernel_gb"] < 0.5
