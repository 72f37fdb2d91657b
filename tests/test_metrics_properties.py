"""Every metric that requests give, worked out a second time from the rows of `requests.parquet`, on generated rows."""
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workbook import metrics
from workbook.params import Slo

NAN = float("nan")
PERCENTILES = (50, 90, 95, 99)
seconds = st.floats(0, 100).map(lambda x: round(x, 4))
moments = st.floats(0.001, 20).map(lambda x: round(x, 4))
gaps = st.none() | st.just([]) | st.lists(st.floats(0, 500, width=32), max_size=5)


@st.composite
def requests(draw, streamed=False):
    """One row, short of its repetition: some of one token, some whose tokens came at once, some without times.
    Of those that are `streamed` none is so."""
    arrival, several = draw(seconds), streamed or draw(st.booleans())
    tokens = draw(st.integers(2, 300)) if several else 1
    scheduled = arrival + draw(moments)
    first = scheduled + draw(moments)
    last = first + (draw(moments) if streamed or several and draw(st.booleans()) else 0.0)
    if not streamed and draw(st.integers(0, 9)) == 9:  # an engine without times, or a request that failed
        scheduled = first = last = NAN
        tokens = draw(st.sampled_from([0, 1, 5]))
    return {"replica": draw(st.integers(0, 2)), "prompt_tokens": draw(st.integers(1, 2000)), "output_tokens": tokens, "arrival_s": arrival, "scheduled_s": scheduled,
            "first_token_s": first, "last_token_s": last, "itl_ms": draw(gaps)}


@st.composite
def frames(draw):
    """Rows of one to three sessions, repetitions and points, which need not be the same everywhere; in any order."""
    points = draw(st.sampled_from([[0], [1, 32], [8]]))
    rows = []
    for key in draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from(points)), min_size=1, max_size=5, unique=True)):
        group = draw(st.lists(requests(), min_size=1, max_size=6))
        known = [r["last_token_s"] for r in group if not math.isnan(r["last_token_s"])]
        finished = max([*known, *(r["arrival_s"] for r in group)]) + draw(moments)
        rows += [dict(zip(("session", "repetition", "point"), key, strict=True), finished_s=finished) | r for r in group]
    frame = pd.DataFrame(draw(st.permutations(rows)))
    return frame.assign(itl_ms=[None if g is None else np.asarray(g, dtype=np.float32) for g in frame.itl_ms])


