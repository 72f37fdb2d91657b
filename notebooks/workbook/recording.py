"""Recording: engine sessions, one after the other or of several machines, pooled into a candidate golden."""
from collections.abc import Sequence
from pathlib import Path

from workbook import candidates, drift, exams, files, goldens, paths, platforms, runner, runs, schemas, suspects
from workbook.errors import BadInput
from workbook.exams import Written
from workbook.goldens import Golden
from workbook.params import Exam


def record(name: str, overrides: Written | None = None, sessions: int = candidates.SESSIONS, add: bool = False) -> Golden:
    """Measure sessions of a run and put them into its candidate, which is written after each of them.

    Each session is a complete run in fresh kernels, of `candidates.REPETITIONS` repetitions or as many as the overrides
    say, without a confirming one; its results are kept in the history. A candidate that was there is kept in the history too.

    Args:
        add: put the sessions to those of the candidate that is there, or where there is none to those of the golden of
            this platform, as on a host that is new each time.

    Returns:
        The candidate, with the problems that speak against blessing it, if it has enough sessions to tell.

    Raises:
        BadInput: as `runner.run`; no sessions; uncommitted changes; nothing to add to, or something else; a session failed or was invalid.
    """
    if sessions < 1:
        raise BadInput(f"SESSIONS is {sessions}; expected 1 or more")
    exam = _exam(name, overrides)
    path = candidates.path_of(name)
    candidate = _extended(exam) if add else None
    _refuse_unreadable(exam)
    _refuse_changes(name)
    runner.require(exam)
    as_run = exams.load(name)  # with as many repetitions as a run has, fewer than a recording, which show less
    with runner.Reports():
        candidates.keep(path)
        if candidate:
            goldens.write(path, candidate)
        try:
            for number in range(1, sessions + 1):
                runner.say(f"\n{exam.run}: session {number} of {sessions}")
                session = _session(exam, f"{number - 1} of this recording are kept" if number > 1 else "", str(path) if candidate else "")
                if candidate and (worse := candidates.worse(session, candidate, exam)):
                    raise _unrecorded(exam, f"its answers are worse than those of the sessions that it would be added to: {'; '.join(worse)}", f"{len(candidate.sessions)} in the candidate, are kept")
                candidate = goldens.merge(candidate, session) if candidate else session
                _write(path, candidate, as_run)
        except BadInput:
            _summarize()
            raise
        _summarize()
    return candidate


def _summarize() -> None:
    """The page of all runs, which would say of the last session's folder what was in it before."""
    problem = runner.summarize()
    runner.say(f"summary.ipynb failed: {problem}" if problem else str(paths.reports() / "index.html"))


def pool(name: str, places: Sequence[str], add: bool = False) -> Golden:
    """Put the sessions of candidates that were recorded elsewhere, side by side on several machines or cards, into this one's: in the
    order of the files, and nothing is measured. How far apart they read the same answers nobody knows then, unlike of sessions
    that were added one to the other.

    Args:
        places: files of candidates, or of goldens.
        add: as in `record`; the golden is that of the files' platform.

    Returns:
        As `record`.

    Raises:
        BadInput: no file; one that cannot be read, of another run or other work, of a session that is there already, or with worse
            answers; sessions that do not belong together; nothing to add to.
    """
    exam, path, candidate = exams.load(name), candidates.path_of(name), None
    if not places:
        raise BadInput("FROM is empty; expected files of candidates")
    found = [(place, _of_run(Path(place), exam)) for place in places]
    if add:
        candidate = _unblessed(_base(exam, found[0][1].key.platform))
    for place, other in found:
        for session in other.sessions if candidate else ():
            if session in candidate.sessions:
                raise BadInput(f"{place}: its session of {session.finished} is in the candidate already; expected each once")
        if candidate and (worse := candidates.worse(other, candidate, exam)):
            raise BadInput(f"{place}: its answers are worse than those of the sessions that it would be added to: {'; '.join(worse)}; expected no loss")
        try:
            candidate = goldens.merge(candidate, other) if candidate else other
        except BadInput as error:
            raise BadInput(f"{place}: {error}") from None
    with runner.Reports():
        candidates.keep(path)
        _write(path, candidate, exam)
    return candidate


def _of_run(place: Path, exam: Exam) -> Golden:
    """A file's sessions, if they are of this run and do its work."""
    found = _unblessed(place)
    if found.run != exam.run:
        raise BadInput(f"{place}: key 'run' is {found.run!r}; expected a candidate of '{exam.run}'")
    if found.key.work != exam.work_hash():
        raise BadInput(f"{place}: it was recorded with other parameters than run '{exam.run}' has now; expected those of the params file{exams.apart(exam.work, found.work, 'there')}")
    return found


def _write(path: Path, candidate: Golden, exam: Exam) -> None:
    candidate.work = exam.work  # the key has its hash, and sessions of before do not say it
    candidate.problems = [] if candidates.shortage(candidate) else candidates.problems(candidate, exam)
    goldens.write(path, candidate)


