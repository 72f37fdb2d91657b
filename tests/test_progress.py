"""Bars appear where somebody watches, lines in a log, and neither in a saved page."""
import pytest
from workbook import progress


def test_silent_when_nobody_watches(monkeypatch):
    monkeypatch.setenv(progress.TERMINAL, "")
    assert progress.bar("x") is False


def test_a_bar_goes_to_the_terminal_with_its_label(monkeypatch, tmp_path):
    monkeypatch.setenv(progress.TERMINAL, str(tmp_path / "tty"))
    bar = progress.bar("repetition 1/3")(total=2, desc="what the library calls it", dynamic_ncols=True)
    bar.update(2)
    bar.refresh()
    assert "repetition 1/3" in (tmp_path / "tty").read_text()
    bar.close()


def test_a_log_has_a_line_now_and_then_and_no_bar(monkeypatch, tmp_path):
    log, clock = tmp_path / "log", [0.0]
    log.write_text("before\n")
    monkeypatch.setenv(progress.TERMINAL, "")
    monkeypatch.setenv(progress.LOG, str(log))
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress._Lines, "spoke", 0.0)
    bar = progress.bar("repetition 1/3")(total=200, dynamic_ncols=True)
    for _ in range(125):
        clock[0] += 1
        bar.update()
        bar.refresh()
    bar.close()
    lines = log.read_text().splitlines()
    assert lines[0] == "before" and len(lines) == 3, "one a minute"
    assert lines[1].startswith("  repetition 1/3: 60 of 200 requests in 0")
    assert progress._Lines.spoke == 120, "the next bar's first line comes a minute after, too"


@pytest.mark.parametrize("path", ["nowhere/log", "."])
def test_a_log_that_cannot_be_written_is_none(monkeypatch, tmp_path, path):
    monkeypatch.setenv(progress.TERMINAL, "")
    monkeypatch.setenv(progress.LOG, str(tmp_path / path))
    assert progress.bar("x") is False


def test_a_log_whose_reader_has_left_ends_no_load(monkeypatch):
    monkeypatch.setenv(progress.TERMINAL, "")
    monkeypatch.setenv(progress.LOG, "/dev/full")
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    bar = progress.bar("x")(total=2)
    bar.update()
    bar.refresh()
    bar.close()