def percentile(values, q):
    """With the two nearest ranks weighed (Hyndman and Fan's type 7, numpy's default); NaN of nothing and of any NaN."""
    if not values or any(math.isnan(v) for v in values):
        return NAN
    ranked, place = sorted(values), q / 100 * (len(values) - 1)
    low, high = ranked[math.floor(place)], ranked[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def came_by(rows, at):
    """Output tokens that had come by a time, each request's spread evenly from its first to its last."""
    total = 0.0
    for r in rows:
        took = max(r["last_token_s"] - r["first_token_s"], 1e-6)
        total += r["output_tokens"] * min(max((at - r["first_token_s"]) / took, 0.0), 1.0)
    return total


def middle_half(rows):
    """Output tok/s between the quarter and the three quarters of the tokens, the shortest time that holds them; the
    two ends, as far inside as `metrics.plateau` takes them, are found by bisection."""
    if any(math.isnan(r["first_token_s"]) or math.isnan(r["last_token_s"]) for r in rows):
        return NAN
    total = sum(r["output_tokens"] for r in rows)
    ends = []
    for share in (0.25 + 1e-6, 0.75 - 1e-6):  # where the tokens pause, the pause is not between the ends
        low, high = min(r["first_token_s"] for r in rows), max(r["last_token_s"] for r in rows) + 1e-6
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if came_by(rows, middle) < share * total else (low, middle)
        ends.append(high)
    return total * (0.5 - 2e-6) / (ends[1] - ends[0])


def straggler(rows):
    """Per cent of the time to the last token in which a replica has nothing left, on average of those that answered."""
    ends, begin = {}, min(r["arrival_s"] for r in rows)
    for r in rows:
        if not math.isnan(r["last_token_s"]):
            ends[r["replica"]] = max(ends.get(r["replica"], begin), r["last_token_s"])
    return 100 * sum(max(ends.values()) - end for end in ends.values()) / len(ends) / (max(ends.values()) - begin) if ends else NAN


def expected(rows, accelerators, slo):
    """Every metric of one repetition's requests by its definition in design.md, in plain Python."""
    makespan = max(r["finished_s"] for r in rows) - min(r["arrival_s"] for r in rows)
    output = sum(r["output_tokens"] for r in rows)
    e2e = [r["last_token_s"] - r["arrival_s"] for r in rows]
    tpot = [(r["last_token_s"] - r["first_token_s"]) / (r["output_tokens"] - 1) if r["output_tokens"] > 1 else None for r in rows]
    ttft = [r["first_token_s"] - r["arrival_s"] for r in rows]
    times = {"ttft": ttft, "tpot": [t for t in tpot if t is not None], "e2e": e2e, "queue": [r["scheduled_s"] - r["arrival_s"] for r in rows]}
    found = {"makespan_s": makespan, "output_tok_s": output / makespan, "output_tok_s_per_accelerator": output / makespan / accelerators,
             "total_tok_s": (sum(r["prompt_tokens"] for r in rows) + output) / makespan, "requests_s": len(rows) / makespan,
             "request_tok_s_p50": percentile([r["output_tokens"] / t for r, t in zip(rows, e2e, strict=True)], 50), "plateau_tok_s": middle_half(rows)}
    found |= {f"{name}_p{q}_ms": percentile(values, q) * 1e3 for name, values in times.items() for q in PERCENTILES}
    if itl := [float(gap) for r in rows if r["itl_ms"] is not None for gap in r["itl_ms"]]:
        found |= {f"itl_p{q}_ms": percentile(itl, q) for q in PERCENTILES}
    if len({r["replica"] for r in rows}) > 1:
        found["straggler_pct"] = straggler(rows)
    if slo.ttft_ms or slo.tpot_ms or slo.e2e_ms:
        good = 0
        for one in zip(ttft, tpot, e2e, strict=True):
            kept = [value is None or value * 1e3 <= limit for value, limit in zip(one, (slo.ttft_ms, slo.tpot_ms, slo.e2e_ms), strict=True) if limit]
            good += all(kept)
        found["goodput_s"] = good / makespan
    return found


def close(name):
    # itl_ms is kept in single precision; the ends of the plateau are those of a bisection.
    return 1e-3 if name.startswith("plateau") else 1e-5 if name.startswith("itl") else 1e-9


@settings(max_examples=60, deadline=None)
@given(frames(), st.sampled_from([1, 2, 8]), st.builds(Slo, ttft_ms=st.sampled_from([0, 5000.5]), tpot_ms=st.sampled_from([0, 100.05]), e2e_ms=st.sampled_from([0, 20000.5])))
def test_every_metric_is_its_definition(tmp_path_factory, frame, accelerators, slo):
    """Also of the rows that were written and read back."""
    path = tmp_path_factory.getbasetemp() / "requests.parquet"
    frame.to_parquet(path)
    groups = {}
    for row in frame.to_dict("records"):
        groups.setdefault((row["session"], row["repetition"], row["point"]), []).append(row)
    for rows in (frame, pd.read_parquet(path)):
        found = metrics.by_repetition(rows, accelerators=accelerators, slo=slo)
        assert set(found.index) == {key[:2] for key in groups} and len(found) == len(set(found.index))
        for (session, repetition, point), group in groups.items():
            right = expected(group, accelerators, slo)
            of_point = {name.partition("@")[0]: found.loc[(session, repetition), name] for name in found if name.partition("@")[2] == (str(point) if point else "")}
            assert set(right) <= set(of_point)
            for name, value in right.items():
                assert of_point[name] == pytest.approx(value, rel=close(name), abs=1e-9, nan_ok=True), (name, point)
            assert all(math.isnan(value) for name, value in of_point.items() if name not in right), "a metric that these requests do not give"


def metrics_of(frame):
    return metrics.of_repetition(frame, slo=Slo(e2e_ms=15000.5))


def repetitions(streamed=False):
    return st.lists(requests(streamed), min_size=1, max_size=12).map(lambda rows: pd.DataFrame(rows).assign(finished_s=200.0))


@settings(max_examples=50, deadline=None)
@given(repetitions(), st.randoms())
def test_the_order_of_rows_does_not_matter(frame, random):
    order = list(range(len(frame)))
    random.shuffle(order)
    for rows in (frame.iloc[order], frame.iloc[order].reset_index(drop=True)):
        # Not to the last bit: sums of floating point depend on their order.
        assert metrics_of(rows) == pytest.approx(metrics_of(frame), rel=1e-6, nan_ok=True)


@settings(max_examples=50, deadline=None)
@given(repetitions())
def test_percentiles_grow_and_rates_are_positive(frame):
    found = metrics_of(frame)
    for name in ("ttft", "tpot", "itl", "e2e", "queue"):
        ranks = [found[f"{name}_p{q}_ms"] for q in PERCENTILES if f"{name}_p{q}_ms" in found]
        assert all(math.isnan(r) for r in ranks) or ranks == sorted(ranks), name
    rates = {name: found[name] for name in found if metrics.kind(name).direction == "higher"}
    assert all(math.isnan(r) or r >= 0 for r in rates.values()), rates
    assert math.isnan(found["plateau_tok_s"]) == bool(frame.first_token_s.isna().any())
    assert found["goodput_s"] <= found["requests_s"] and found["output_tok_s"] < found["total_tok_s"]


@settings(max_examples=50, deadline=None)
@given(repetitions(streamed=True), st.sampled_from([0.25, 3.0, 1000.0]))
def test_times_and_rates_scale_with_the_clock(frame, factor):
    """All times c times as long: every time times c, every rate divided by it, every share the same. (Tokens that came at once are spread
    over a microsecond, whatever the clock.)"""
    times = [name for name in frame if name.endswith("_s")]
    scaled = frame.assign(**{name: frame[name] * factor for name in times}, itl_ms=[None if g is None else [x * factor for x in g] for g in frame.itl_ms])
    before, after = metrics.of_repetition(frame), metrics.of_repetition(scaled)
    for name, value in before.items():
        by = {"s": factor, "ms": factor, "%": 1.0}.get(metrics.kind(name).unit, 1 / factor)
        assert after[name] == pytest.approx(value * by, rel=1e-6, nan_ok=True), name


def test_a_pause_at_the_quarter_is_no_part_of_the_plateau():
    """Four requests one after the other, 10 tokens in 1 s each and 1 s between them: the second and the third are the
    middle half, and however the sums are rounded, the pauses before and after them are not."""
    for shift in (0.0, 0.1, 1 / 3, 1e-7, 1234.567):
        first = np.array([0.0, 2.0, 4.0, 6.0]) + shift
        frame = pd.DataFrame({"first_token_s": first, "last_token_s": first + 1.0, "output_tokens": 10})
        assert metrics.plateau(frame) == pytest.approx(20 / 3, rel=1e-5)
        assert metrics.plateau(frame.iloc[::-1]) == pytest.approx(20 / 3, rel=1e-5)
