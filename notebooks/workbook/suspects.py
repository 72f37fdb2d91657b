"""Suspects: what is not as it was when the golden was recorded, and may be why a run differs from it."""
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from workbook import machine, platforms
from workbook.goldens import Golden, mean
from workbook.nested import flat

CLOCK, MOVE = "gpu_clock_mhz", 0.01
"""A GPU's clock is a suspect once it moved by more than this, and so is a control, if that is more than its own noise."""
CODE, FILES = "code that measures", 3
"""What two commits differ in is called so where it takes samples, and so many of its files are named."""
ORDER = ("weights", "model", "packages", "driver", "engine_args", "env", "attention", CODE, "machine.gpus", "machine.", "clocks.", "controls.")
"""The likelier a cause, the earlier it is named, by how the name begins; what is not here comes with the rest of the machine."""
LAST = ("machine.kernel", "commit")
UNTOLD = ("auto", "unknown")
"""What stands for an attention back end that vLLM did not name: no suspect beside one that it named."""
TOLD_ELSEWHERE = ("machine.packages", "machine.git.commit", "machine.git.changes", "machine.driver", "machine.visit")
"""What of the environment the subject has too, or what differs at every visit."""


def differences(golden: Golden, record: dict[str, Any]) -> list[dict[str, str]]:
    """What is not as it was when the golden was recorded: subject, soft environment, controls and GPU clocks, a row
    each; nothing is known of an imported one."""
    if "imported" in golden.subject:
        return []
    before, after = (flat(subject) | flat({"machine": _in_words(environment)}) for subject, environment in
                     ((golden.subject, golden.environment), (record["subject"], record["machine"])))
    if (changed := platforms.changed_code(before.get("commit"), after.get("commit"))) is not None:  # else two commits are all that is known
        then, now = before.pop("commit"), after.pop("commit")
        if changed:
            before[CODE], after[CODE] = then[:7], f"{now[:7]}; between the two {first_of([PurePosixPath(path).name for path in changed], FILES)} changed"
    for name, move in machine.control_moves(golden, record.get("controls", {})).items():
        if machine.ratio(move.by) > max(move.visible, MOVE):
            level = mean(golden.controls[name]) * 1e3
            before[f"controls.{name}"], after[f"controls.{name}"] = f"{level:.1f} ms", f"{level * (1 + move.by):.1f} ms"
    for name, (recorded, now) in _clocks(golden, record.get("repetitions", [])).items():
        if abs(now / recorded - 1) > MOVE:
            before[f"clocks.{name}"], after[f"clocks.{name}"] = f"{recorded:,.0f} MHz", f"{now:,.0f} MHz"
    return [{"what": name, "golden": str(before.get(name, "absent")), "now": str(after.get(name, "absent"))}
            for name in sorted(before | after, key=_rank) if before.get(name) != after.get(name) and not name.startswith(TOLD_ELSEWHERE)
            and not (name == "attention" and {before.get(name), after.get(name)} & set(UNTOLD))]


def _in_words(environment: dict[str, Any]) -> dict[str, Any]:
    """The machine as a person names it: which of a host's GPUs a run was given is no difference."""
    git = dict(environment.get("git") or {})
    changes = {"uncommitted changes": "some" if git.pop("dirty") else "none"} if "dirty" in git else {}
    gpus = [f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.1f} GiB" for gpu in environment.get("gpus") or ()]
    return environment | {"git": git} | changes | ({"gpus": "; ".join(gpus)} if gpus else {})


def first_of(names: Sequence[str], most: int) -> str:
    """The first names of a list, and how many more there are: `a, b and 3 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _rank(name: str) -> tuple[int, str]:
    """Where a difference comes in the list."""
    places = [place for place, start in enumerate(ORDER) if name.startswith(start)]
    return (len(ORDER) if name in LAST else min(places, default=ORDER.index("machine."))), name


def _clocks(golden: Golden, passes: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Medians of the GPUs' clock when the golden was recorded and now, MHz, by the metric's name (one at each point of a sweep)."""
    now: dict[str, list[float]] = {}
    for done in passes:
        if (clock := done.get("measured", {}).get(CLOCK)) is not None:
            now.setdefault(f"{CLOCK}@{done['point']}" if done["point"] else CLOCK, []).append(clock)
    return {name: (float(np.median(np.concatenate(golden.metrics[name].sessions))), float(np.median(found)))
            for name, found in now.items() if name in golden.metrics}
