"""Bars appear where somebody watches, and nowhere else."""
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
