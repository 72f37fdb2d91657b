"""A/B: two variants of one exam, in turns on this machine. Does B cost anything?"""
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from workbook import exams, executor, files, metrics, pages, paired, paths, runs, verdicts, visit
from workbook.errors import BadInput
from workbook.exams import Written
from workbook.paired import Experiment
from workbook.params import Exam
from workbook.runner import Reports, require, say
from workbook.statuses import exit_code

UNDER_TEST = ("model", "weights_sha256", "endpoint", "engine_args", "env")
"""The keys in which A and B may differ: what an exam puts to the test, as opposed to its work and how it is judged."""
FEWEST = 8
"""Pairs: with 3 repetitions a visit they find a loss of 3 % in 96 % of simulated trials (tests/bench/verdict_rates.py)."""
NEEDED = "import ipykernel, scrapbook; from workbook import cards, controls, engines, load, plots, subjects, telemetry, tokens, visit"
"""What a visit imports, but for the engine."""


def take(run: str, sets: dict[str, str], pythons: dict[str, str], pairs: int, overrides: Written, strict: bool = False) -> int:
    """Visit A and B in turns, judge the pairs, write the page; returns the exit code.

    Args:
        run: the exam.
        sets: of `a` and of `b`, what it changes, as `SET` is written.
        pythons: of `a` and of `b`, the interpreter of its environment; empty: this one.
        pairs: visits of each.
        overrides: what both have in common.

    Raises:
        BadInput: before any visit, as `exams.load`; A and B are not the same work, there are too few pairs, this
            machine cannot take the exam, or an interpreter does not have what a visit needs.
    """
    if pairs < FEWEST or pairs % 2:
        raise BadInput(f"PAIRS is {pairs}; expected an even number from {FEWEST} on: fewer pairs seldom show a loss of 3 %, and drift cancels only "
                       "where A comes first as often as B")
    both = variants(run, sets, overrides)
    for side, exam in both.items():
        require(exam, own_engine=not pythons[side])
    found = {side: interpreter(side, pythons[side], both[side]) for side in both}
    with Reports():
        folder = paths.ab_folder(run)
        runs.keep(folder, paths.reports() / "history" / "ab" / run)
        plan = {side: {"set": sets[side], "python": found[side], "params": both[side].model_dump(mode="json")} for side in both}
        files.write_json(folder / paired.PLAN, {"run": run, "pairs": pairs, "started": runs.now(), "variants": plan})
        say(f"\n{run}: {both['a'].title}\n  {2 * pairs} visits, A B, B A and again; A: {sets['a'] or 'as written'}; B: {sets['b'] or 'as written'}")
        if plan["a"]["params"] == plan["b"]["params"] and found["a"] == found["b"]:
            say("  A and B are the same: what will differ is what this machine's noise makes of it (B=\"engine_args.max_num_seqs=64\" would say what B changes)")
        visit_all(paired.read(run))
        return report(run, strict)


def variants(run: str, sets: dict[str, str], overrides: Written) -> dict[str, Exam]:
    """The exams of A and of B.

    Raises:
        BadInput: as `exams.load`, or they differ in more than what is under test.
    """
    both = {side: exams.load(run, exams.parse_set(sets[side], source=side.upper()).over(overrides, keep=True)) for side in ("a", "b")}
    a, b = (exam.model_dump(mode="json") for exam in both.values())
    if other := [key for key in a if a[key] != b[key] and key not in UNDER_TEST]:
        raise BadInput(f"A and B are not the same work: {'; '.join(f'key {key!r} is {a[key]!r} in A and {b[key]!r} in B' for key in other)}; "
                       f"expected only {', '.join(UNDER_TEST)} to differ, and the rest in SET, for both")
    if both["a"].open_loop and not [name for name in both["a"].gates if name.partition("@")[0] not in metrics.OF_MAKESPAN]:
        raise BadInput(f"key 'load' of run '{run}' is '{both['a'].load}' and key 'gates' has {', '.join(both['a'].gates) or 'nothing'}: requests are sent by the clock, so that A and B have "
                       "the same throughput as long as both keep up; expected a gate of what a request gets, such as SET=\"gates.e2e_p50_ms.delta=0.05\"")
    return both


