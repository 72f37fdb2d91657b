"""How often is the verdict on speed wrong on real machines? The sessions of each golden, judged by those of its other visits.

Nothing in a golden changed between its visits but the time, the boot and the host. So each visit's sessions are held, one
after the other, against a golden made of all other visits' (fixed work included), with a second look where the first leaves
doubt and the visit has a second session. REGRESSED is then a false alarm. The same with a loss put into the samples: what is
then not REGRESSED was overlooked, or left open. What a session is held against here is less than the golden that a run is
held against, by the sessions of a visit. Seconds; no engine is started.

    python tests/bench/golden_rates.py [--losses 0 0.05 0.1] [--platforms NVIDIA]
"""
import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))
from workbook import diffs, exams, goldens, metrics, paths  # noqa: E402
from workbook.params import Gate  # noqa: E402
from workbook.statuses import IN_DOUBT, overall  # noqa: E402

STATUSES = ("PASSED", "IMPROVED", "INCONCLUSIVE", "REGRESSED")


def part(golden: goldens.Golden, chosen: list[int]) -> goldens.Golden:
    """The golden of some of its sessions."""
    return golden.model_copy(update={
        "sessions": [golden.sessions[i] for i in chosen], "controls": {name: [each[i] for i in chosen] for name, each in golden.controls.items()},
        "metrics": {name: each.model_copy(update={"sessions": [each.sessions[i] for i in chosen]}) for name, each in golden.metrics.items()}})


def slowed(golden: goldens.Golden, gates: dict[str, Gate], loss: float) -> goldens.Golden:
    """The same sessions with a fraction of their speed lost in the metrics that are judged."""
    factors = {name: 1 - loss if metrics.kind(name).direction == "higher" else 1 / (1 - loss) for name in gates}
    return golden.model_copy(update={"metrics": golden.metrics | {
        name: (each := golden.metrics[name]).model_copy(update={"sessions": [[value * factor for value in session] for session in each.sessions]})
        for name, factor in factors.items()}})


def verdicts_of(golden: goldens.Golden, gates: dict[str, Gate], loss: float) -> Iterator[str]:
    """The verdict on each session under the golden of the other visits' sessions; none where there is one visit."""
    def look(others: list[int], chosen: list[int]) -> str:
        outcomes = diffs.speed(part(golden, others), slowed(part(golden, chosen), gates, loss), gates)
        return overall([one["status"] for one in outcomes.values()])
    visits: dict[str, list[int]] = {}
    for number, session in enumerate(golden.sessions):
        visits.setdefault(session.visit, []).append(number)
    for own in visits.values():
        others = [i for i in range(len(golden.sessions)) if i not in own]
        for place, first in enumerate(own if others else ()):
            said = look(others, [first])
            if said in IN_DOUBT and len(own) > 1:
                said = look(others, [first, own[(place + 1) % len(own)]])
            yield said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", type=float, nargs="+", default=[0.0, 0.05, 0.10])
    parser.add_argument("--platforms", default="", help="only those whose name begins so")
    options = parser.parse_args()
    rows, totals = [], {loss: Counter() for loss in options.losses}
    for path in sorted(paths.goldens().glob(f"{options.platforms}*/*.json")):
        golden, gates = goldens.read(path), exams.load(path.stem).gates
        for loss in options.losses:
            counted = Counter(verdicts_of(golden, gates, loss))
            totals[loss] += counted
            rows += [{"golden": f"{path.parent.name}, {path.stem}", "loss": f"{loss:.0%}", "sessions": counted.total(), **{s: counted[s] for s in STATUSES}}] if counted else []
    rows += [{"golden": "all", "loss": f"{loss:.0%}", "sessions": t.total(), **{s: t[s] for s in STATUSES}} for loss, t in totals.items()]
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
