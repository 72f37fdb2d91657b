"""Tuning: a run with every setting of its sweep, each in a fresh engine, and those that help together."""
import contextlib
from dataclasses import replace

from workbook import best, executor, files, metrics, models, pages, paths, platforms, runs, sweeps, tuning, visit
from workbook.errors import BadInput
from workbook.exams import Written
from workbook.runner import Reports, say
from workbook.statuses import exit_code
from workbook.sweeps import COMBINED, UNTUNED
from workbook.tuning import Tuning


def take(run: str, rounds: int = 1, only: str = "", overrides: Written | None = None, strict: bool = False) -> int:
    """Visit every setting of a run's sweep, then those that help together, and write the page; returns the exit code: 0,
    or 2 where there is nothing to hold against each other. A setting that fails is a row that says why.

    Args:
        rounds: visits of each setting; every other round goes backwards.
        only, overrides: as `sweeps.load`.

    Raises:
        BadInput: before any visit, as `sweeps.load`; too few rounds, or this machine cannot take the run.
    """
    if rounds < 1:
        raise BadInput(f"ROUNDS is {rounds}; expected 1 or more, the visits of each setting")
    sweep = sweeps.load(run, overrides, only)
    platforms.require(sweep.untuned)
    models.resolve(sweep.untuned)
    with Reports():
        runs.keep(paths.tune_folder(run), paths.reports() / "history" / "tune" / run)
        found = Tuning(run, runs.now(), rounds, sweep.settings, [], [])
        tuning.write_plan(found)
        say(f"\n{run}: {found.untuned.title}\n  {len(found.settings)} settings, {rounds} round{'s' if rounds > 1 else ''}: {', '.join(found.settings)}")
        try:
            visit_all(run)
            if combine(run):
                visit_all(run)
        except KeyboardInterrupt:
            write_result(run, "interrupted")  # first, since another may follow
            tuning.write_plan(replace(tuning.read(run), stopped="interrupted"))
            with contextlib.suppress(Exception):  # a page that cannot be made hides no interruption
                report(run)
            raise
        return report(run, strict)


def visit_all(run: str) -> None:
    """Make the visits that are planned and not yet made, one after the other, up to one of the untuned run that fails."""
    found = tuning.read(run)
    names = tuning.order(list(found.settings), found.rounds)
    for number, name in enumerate(names, start=1):
        folder = paths.tune_folder(run) / "visits" / name
        if folder.exists():
            continue
        say(f"\n  visit {name}: {number} of {len(names)}")
        visit.make(folder, found.settings[tuning.setting_of(name)])
        found = tuning.read(run)
        say(f"  {progress(found, name)}")
        if tuning.setting_of(name) == UNTUNED and found.problem(UNTUNED):
            return  # nothing to hold the others against


def progress(found: Tuning, name: str) -> str:
    """What the latest visit says of its setting."""
    setting = tuning.setting_of(name)
    if problem := found.problem(setting):
        return f"{setting} failed: {problem}"
    speed = f"{setting}: {found.median(setting, found.headline):,.4g} {metrics.kind(found.headline).unit} in {found.headline}"
    return speed if setting == UNTUNED or UNTUNED not in found.valid else f"{speed}, {tuning.interval(found.against(setting))} the untuned"


def combine(run: str) -> bool:
    """Plan the settings that help as one more, `combined`, if several do and go together; returns whether it is."""
    found = tuning.read(run)
    names = [name for name in found.faster if name != COMBINED]
    made = sweeps.combined(found.untuned, [found.settings[name] for name in names])
    if not made:
        return False
    whole, members = made
    found.settings[COMBINED] = whole
    found.members[:] = [names[place] for place in members]
    tuning.write_plan(found)
    say(f"\n  {COMBINED}: {' + '.join(found.members)}")
    return True


def report(run: str, strict: bool = False) -> int:
    """Execute tune.ipynb, which writes `result.json` and the best settings, and make its page; returns the exit code."""
    folder = paths.tune_folder(run)
    target = folder / "tune.ipynb"
    done = executor.execute(paths.NOTEBOOKS / "tune.ipynb", target, {"run": run}, timeout_s=300, label=f"{run} · tune")
    if done.problem:
        pages.add_failure(target, done.problem, folder / "none.log")
        write_result(run, f"tune.ipynb failed: {done.problem}")
    visits = [(v.name, f"visits/{v.name}/runs/{run}/generate.html") for v in tuning.read(run).visits]
    pages.write(target, folder / "index.html", f"{run} · tune", [("tune", ""), *(link for link in visits if (folder / link[1]).exists())])
    result = files.read_json(folder / "result.json")
    say(f"\n{run}: {result['sentence']}")
    for note in result["notes"]:
        say(f"  note: {note}")
    if (folder / best.NAME).exists():
        say(f"  the best settings: {folder / best.NAME}")
    code = exit_code([result["status"]], strict)
    say(f"{folder / 'index.html'}  (exit code {code})")
    return code


def write_result(run: str, problem: str) -> None:
    """Write the `result.json` of a tuning that did not get to its end, with what was measured."""
    found = tuning.read(run)
    result = tuning.result(found, tuning.point_table(found))
    files.write_json(paths.tune_folder(run) / "result.json", result | {"status": "INVALID", "sentence": problem, "best": None})
