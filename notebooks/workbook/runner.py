"""The runner: every exam's notebooks one after the other, their pages, and the summary over all."""
import contextlib
import datetime
import os
import shutil
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

from filelock import FileLock, Timeout

from workbook import cards, exams, executor, files, goldens, models, pages, paths, platforms, runs, schemas, scraps, subjects, summary
from workbook.engines import arguments
from workbook.errors import BadInput
from workbook.exams import Written
from workbook.params import Exam
from workbook.statuses import ORDER, exit_code

REFUSED = "refused"
"""Marks the folder of a run whose parameters could not be read; holds the place of the params folder."""
SPACE_MB = 20
"""Less than that is free, and a run's results may not fit: the pages of one alone take 2 MB."""
LOCK_HELP = "expected one at a time; wait for it, or set GOLDBOOK_REPORTS to another folder"


class Reports:
    """Exclusive use of the reports folder while runs write into it (a context manager).

    Raises:
        BadInput: the folder cannot be written, or another run is using it.
    """

    def __enter__(self) -> "Reports":
        folder = paths.reports()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(folder).free / 1e6) < SPACE_MB:
                raise BadInput(f"{folder}: has {free:.1f} MB free; expected {SPACE_MB} or more, for the results of a run (GOLDBOOK_REPORTS names another folder)")
            self._owner = folder / runs.OWNER
            self._lock = FileLock(folder / ".lock")
            self._lock.acquire(timeout=0)
            runs.claim()
        except Timeout:
            who = self._owner.read_text() if self._owner.exists() else "unknown process"
            raise BadInput(f"{folder}: in use by another run ({who}); {LOCK_HELP}") from None
        except OSError as error:
            raise BadInput(f"{folder}: cannot be written ({error.strerror}); expected a writable folder, GOLDBOOK_REPORTS names another") from None
        return self

    def __exit__(self, *_) -> None:
        self._owner.unlink(missing_ok=True)
        self._lock.release()


def run_all(strict: bool = False) -> int:
    """Every run that has a params file; returns the exit code over all of them.

    All params files are read before the first engine starts. A file that is wrong makes its own run
    INVALID; the others run.
    """
    if not (exams.names() or exams.misnamed()):
        raise BadInput(f"{paths.params()}: holds no params file; expected at least one *.yaml")
    goldens.require_folder()
    with Reports():
        _set_aside_unknown()
        statuses = [_stop(name, "INVALID", f"params/{name}: not read; expected the ending .yaml") for name in exams.misnamed()]
        return _report(statuses + _run_several(exams.names()), strict)


def run(name: str, overrides: Written | None = None, strict: bool = False) -> int:
    """One run, or all variants of a file, and the summary; returns the exit code over them.

    Raises:
        BadInput: as `exams.load`, there is no folder of goldens where `GOLDBOOK_GOLDENS` says, or there is one run and this
            machine cannot take it, or its golden cannot be read.
    """
    found = exams.select(name)
    goldens.require_folder()
    if len(found) > 1:
        with Reports():
            return _report(_run_several(found, overrides), strict)
    exam = _load(found[0], overrides)
    require(exam)
    goldens.require_readable(exam)
    with Reports():
        return _report([run_one(exam)], strict)


def _load(name: str, overrides: Written | None) -> Exam:
    """A run as it is to be taken. What was overridden stands in its title: the reader of its card is another than who typed it."""
    exam = exams.load(name, overrides)
    return exam.model_copy(update={"title": f"{exam.title or exam.run}, with {overrides}"}) if overrides and overrides.values else exam


def require(exam: Exam, own_engine: bool = True) -> None:
    """What an exam needs, before anything starts.

    Args:
        own_engine: it is taken with this interpreter's vLLM.

    Raises:
        BadInput: this machine cannot take it, there is no such model or file of questions, or vLLM has no such engine argument.
    """
    platforms.require(exam)
    if own_engine:
        arguments.require(exam)
    models.resolve(exam)
    subjects.require(exam)


