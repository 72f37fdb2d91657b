"""Tuning: a run with every setting of its sweep, each in a fresh engine, and those that help together."""
import contextlib
from dataclasses import replace
from pathlib import Path

from workbook import best, executor, files, metrics, pages, paths, platforms, runs, sweeps, tuning, visit
from workbook.engines import arguments
from workbook.errors import BadInput
from workbook.exams import Written
from workbook.runner import Reports, require, say
from workbook.statuses import exit_code
from workbook.sweeps import COMBINED, UNTUNED
from workbook.tuning import Tuning

NAMES = {"visit": "the machine's boot", "changes": "what is not committed"}


def take(run: str, rounds: int = 1, only: str = "", overrides: Written | None = None, strict: bool = False) -> int:
    """Visit every setting of a run's sweep, then those that help together, and write the page; returns the exit code: 0,
    or 2 where there is nothing to hold against each other. A setting that fails is a row that says why.

    Args:
        rounds: visits of each setting; every other round goes backwards.
        only, overrides: as `sweeps.load`.

    Raises:
        BadInput: before any visit, as `sweeps.load` and `runner.require`; too few rounds, or vLLM has no such engine argument as a setting.
    """
    if rounds < 1:
        raise BadInput(f"ROUNDS is {rounds}; expected 1 or more, the visits of each setting")
    sweep = sweeps.load(run, overrides, only)
    require(sweep.untuned)
    _require_known(sweep)
    with Reports():
        runs.keep(paths.tune_folder(run), _history(run))
        found = Tuning(run, runs.now(), rounds, sweep.settings, [], [])
        tuning.write_plan(found)
        say(f"\n{run}: {found.untuned.title}\n  {len(found.settings)} settings, {rounds} round{'s' if rounds > 1 else ''}: {', '.join(found.settings)}")
        return _to_the_end(run, strict)


def go_on(run: str, strict: bool = False) -> int:
    """Take the latest tuning of a run to its end, if something ended it before; returns the exit code as `take`. A visit that was cut
    off is made anew, and one that failed has failed.

    Raises:
        BadInput: before any visit: there is none, this machine cannot take the run, or it, its boot, the packages or the code are others
            than those of the visits that were made, so that what differs would not be the settings alone.
    """
    with Reports():
        found = tuning.read(run)
        require(found.untuned)
        if other := _other(found):
            raise BadInput(f"run '{run}' cannot be tuned on from where it stopped: {'; '.join(other)}; expected what its visits had, or make tune RUN={run} without ADD=1, which begins anew")
        made = {v.name for v in found.visits if v.problem != visit.INTERRUPTED}
        for folder in sorted((paths.tune_folder(run) / "visits").glob("*")):
            if folder.name not in made:
                runs.keep(folder, _history(run) / "cut off")
        tuning.write_plan(replace(found, stopped=""))
        say(f"\n{run}: {found.untuned.title}\n  {len(made)} of {len(tuning.order(list(found.settings), found.rounds))} visits are made")
        return _to_the_end(run, strict)


def _require_known(sweep: sweeps.Sweep) -> None:
    for name, exam in sweep.settings.items():
        try:
            arguments.require(exam)
        except BadInput as error:
            raise BadInput(f"params/tune/{sweep.run}.yaml: variant '{name}': {error}") from None


def _other(found: Tuning) -> list[str]:
    """What is not as it was in the visits that were made, a sentence each."""
    first = next((v.record["machine"] for v in found.visits if v.record), None)
    if not first:
        return []
    now = platforms.describe(found.untuned)
    was, now_is = ({key: machine.get(key) for key in ("platform", "gpus", "cpu", "visit", "driver")} | machine["packages"] | {"changes": _changes(machine["git"])}
                   for machine in (first, now))
    moved = [f"{NAMES.get(key, key)} was {was.get(key)} and is {now_is.get(key)}" for key in {**was, **now_is} if was.get(key) != now_is.get(key)]
    then, here = first["git"]["commit"], now["git"]["commit"]
    return moved + [f"the commit was {then[:7]} and is {here[:7]}"] * (then != here and not platforms.same_code(then, here))


def _changes(git: dict) -> str:
    return f"changes of hash {git.get('changes', 'unknown')}" if git["dirty"] else "nothing"


def _history(run: str) -> Path:
    return paths.reports() / "history" / "tune" / run


def _to_the_end(run: str, strict: bool) -> int:
    try:
        visit_all(run)
        if combine(run):
            visit_all(run)
    except KeyboardInterrupt:
        write_result(run, visit.INTERRUPTED)  # first, since another may follow
        tuning.write_plan(replace(tuning.read(run), stopped=visit.INTERRUPTED))
        with contextlib.suppress(Exception):  # a page that cannot be made hides no interruption
            report(run)
        raise
    return report(run, strict)


def visit_all(run: str) -> None:
    """Make the visits that are planned and not yet made, one after the other, up to one of the untuned run that fails."""
    found = tuning.read(run)
    names = tuning.order(list(found.settings), found.rounds)
    for number, name in enumerate(names, start=1):
        if any(v.problem for v in found.of(UNTUNED)):
            return  # nothing to hold the others against
        if name in {v.name for v in found.visits}:
            continue
        say(f"\n  visit {name}: {number} of {len(names)}")
        visit.make(paths.tune_folder(run) / "visits" / name, found.settings[tuning.setting_of(name)])
        found = tuning.read(run)
        say(f"  {progress(found, name)}")


def progress(found: Tuning, name: str) -> str:
    """What the latest visit says of its setting."""
    setting = tuning.setting_of(name)
    if problem := found.problem(setting):
        return f"{setting} failed: {problem}"
    speed = f"{setting}: {metrics.number(found.median(setting, found.headline))} {metrics.kind(found.headline).unit} in {found.headline}"
    return speed if setting == UNTUNED or UNTUNED not in found.valid else f"{speed}, {tuning.interval(found.against(setting))} the untuned"


def combine(run: str) -> bool:
    """Plan the settings that help as one more, `combined`, if several do and go together; returns whether it is."""
    found = tuning.read(run)
    if COMBINED in found.settings:  # planned before a cut; with one setting more its confidence would be another, and so might its members
        return False
    names = found.faster
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
        say(f"  {'what was tried, line by line' if result['best'] == UNTUNED else 'the best settings'}: {folder / best.NAME}")
    code = exit_code([result["status"]], strict)
    say(f"{folder / 'index.html'}  (exit code {code})")
    return code


def write_result(run: str, problem: str) -> None:
    """Write the `result.json` of a tuning that did not get to its end, with what was measured."""
    found = tuning.read(run)
    result = tuning.result(found, tuning.point_table(found))
    files.write_json(paths.tune_folder(run) / "result.json", result | {"status": "INVALID", "sentence": problem, "best": None})
