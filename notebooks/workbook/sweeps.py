"""Sweeps: params/tune/<run>.yaml, the settings of the engine that `make tune` tries on a run.

A sweep reads as a params file: `run` is the run that it tunes, other keys change it for every setting, and
`variants` are the settings (name → what it changes). The run with those other keys is the setting `untuned`.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbook import exams, params, paths
from workbook.errors import BadInput
from workbook.exams import Written
from workbook.nested import KeyPath, leaves
from workbook.params import Exam, nearest

UNTUNED, COMBINED = "untuned", "combined"
"""What the settings are held against, and what is made of those that help."""
TUNED = ("engine", "replicas", "engine_args", "env")
"""The keys in which settings may differ: how the engine is run, as opposed to the work, the model and how it is judged."""
ABSENT = None
"""Stands for a key that a setting takes away."""


@dataclass(frozen=True)
class Sweep:
    """The settings to try, by name, each as the whole exam it makes; `untuned` is the first."""
    run: str
    settings: dict[str, Exam]

    @property
    def untuned(self) -> Exam:
        """What the others are held against."""
        return self.settings[UNTUNED]


def load(run: str, overrides: Written | None = None, only: str = "") -> Sweep:
    """The sweep of a run.

    Args:
        overrides: what all settings have in common, on top of what the file says.
        only: names of settings with spaces between, to take only these (and `untuned`); empty: all.

    Raises:
        BadInput: there is none, it is not the run's, a setting is no exam, changes the work or nothing, or has a name
            that is taken; or as `exams.load`.
    """
    path = _file(run)
    base = exams.resolve(run)  # first, so that a run that is none gets its own sentence
    if not path.is_file():
        raise BadInput(f"params/tune/{run}.yaml: no such sweep; expected the settings to try on '{run}' (there are sweeps of {', '.join(names()) or 'no run'})")
    source, written = exams.source_of(path), exams.read(path)
    if (stated := written.values.get("run")) != run:
        raise BadInput(f"{source}: key 'run' is {stated!r}; expected the run that it tunes, which is the file's stem, {run!r}")
    if not (variants := exams.variants_of(written, source)):
        raise BadInput(f"{source}: key 'variants' is missing; expected the settings to try, name: the keys that differ")
    for name in {UNTUNED, COMBINED} & set(variants):
        raise BadInput(f"{_where(written, name, source)}: variant '{name}' is what `make tune` itself calls "
                       f"{'the run as it is' if name == UNTUNED else 'the settings that help together'}; expected another name")
    common = Written({k: v for k, v in written.values.items() if k != "variants"}, {p: place for p, place in written.places.items() if p[0] != "variants"})
    common = overrides.over(common.over(base)) if overrides else common.over(base)
    settings = {UNTUNED: params.check(common.values, source, common.places)}
    if settings[UNTUNED].engine == "endpoint":
        raise BadInput(f"{source}: key 'engine' of run '{run}' is 'endpoint', which runs already as somebody has set it; expected offline, async or server")
    if settings[UNTUNED].open_loop:
        raise BadInput(f"{source}: key 'load' of run '{run}' is '{settings[UNTUNED].load}': requests are sent by the clock, so that all settings that keep up have the same throughput; "
                       "expected batch or closed")
    for name in _chosen(only, list(variants)):
        whole = variants[name].over(common)
        settings[name] = params.check(whole.values, f"{source}, variant {name}", whole.places)
        _only_the_engine(settings[UNTUNED], settings[name], f"{_where(written, name, source)}: variant '{name}'")
    return Sweep(run, settings)


def names() -> list[str]:
    """The runs that have a sweep."""
    return sorted(path.stem for path in (paths.params() / "tune").glob("*.yaml"))


def changes(untuned: Exam, exam: Exam) -> dict[KeyPath, Any]:
    """What a setting changes, by its path of keys: the value, or `ABSENT` where it takes the key away."""
    before, after = ({key: value for key, value in leaves(e.model_dump(mode="json", include=set(TUNED))).items()} for e in (untuned, exam))
    return {path: after.get(path, ABSENT) for path in {**before, **after} if before.get(path, ABSENT) != after.get(path, ABSENT)}


def combined(untuned: Exam, helpful: list[Exam]) -> tuple[Exam, list[int]] | None:
    """The settings that help as one: the first, and each next one that asks for nothing else where one before it
    changes the same key, or a key within it.

    Args:
        helpful: the best one first.

    Returns:
        The exam and the places in `helpful` of those that are in it; None where fewer than two go together.
    """
    taken: dict[KeyPath, Any] = {}
    whole, members = untuned, []
    for place, exam in enumerate(helpful):
        wanted = changes(untuned, exam)
        if any(_conflict(path, value, *other) for path, value in wanted.items() for other in taken.items()):
            continue
        try:
            whole = _with(untuned, taken | wanted)
        except BadInput:  # each is possible, and both are not: replicas of an offline engine
            continue
        taken |= wanted
        members.append(place)
    if len(members) < 2 or any(changes(whole, helpful[place]) == {} for place in members):
        return None
    return whole, members


def _conflict(path: KeyPath, value: Any, other: KeyPath, taken: Any) -> bool:
    """Whether two changes exclude each other: two values of one key, or one of a key and one within it."""
    common = min(len(path), len(other))
    return path[:common] == other[:common] and (len(path) != len(other) or value != taken)


def text(path: KeyPath, value: Any) -> str:
    """A change in words: `engine_args.max_num_seqs 16`, or `no env.X`."""
    return f"no {'.'.join(path)}" if value is ABSENT else f"{'.'.join(path)} {value}"


def _with(untuned: Exam, changed: dict[KeyPath, Any]) -> Exam:
    values = untuned.model_dump(mode="json")
    for path, value in changed.items():
        place = values
        for name in path[:-1]:
            place = place.setdefault(name, {})
        if value is ABSENT:
            place.pop(path[-1], None)
        else:
            place[path[-1]] = value
    return params.check(values, "settings that help together")


def _chosen(only: str, known: list[str]) -> list[str]:
    """The settings to take, in the file's order."""
    asked = only.replace(",", " ").split()
    for name in asked:
        if name not in (UNTUNED, *known):
            raise BadInput(f"ONLY: there is no setting {name!r}; expected some of {', '.join(known)}{nearest(name, known)}")
    if asked and set(asked) == {UNTUNED}:
        raise BadInput(f"ONLY names {UNTUNED!r} alone, which every setting is held against; expected some of {', '.join(known)}")
    return [name for name in known if name in asked or not asked]


def _only_the_engine(untuned: Exam, exam: Exam, who: str) -> None:
    """Raise BadInput if a setting changes more than how the engine is run, or nothing."""
    before, after = untuned.model_dump(mode="json"), exam.model_dump(mode="json")
    if other := [key for key in after if before[key] != after[key] and key not in TUNED]:
        raise BadInput(f"{who} changes {', '.join(f'key {key!r} from {before[key]!r} to {after[key]!r}' for key in other)}, so it would be other work; "
                       f"expected only {', '.join(TUNED)} to differ, and the rest beside 'variants', for all settings")
    if not changes(untuned, exam):
        raise BadInput(f"{who} changes nothing; expected a key that differs from run '{untuned.run}' as the file has it")


def _where(written: Written, name: str, source: str) -> str:
    place = written.places.get(("variants", name))
    return place.where if place else source


def _file(run: str) -> Path:
    return paths.params() / "tune" / f"{run}.yaml"
