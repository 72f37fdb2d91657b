"""How often is the verdict on speed wrong on real machines? The sessions of each golden, judged by those of its other visits.

Nothing in a golden changed between its visits but the day, the boot and the host. So each visit's sessions are held, one
after the other, against a golden made of all other visits' (fixed work included), with a second look where the first leaves
doubt and the visit has a second session. REGRESSED is then a false alarm. The same with a loss put into the samples: what is
then not REGRESSED was overlooked, or left open. Sessions of two visits are few, so a golden is judged by one or two of them
where it has three: what it does as a whole is better than this. Seconds; no engine is started.

    python tests/bench/golden_rates.py [--losses 0 0.05 0.1] [--platforms NVIDIA]
"""
import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "notebooks"))
from workbook import exams, goldens, machine, metrics, paths, results  # noqa: E402
from workbook.statuses import overall  # noqa: E402

STATUSES = ("PASSED", "IMPROVED", "INCONCLUSIVE", "REGRESSED")


def part(golden: goldens.Golden, chosen: list[int]) -> goldens.Golden:
    """The golden of some of its sessions."""
    return golden.model_copy(update={
        "sessions": [golden.sessions[i] for i in chosen], "controls": {name: [each[i] for i in chosen] for name, each in golden.controls.items()},
        "metrics": {name: each.model_copy(update={"sessions": [each.sessions[i] for i in chosen]}) for name, each in golden.metrics.items()}})


def status(golden: goldens.Golden, new: goldens.Golden, gates: dict, loss: float) -> str:
    """One look, as *compare* takes it, at sessions that lost a fraction of their speed."""
    def slower(name: str, value: float) -> float:
        return value * (1 - loss) if metrics.kind(name).direction == "higher" else value / (1 - loss)
    samples = {name: [[slower(name, value) for value in session] for session in each.sessions] if name in gates else each.sessions
               for name, each in new.metrics.items()}
    controls_of = [{name: each[i] for name, each in new.controls.items()} for i in range(len(new.sessions))]
    found = machine.judge(golden, *controls_of, samples=samples, judged=gates)
    return overall([one["status"] for one in results.judge_speed(gates, golden, {name: samples[name] for name in gates}, found).values()])


def verdicts_of(golden: goldens.Golden, gates: dict, loss: float) -> Iterator[str]:
    """The verdict on each session under the golden of the other visits' sessions."""
    visits: dict[str, list[int]] = {}
    for number, session in enumerate(golden.sessions):
        visits.setdefault(session.visit, []).append(number)
    for own in visits.values():
        others = [i for i in range(len(golden.sessions)) if i not in own]
        for place, first in enumerate(own if others else ()):
            said = status(part(golden, others), part(golden, [first]), gates, loss)
            if said in results.IN_DOUBT and len(own) > 1:
                said = status(part(golden, others), part(golden, [first, own[(place + 1) % len(own)]]), gates, loss)
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