def run_one(exam: Exam) -> str:
    """Take one exam; returns its status. Never raises for what goes wrong in it, short of an interruption."""
    try:
        if reason := platforms.unmet(exam):
            return _stop(exam.run, "SKIPPED", reason, exam)
        say(f"\n{exam.run}: {exam.title}")
        require(exam)
        goldens.require_readable(exam)
        runs.set_aside(exam.run)
        return _take(exam, runs.start(exam.run))
    except BadInput as error:
        return _stop(exam.run, "INVALID", str(error), exam)
    except OSError as error:
        return _stop(exam.run, "INVALID", f"{error.filename or paths.run_folder(exam.run)}: {error.strerror or error}", exam)
    except Exception as error:
        traceback.print_exc()
        return _stop(exam.run, "INVALID", f"the runner failed: {type(error).__name__}: {error}", exam)


def _take(exam: Exam, folder: Path) -> str:
    began = time.monotonic()
    files.write_text(folder / "params.yaml", exams.flat(exam))
    for stage in runs.STAGES:
        try:
            problem = run_stage(exam, stage, folder)
        except KeyboardInterrupt:
            ended_early(exam, stage, folder, f"interrupted in {stage}.ipynb" + _so_far(folder, stage))
            raise
        if problem:
            schemas.write_result(folder / "result.json", schemas.stopped(exam.run, "INVALID", f"{stage}.ipynb failed: {problem}" + _so_far(folder, stage), exam, stage))
            break
    result = schemas.read_result(folder / "result.json")
    schemas.write_result(folder / "result.json", result | {"seconds": round(time.monotonic() - began, 1)})
    for stage in runs.STAGES:
        write_page(exam, stage, folder)
    say(f"  {result['status']}: {result['sentence']}")
    return result["status"]


def _so_far(folder: Path, stage: str) -> str:
    """What a notebook that did not get to its end had found, to be said behind why: of *compare* its first look."""
    with contextlib.suppress(OSError, ValueError):  # it was not begun, or is cut off itself
        if found := scraps.read(folder / f"{stage}.ipynb").get("so_far"):
            return f"; {found}"
    return ""


def run_stage(exam: Exam, stage: str, folder: Path, confirm: bool = True, reference: str = "") -> str:
    """Execute one notebook of a run and keep it, failed or not; returns the problem, empty if there is none.

    Args:
        confirm: whether compare.ipynb may take a confirming session.
        reference: file whose token sequences score.ipynb reads; empty: the run's golden; `drift.OWN`: none but its own.
    """
    target = folder / f"{stage}.ipynb"
    more = {"generate": exam.model_dump(mode="json"), "score": {"reference": reference}, "compare": {"confirm": confirm}}
    given = {"run": exam.run} | more[stage]
    done = executor.execute(paths.NOTEBOOKS / f"{stage}.ipynb", target, given, timeout_s=exam.timeout_s, label=f"{exam.run} · {stage:8}")
    if done.problem:
        pages.add_failure(target, done.problem, folder / "engine.log")
    say(f"  {stage}: {'failed after' if done.problem else 'done in'} {done.seconds:.1f} s "
        f"({done.cell_seconds:.1f} s in cells, {done.seconds - done.cell_seconds:.1f} s papermill and kernel)")
    return done.problem


def summarize() -> str:
    """Execute summary.ipynb and make `reports/index.html` of it; returns the problem, empty if there is none."""
    folder = paths.reports()
    target = folder / "summary.ipynb"
    done = executor.execute(paths.NOTEBOOKS / "summary.ipynb", target, {}, timeout_s=300, label="summary")
    if done.problem:
        pages.add_failure(target, done.problem, folder / "none.log")
        summary.write([*summary.collect(), schemas.stopped("summary", "INVALID", f"summary.ipynb failed: {done.problem}")], folder)
    pages.write(target, folder / "index.html", "Goldbook", [("summary", "")], code=False)
    return done.problem


def summary_only(strict: bool = False) -> int:
    """Rebuild the summary from the results there are; returns the exit code over them."""
    with Reports():
        _set_aside_unknown()
        return _report(summary.statuses(summary.collect()), strict)


def write_page(exam: Exam, stage: str, folder: Path) -> None:
    """Make the HTML of a run's executed notebook, if there is one, and lead to it from those of the notebooks before it."""
    source = folder / f"{stage}.ipynb"
    if source.exists():
        made = [s for s in runs.STAGES if (folder / f"{s}.ipynb").exists()]
        pages.write(source, folder / f"{stage}.html", f"{exam.run} · {stage}", [("← summary", "../../index.html"), *((s, "" if s == stage else f"{s}.html") for s in made)])
        for page in (folder / f"{earlier}.html" for earlier in made[:made.index(stage)]):
            if page.exists():
                pages.link(page, stage, f"{stage}.html")