def _exam(name: str, overrides: Written | None) -> Exam:
    """The exam as it is recorded; overrides may change what is under test, not what work is done."""
    more = Written({"repetitions": candidates.REPETITIONS}, {})
    exam = exams.load(name, overrides.over(more, keep=True) if overrides else more)
    if changed := exams.apart(exam.work, exams.load(name).work, "in the params file"):
        raise BadInput(f"SET changes the work of run '{name}', and no run without it could be held against such a golden; expected the change in the params file{changed}")
    return exam


def _refuse_unreadable(exam: Exam) -> None:
    """A session is held against the golden that is there, as a run is."""
    try:
        goldens.require_readable(exam)
    except BadInput as error:
        raise BadInput(f"{error}; a recording that is to replace it: expected it to be moved away first") from None


def _refuse_changes(name: str) -> None:
    if platforms.untracked(file := exams.file_of(name)):
        raise BadInput(f"{exams.source_of(file)}: is not in git; expected it committed, so that the golden's commit says what was measured")
    if changed := platforms.changed_files():
        raise BadInput(f"the checkout has uncommitted changes ({suspects.first_of(changed, 3)}); expected a clean one, so that the golden's commit says what was measured")


def _base(exam: Exam, platform: str) -> Path:
    """The file whose sessions others are added to: the candidate, or the golden of a platform where there is none, or one that has been
    blessed and whose golden has grown since.

    Raises:
        BadInput: there is neither, or each has sessions that the other has not, beside some of both.
    """
    path, golden = candidates.path_of(exam.run), goldens.path_of(platform, exam.run)
    if not path.exists() and not golden.exists():
        raise BadInput(f"{golden}: no golden, and no candidate, to add to; expected `make record RUN={exam.run}` without ADD=1 first")
    if not path.exists():
        return golden
    held = candidates.present(golden)[0]
    sessions = goldens.read(path).sessions
    new = [s for s in held.sessions if s not in sessions] if held else []
    if not new or len(new) == len(held.sessions):
        return path
    if all(s in held.sessions for s in sessions):
        return golden
    raise BadInput(f"{path}: cannot be added to: it lacks {len(new)} of the golden's {len(held.sessions)} sessions and has others, so that it would never be blessed; expected it moved away, and those others recorded anew with ADD=1")


def _unblessed(path: Path) -> Golden:
    return goldens.read(path).model_copy(update={"blessing": None, "anchor": None, "history": []})


def _extended(exam: Exam) -> Golden:
    """What sessions are added to, if they can be: all is compared that is known before an engine starts."""
    path = _base(exam, platforms.platform_id(exam))
    candidate = _unblessed(path)
    key = candidate.key.model_copy(update={"work": exam.work_hash(), "platform": platforms.platform_id(exam)})
    subject = {"engine_args": exam.engine_args, "env": exam.env, "packages": platforms.versions(),
               "driver": platforms.driver(), "commit": platforms.git_state()["commit"]}
    if exam.engine != "endpoint":  # which says itself what it serves, once it is asked
        subject["model"] = exam.model
    if found := goldens.unlike(candidate, key, subject):
        raise BadInput(f"{path}: cannot be added to: {'; '.join(found)}; expected the same key and subject, or a new recording without ADD=1")
    return candidate


def _session(exam: Exam, kept: str, candidate: str) -> Golden:
    """One complete run as a session of a golden. Where it is put to others it reads their sequences (of the file `candidate`),
    so that the golden knows how far readings of one model differ; else its own, whatever golden there is: another model's would
    be a measure of that model for good."""
    exam = exam.model_copy(update={"title": f"{exam.title or exam.run}, as a session of a recording"})  # whose card takes the place of the last run's
    if before := runs.set_aside(exam.run):
        runner.say(f"  the run's last result is kept in {before}")
    folder = runs.start(exam.run)
    files.write_text(folder / "params.yaml", exams.flat(exam))
    for stage in runs.STAGES:
        try:
            problem = runner.run_stage(exam, stage, folder, confirm=False, reference=candidate or drift.OWN)
        except KeyboardInterrupt:
            runner.ended_early(exam, stage, folder, f"interrupted in {stage}.ipynb, while recording")
            runner.say(f"{exam.run}: interrupted" + (f"; {_go_on(kept)}" if kept else ""))
            raise
        if problem:
            runner.ended_early(exam, stage, folder, f"{stage}.ipynb failed: {problem}, while recording")
            raise _unrecorded(exam, f"{stage}.ipynb failed: {problem}", kept)
        runner.write_page(exam, stage, folder)
    result = schemas.read_result(folder / "result.json")
    if result["status"] == "INVALID":
        raise _unrecorded(exam, result["sentence"], kept)
    return goldens.read(folder / "session.json")


def _unrecorded(exam: Exam, why: str, kept: str) -> BadInput:
    return BadInput(f"run '{exam.run}' cannot be recorded: {why}" + (f"; {_go_on(kept)}" if kept else ""))


def _go_on(kept: str) -> str:
    return f"the sessions before it, {kept}: ADD=1 goes on from there"