def interpreter(side: str, python: str, exam: Exam) -> str:
    """The absolute path of a variant's Python interpreter, found to have what a visit needs.

    Raises:
        BadInput: there is no such program, or something cannot be imported there.
    """
    if not python:
        return sys.executable
    name = f"{side.upper()}_PYTHON is {python!r}"
    if not (found := shutil.which(Path(python).expanduser())):
        raise BadInput(f"{name}: no such program; expected the Python interpreter of an environment, such as other/bin/python")
    engine = "" if exam.engine == "endpoint" else "; import importlib.util; assert importlib.util.find_spec('vllm'), 'vllm is not installed'"
    try:
        tried = subprocess.run([found, "-c", NEEDED + engine], env=paths.child_environment(), capture_output=True, text=True, timeout=120)
        said = tried.stderr.strip().splitlines()[-1:] if tried.returncode else []
    except (OSError, subprocess.TimeoutExpired) as error:
        said = [str(error)]
    if said:
        raise BadInput(f"{name}: it cannot take an exam ({said[0]}); expected an environment with this checkout's requirements")
    # Not resolved: an environment's interpreter is a link, and is what it is by its place.
    return os.path.abspath(found)


def visit_all(experiment: Experiment) -> None:
    """Make the visits one after the other, up to the first that is not valid.

    An interruption leaves what was measured, and a result that says so.
    """
    names = paired.order(experiment.pairs)
    for name in names:
        folder = paths.ab_folder(experiment.run) / "visits" / name
        say(f"\n  visit {name}: {name[-1].upper()}, {int(name.partition('-')[0])} of {len(names)}")
        variant = experiment.variants[name[-1]]
        try:
            visit.make(folder, Exam(**variant["params"]), variant["python"])
        except KeyboardInterrupt:
            experiment = paired.read(experiment.run)
            write_result(experiment, *paired.verdict_of(experiment, {}), {})
            raise
        experiment.visits.append(paired.read_visit(folder, experiment.run, experiment.visits[0] if experiment.visits else None))
        if experiment.visits[-1].problem:
            return
        say(f"  {progress(experiment)}")


def progress(experiment: Experiment) -> str:
    """The estimate so far, of the first metric that is judged."""
    name = experiment.judged[0]
    a, b = experiment.samples(name)
    if len(a) < 2:
        return f"{name} {metrics.number(statistics.median(experiment.visits[-1].samples(name)))} (median)"
    verdict = verdicts.judge_pairs(a, b, direction=metrics.kind(name).direction, delta=paired.DELTA, margin=paired.MARGIN)
    return f"after {len(a)} of {experiment.pairs} pairs: {paired.estimate(name, verdict)}"


def report(run: str, strict: bool) -> int:
    """Execute ab.ipynb, which judges and writes `result.json`, and make its page; returns the exit code."""
    folder = paths.ab_folder(run)
    target = folder / "ab.ipynb"
    done = executor.execute(paths.NOTEBOOKS / "ab.ipynb", target, {"run": run}, timeout_s=300, label=f"{run} · ab")
    if done.problem:
        pages.add_failure(target, done.problem, folder / "none.log")
        write_result(paired.read(run), "INVALID", f"ab.ipynb failed: {done.problem}", {})
    visits = [(name, f"visits/{name}/runs/{run}/generate.html") for name in paired.order(paired.read(run).pairs)]
    pages.write(target, folder / "index.html", f"{run} · A/B", [("A/B", ""), *(link for link in visits if (folder / link[1]).exists())])
    result = files.read_json(folder / "result.json")
    code = exit_code([result["status"]], strict)
    say(f"\n{run}: {result['status']}: {result['sentence']}")
    for note in result["notes"]:
        say(f"  note: {note}")
    say(f"{folder / 'index.html'}  (exit code {code})")
    return code


def write_result(experiment: Experiment, status: str, sentence: str, judged: dict[str, dict]) -> None:
    """Write the A/B's `result.json`."""
    files.write_json(paths.ab_folder(experiment.run) / "result.json", paired.result(experiment, status, sentence, judged))
