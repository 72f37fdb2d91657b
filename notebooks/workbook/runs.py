"""A run's folder under `reports/runs/`: what its notebooks leave for each other and for the report."""
import datetime
import os
from pathlib import Path
from typing import Any

import psutil

from workbook import files, paths
from workbook.errors import BadInput
from workbook.params import Exam

STAGES = ("generate", "score", "compare")
OWNER = ".owner"
"""In the reports folder while a process makes runs there: which one, and since when."""


def start(run: str) -> Path:
    """Folder for new results of a run; results that are there are moved to `reports/history/`, not overwritten.

    Raises:
        BadInput: the folder cannot be written.
    """
    folder = paths.run_folder(run)
    try:
        if any((folder / name).exists() for name in ("run.json", "result.json")):
            set_aside(run)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written ({error.strerror}); expected a writable folder, GOLDBOOK_REPORTS names another") from None
    return folder


def set_aside(run: str) -> Path | None:
    """Move a run's folder, if it holds anything, to `reports/history/<run>/<time of its last change>`; returns where it is then."""
    return keep(paths.run_folder(run), paths.reports() / "history" / run)


def keep(folder: Path, history: Path) -> Path | None:
    """Move a folder, if it holds anything, into `history`, where the time of its last change is its name; returns where it is then."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    changed = datetime.datetime.fromtimestamp(folder.stat().st_mtime, datetime.UTC)
    place = history / changed.strftime("%Y%m%dT%H%M%S.%fZ")
    place.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(place)
    summary = paths.reports() / "index.html"
    before, after = (f'href="{os.path.relpath(summary, at)}"' for at in (folder, place))
    for page in place.glob("*.html"):
        files.write_text(page, page.read_text().replace(before, after))
    return place


def write_record(folder: Path, exam: Exam, **record: Any) -> None:
    """Write `run.json`: the parameters and everything about this session that is not a row of a table."""
    files.write_json(folder / "run.json", {"params": exam.model_dump(mode="json"), "session": 1, **record})


def read_record(run: str) -> dict[str, Any]:
    """Read a run's `run.json`.

    Raises:
        BadInput: generate.ipynb has not been run for it, or its load ended early: such a run is never judged.
    """
    path = paths.run_folder(run) / "run.json"
    if not path.exists():
        raise BadInput(f"run '{run}' has no results in {path.parent}; expected generate.ipynb to have been run for it first")
    record = files.read_json(path)
    if partial := record.get("partial"):
        raise BadInput(f"run '{run}' is partial: {partial}; expected one whose load was measured to its end")
    return record


def claim() -> None:
    """Say that it is this process that makes runs in the reports folder."""
    files.write_text(paths.reports() / OWNER, f"process {os.getpid()}, started {now()}")


def under_way(run: str) -> str:
    """Which other process is making a run that was begun and has no result; empty if none is, so that it was killed."""
    owner, begun = paths.reports() / OWNER, paths.run_folder(run) / "params.yaml"
    try:
        said, since = owner.read_text(), owner.stat().st_mtime
        process = int(said.removeprefix("process ").partition(",")[0])
        return said if process != os.getpid() and psutil.pid_exists(process) and begun.stat().st_mtime >= since else ""
    except (OSError, ValueError):  # it ended meanwhile, or did not get to say it
        return ""


def now() -> str:
    """UTC time of day in ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
