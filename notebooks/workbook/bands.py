"""Band mode: Megatron-LM's rule on files in its formats, so that a team can bring its goldens along.

It compares one number with one number and knows no noise: what it passes may be 10 % slower, what it fails may be
noise. The rule of `verdicts` says more; this one says the same as before.

Formats, as in Megatron-LM's repository (`test_inference_regular_pipeline.py`, `compare_to_baseline.py`):

    {"throughput": [tok/s, ...], ...}                           the median of all but the first, which is a warm-up
    {"batch_8": {"throughput_tok_per_sec": ..., ...}, ...}      a sweep of batches
    {"h100": {"batch_8": {...}, ...}, ...}                      the same for each platform
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workbook import exams, files, goldens, metrics, runs
from workbook.errors import BadInput

LOW, HIGH = 0.9, 1.2
SWEEP = {"throughput_tok_per_sec": "higher", "avg_latency_ms": "lower", "p50_latency_ms": "lower", "tpot_ms_per_tok": "lower"}
"""What is judged of a sweep, and which way is better. Its p99 is that of five numbers: its own configurations leave it out."""
OURS = {"throughput": "request_tok_s_p50", "throughput_tok_per_sec": "output_tok_s", "p50_latency_ms": "e2e_p50_ms"}
"""What Megatron's numbers are called here; `throughput` lists are per-request tok/s. Its other times have other definitions."""


@dataclass(frozen=True)
class Band:
    """One number held against its golden: passed if it lies in the band."""
    name: str
    golden: float
    new: float
    passed: bool
    sentence: str


def judge(name: str, golden: float, new: float, *, direction: str = "higher", low: float = LOW, high: float = HIGH) -> Band:
    """Hold one number against another.

    A rate passes from low x golden up to, not including, high x golden: what is faster than that means that the
    golden is out of date. A time passes up to (2 - low) x golden, and may be as short as it likes.

    Args:
        golden, new: positive numbers.
        direction: "higher" or "lower", whichever is better.
        low, high: bounds, as fractions of the golden.
    """
    ratio = new / golden
    band = f"{low:g} to {high:g}" if direction == "higher" else f"at most {2 - low:g}"
    # Products, not the ratio: at the bound itself they round as Megatron's do.
    slow = new < low * golden if direction == "higher" else new > (2 - low) * golden
    fast = direction == "higher" and new >= high * golden
    what = "slower than the band allows" if slow else "faster than the band allows: the golden is out of date" if fast else "in the band"
    return Band(name, golden, new, not (slow or fast), f"{name} {new:.6g} is {ratio:.3f} × the golden {golden:.6g} ({band}): {what}")


def judge_files(golden: Path, new: Path, *, platform: str = "", low: float = LOW, high: float = HIGH) -> list[Band]:
    """Hold a file against its golden, number by number.

    What the golden has and the new file lacks has failed. (Megatron passes over a missing metric in silence.)

    Args:
        platform: whose part of a file with several platforms counts, in either file.

    Raises:
        BadInput: a file that is not of these formats, the two are not of the same, or the bounds are no band.
    """
    if not 0 < low <= 1 < high:
        raise BadInput(f"the band is {low:g} to {high:g}; expected 0 < low <= 1 < high, as fractions of the golden")
    before, after = read(golden, platform), read(new, platform)
    if ("throughput" in before) != ("throughput" in after):
        raise BadInput(f"{new}: holds {', '.join(sorted(after)[:3])}; expected what {golden} has: {', '.join(sorted(before)[:3])}")
    return [judge(name, value, after[name], direction=_direction(name), low=low, high=high) if name in after
            else Band(name, value, math.nan, False, f"{name} is missing in {new}; the golden has {value:.6g}")
            for name, value in before.items()]


