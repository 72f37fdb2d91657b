"""Fixtures: folders of a test's own, and the command line run as a user runs it."""
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A shell starts what it puts into the background (`nohup make test &`) with SIGINT ignored, and Python then raises no
# KeyboardInterrupt: what interrupts a load would wait for ever. A kernel sets its own handler; this process does here.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Params, goldens and reports in folders of this test; returns their parent."""
    for name in ("params", "goldens", "reports"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"GOLDBOOK_{name.upper()}", str(tmp_path / name))
    return tmp_path


@pytest.fixture
def workbook():
    """Run `python -m workbook ...` in a process of its own."""
    def run(*words: str, timeout: float = 400, **env: str) -> subprocess.CompletedProcess:
        return finished(command(*words), environment(**env), timeout)
    return run


def finished(words: list[str], env: dict[str, str], timeout: float = 500) -> subprocess.CompletedProcess:
    """A process and what it printed. One that takes too long is ended as a user ends it: killed, it would leave its engine beside the tests that follow."""
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        try:
            said = run.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            run.terminate()
            said = run.communicate()
            pytest.fail(f"not finished after {timeout:.0f} s: {said[1]}")
    return subprocess.CompletedProcess(words, run.returncode, *said)


def page_of(folder: Path) -> tuple[str, dict]:
    """The page of an experiment's folder, which needs nothing from elsewhere, and its result."""
    text = (folder / "index.html").read_text()
    assert re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(?!data:)([^\"'> ]+)|@import", text) == []
    links = [address for address in re.findall(r'<a [^>]*href="([^"#]+)"', text) if not address.startswith("http")]
    assert all((folder / address).exists() and not address.startswith("..") for address in links), "the folder can be opened by itself"
    return text, json.loads((folder / "result.json").read_text())


def command(*words: str) -> list[str]:
    """The command line of `python -m workbook`."""
    return [sys.executable, "-m", "workbook", *words]


def environment(**extra: str) -> dict[str, str]:
    """This process's environment with the workbook importable."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "notebooks"), os.environ.get("PYTHONPATH")]))} | extra