def ended_early(exam: Exam, stage: str, folder: Path, why: str) -> None:
    """Write the result of a run that ended in a stage, and what can be read of it: its pages, and the cards of all runs until
    `make report` makes the whole page."""
    schemas.write_result(folder / "result.json", schemas.stopped(exam.run, "INVALID", why, exam, stage))
    summary.write(summary.collect(), paths.reports())
    with contextlib.suppress(Exception):  # the result is written: a page that cannot be made hides no interruption
        _pages_so_far(exam, stage, folder, why)


def _pages_so_far(exam: Exam, stage: str, folder: Path, why: str) -> None:
    say("  making the pages of what is there")
    pages.add_failure(folder / f"{stage}.ipynb", why, folder / "engine.log")
    for made in runs.STAGES:
        write_page(exam, made, folder)
    found = [r for r in summary.collect() if r["status"] not in summary.NOT_TAKEN]
    files.write_text(paths.reports() / "index.html", cards.bare_page("Goldbook", "ended early; make report makes this page whole", "".join(
        cards.run_card(r, list(runs.STAGES), summary.links(r["run"], paths.reports())) for r in sorted(found, key=lambda r: ORDER.index(r["status"])))))


def _set_aside_unknown() -> None:
    """Move what was recorded of parameters that could not be read, and are no run of that folder any more, to the history: a mistake that was
    corrected."""
    known = {*exams.names(), *exams.misnamed()}
    for folder in (paths.reports() / "runs").glob("*"):
        mark = folder / REFUSED
        if folder.name not in known and mark.exists() and mark.read_text() == str(paths.params()):
            runs.set_aside(folder.name)


def say(text: str) -> None:
    """Tell the person at the terminal."""
    print(text, file=sys.stderr, flush=True)


def _run_several(names: list[str], overrides: Written | None = None) -> list[str]:
    """Take each run, those whose parameters are wrong first; returns their statuses."""
    found, statuses = [], []
    for name in names:
        try:
            found.append(_load(name, overrides))
        except BadInput as error:
            statuses.append(_stop(name, "INVALID", str(error)))
    return statuses + [run_one(exam) for exam in found]


def _stop(run: str, status: str, sentence: str, exam: Exam | None = None) -> str:
    """Record a run that was not started or did not get to its end; what is in its folder goes to the history. Where that cannot be
    written (a full disk) the terminal has been told, and the next run may be tried; an empty file is left, of which the
    summary says that the run was begun."""
    say(f"  {run}: {status}: {sentence}")
    try:
        runs.set_aside(run)
        folder = runs.start(run)
        schemas.write_result(folder / "result.json", schemas.stopped(run, status, sentence, exam))
        if not exam:
            files.write_text(folder / REFUSED, str(paths.params()))
    except (OSError, BadInput) as error:
        say(f"  {run}: its result cannot be written: {error}")
        with contextlib.suppress(OSError):
            (paths.run_folder(run) / "params.yaml").touch()
    return status


def _report(statuses: list[str], strict: bool) -> int:
    """Write the summary, tell the terminal what is in it, and return the exit code for `statuses`."""
    problem = summarize()
    width = max(shutil.get_terminal_size((120, 24)).columns, 100) if sys.stderr.isatty() else None  # a log has no edge
    say("")
    found = summary.collect()
    skipped = Counter(r["sentence"] for r in found if r["status"] == "SKIPPED")
    taken = [r for r in found if r["status"] not in ("NOT_RUN", "SKIPPED")]
    for r in taken:
        say(f"{r['run']:{max(len(r['run']) for r in taken)}}  {r['status']:13} {schemas.brief(r)}"[:width])
    for reason, count in skipped.items():
        say(f"{count} SKIPPED: {reason}")
    if missing := sum(r["status"] == "NOT_RUN" for r in found):
        say(f"{missing} more have not been run on this machine (make list)")
    if problem:
        say(f"summary.ipynb failed: {problem}")
    code = exit_code([*statuses, *(["INVALID"] if problem else [])], strict)
    say(f"\n{paths.reports() / 'index.html'}  (exit code {code}{', of this run alone' if len(statuses) == 1 and len(taken) > 1 else ''}, at {datetime.datetime.now():%H:%M})")
    return code