def read(path: Path, platform: str = "") -> dict[str, float]:
    """The numbers of a file that are judged, by name: `throughput`, or `<metric>@<batch size>`.

    Raises:
        BadInput: the file is not of a known format, or has several platforms and none of that name.
    """
    values = files.read_json(path)
    if isinstance(values, dict) and "throughput" in values:
        return {"throughput": _median(values["throughput"], path)}
    if isinstance(values, dict) and values and not any(key.startswith("batch_") for key in values):
        values = _of_platform(values, platform, path)
    found = dict(_sweep(values, path)) if isinstance(values, dict) else {}
    if not found:
        raise BadInput(f"{path}: holds neither 'throughput' nor 'batch_<size>'; expected a golden in one of Megatron's formats")
    return found


def import_golden(path: Path, run: str, platform: str, of: str = "") -> Path:
    """Make a file in one of Megatron's formats the golden of a run on a platform; returns the golden's file.

    It holds one number a metric and nothing of prompts, environment or controls, so only gates with `rule: band` can
    be judged by it.

    Args:
        platform: as `platforms.platform_id` names it.
        of: whose part of a file with several platforms counts.

    Raises:
        BadInput: as `read` and `exams.load`; there is a golden already; or a number that the run does not gate by a band.
    """
    exam, place = exams.load(run), goldens.path_of(platform, run)
    if place.exists():
        raise BadInput(f"{place}: there is a golden already; expected none, since nothing says how the two compare")
    numbers = [(*name.partition("@"), value) for name, value in read(path, of).items()]
    found = {OURS[name] + at + size: value for name, at, size, value in numbers if name in OURS}
    banded = [name for name, gate in exam.gates.items() if gate.rule == "band"]
    if lacking := [name for name in banded if name not in found] or ([] if banded else ["none"]):
        raise BadInput(f"params/{run.partition('@')[0]}.yaml: key 'gates' has rule: band for {', '.join(lacking)}; expected it for some of {', '.join(found)}, which {path} has")
    when = runs.now()
    goldens.write(place, goldens.Golden(
        run=run, key=goldens.Key(work=exam.work_hash(), prompts="", platform=platform), work=exam.work, subject={"imported": path.name}, environment={}, controls={}, correct=None,
        sequences=[], sessions=[goldens.Session(finished=when, visit="imported", commit="unknown", dirty=False)],
        metrics={name: goldens.Samples(unit=metrics.kind(name).unit, direction=metrics.kind(name).direction, sessions=[[value]]) for name, value in found.items()},
        blessing=goldens.Blessing(by="import-golden", when=when, reason=f"imported from {path.name}")))
    return place


def _direction(name: str) -> str:
    return SWEEP.get(name.partition("@")[0], "higher")


def _median(samples: Any, path: Path) -> float:
    if not isinstance(samples, list) or len(samples) < 2:
        raise BadInput(f"{path}: key 'throughput' is {str(samples)[:40]}; expected a list of two numbers or more, the first of which is a warm-up")
    return float(np.median([_positive(value, path, f"throughput.{i}") for i, value in enumerate(samples)][1:]))


def _of_platform(values: dict[str, Any], platform: str, path: Path) -> Any:
    name = platform or (next(iter(values)) if len(values) == 1 else "")
    if name not in values:
        raise BadInput(f"{path}: holds the platforms {', '.join(sorted(values))}; expected one of them as --platform, found {platform!r}")
    return values[name]


def _sweep(values: dict[str, Any], path: Path) -> Iterator[tuple[str, float]]:
    for batch, entry in values.items():
        size = batch.removeprefix("batch_")
        if batch == size or not size.isdigit() or not isinstance(entry, dict):
            raise BadInput(f"{path}: key '{batch}' is not a batch; expected batch_<size> with a mapping of metrics")
        if not set(entry) & set(SWEEP):
            raise BadInput(f"{path}: key '{batch}' has {', '.join(entry) or 'nothing'}; expected one of {', '.join(SWEEP)}, for else nothing would be judged of it")
        for metric in SWEEP:
            if metric in entry:
                yield f"{metric}@{size}", _positive(entry[metric], path, f"{batch}.{metric}")


def _positive(value: Any, path: Path, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise BadInput(f"{path}: key '{key}' is {value!r}; expected a number above 0")
    return float(value)
