"""Metrics against hand-made rows, and the rows a repetition leaves."""
import math
import time

import pandas as pd
import pytest
from workbook import load, metrics, params
from workbook.engines import Answer
from workbook.subjects import Question

EXAM = params.check({"run": "x", "n": 2, "temperature": 0.7})
BESIDE = ("kv_cache_peak_pct", "memory_peak_gb", "energy_j_per_token", "gpu_clock_mhz", "gpu_busy_pct", "client_cpu_pct", "others_cpu_pct", "front_end_cpu_pct", "engine_core_cpu_pct", "worker_cpu_pct", "startup_s", "bandwidth_roof_pct", "compute_roof_pct")


def rows(**columns) -> pd.DataFrame:
    base = {"arrival_s": [0.0, 0.0], "queued_s": [0.1, 0.2], "scheduled_s": [0.1, 0.3], "first_token_s": [0.5, 1.0], "last_token_s": [1.5, 4.0], "finished_s": [4.2, 4.2],
            "replica": [0, 1], "prompt_tokens": [10, 20], "output_tokens": [11, 31]}
    return pd.DataFrame(base | columns)


def test_definitions():
    found = metrics.of_repetition(rows())
    assert found["makespan_s"] == pytest.approx(4.2)
    assert found["output_tok_s"] == pytest.approx(42 / 4.2)
    assert found["total_tok_s"] == pytest.approx(72 / 4.2)
    assert found["requests_s"] == pytest.approx(2 / 4.2)
    assert found["ttft_p50_ms"] == pytest.approx(750)
    assert found["tpot_p50_ms"] == pytest.approx((1.0 / 10 + 3.0 / 30) / 2 * 1e3)
    assert found["e2e_p50_ms"] == pytest.approx(2750)
    assert found["request_tok_s_p50"] == pytest.approx((11 / 1.5 + 31 / 4) / 2)
    assert found["queue_p50_ms"] == pytest.approx(200)


def test_one_token_has_no_time_per_output_token():
    assert math.isnan(metrics.of_repetition(rows(output_tokens=[1, 1]))["tpot_p50_ms"])
    assert metrics.of_repetition(rows(output_tokens=[1, 31]))["tpot_p50_ms"] == pytest.approx(100)


def test_every_metric_is_described():
    assert set(metrics.of_repetition(rows())) | {"acceptance_pct", "preemptions", "prefix_hit_pct", "outside_engine_pct", "goodput_s", *BESIDE} | {f"itl_p{q}_ms" for q in metrics.PERCENTILES} == set(metrics.METRICS)


def test_what_requests_spend_outside_the_engine():
    """Two requests of 1.5 and 4 s, in the engine's hands after 0.1 and 0.45 s: 0.55 of 5.5 s. A server tells of all together."""
    timed, untimed = rows(queued_s=[0.1, 0.45]), rows(queued_s=math.nan, scheduled_s=math.nan)
    growth = {"vllm:request_success": 2, **dict(zip(metrics.SECONDS, (1.0, 3.4), strict=True))}
    assert metrics.outside_engine(timed, {}) == pytest.approx(10) == metrics.outside_engine(timed, growth)
    assert metrics.outside_engine(untimed, growth) == pytest.approx(20)
    for unknown in ({}, growth | {"vllm:request_success": 3}, growth | {"vllm:request_success": 1}, {"vllm:request_success": 2, metrics.SECONDS[0]: 1.0}):
        assert math.isnan(metrics.outside_engine(untimed, unknown)), "none, another's too, not all of them, the queue's alone"
    assert math.isnan(metrics.outside_engine(timed.assign(last_token_s=[1.5, math.nan]), growth)), "one has not ended"
    many = pd.concat([untimed] * 20)
    assert metrics.outside_engine(many, {"vllm:request_success": 39, **dict(zip(metrics.SECONDS, (19.5, 66.3), strict=True))}) == pytest.approx(20), "the last is not counted yet"
    passes = [{"session": 1, "repetition": 1, "point": point, "counters": growth} for point in (8, 32)]
    found = metrics.by_repetition(untimed.assign(session=1, repetition=1, point=8), passes)
    assert metrics.sessions(found, "outside_engine_pct@8") == [[pytest.approx(20)]] and "outside_engine_pct@32" not in found


def test_what_was_measured_beside_the_requests_is_a_metric_too():
    """A pass's own values carry its point; what is measured once a session stands once, without one."""
    both = pd.concat([rows().assign(session=1, repetition=r, point=p) for r in (1, 2) for p in (8, 32)])
    passes = [{"session": 1, "repetition": r, "point": p, "counters": {}, "measured": {"memory_peak_gb": r + p, "startup_s": 21.5} if (r, p) == (1, 8) else {"memory_peak_gb": r + p}}
              for r in (1, 2) for p in (8, 32)]
    found = metrics.by_repetition(both, passes)
    assert metrics.sessions(found, "memory_peak_gb@32") == [[33, 34]] and metrics.sessions(found, "startup_s") == [[21.5]]
    assert {name for name in found if name.startswith("startup")} == {"startup_s"}
    shown = metrics.table(found).set_index("metric")
    assert shown.loc["startup_s", "at 8"] == 21.5 and math.isnan(shown.loc["startup_s", "at 32"])
    assert list(shown.loc["memory_peak_gb", ["at 8", "at 32"]]) == [9.5, 33.5]  # medians of two repetitions


def test_a_table_without_points_has_a_column_for_each_repetition():
    both = pd.concat([rows().assign(session=1, repetition=r, point=0) for r in (1, 2)])
    passes = [{"session": 1, "repetition": 1, "point": 0, "counters": {}, "measured": {"startup_s": 21.5}}]
    shown = metrics.table(metrics.by_repetition(both, passes)).set_index("metric").loc["startup_s"]
    assert shown["1"] == 21.5 and math.isnan(shown["2"])
    unqueued = metrics.table(metrics.by_repetition(both.assign(queued_s=math.nan, scheduled_s=math.nan)))
    assert "ttft_p50_ms" in set(unqueued.metric) and not unqueued.metric.str.startswith("queue_").any(), "what was not measured has no row"


def test_the_plateau_leaves_out_ramp_and_tail():
    """100 tokens between 1 and 2 s beside 20 between 1 and 5 s: 105 a second while both run, and the middle 60 of the 120
    tokens come then; the long one's tail, which the makespan holds, is left out."""
    frame = rows(first_token_s=[1.0, 1.0], last_token_s=[2.0, 5.0], output_tokens=[100, 20])
    assert metrics.plateau(frame) == pytest.approx(105)
    assert metrics.of_repetition(frame)["output_tok_s"] == pytest.approx(120 / 4.2)
    assert math.isnan(metrics.plateau(rows(first_token_s=[float("nan"), 1.0])))


def test_replicas_wait_for_the_slowest():
    """Of 4 s the first replica is done after 1.5: it stands idle 2.5, and both on average 1.25."""
    assert metrics.of_repetition(rows())["straggler_pct"] == pytest.approx(100 * 1.25 / 4)
    assert metrics.straggler(rows(arrival_s=[1.0, 1.0])) == pytest.approx(100 * 1.25 / 3), "from the first arrival"
    assert metrics.straggler(rows(replica=[0, 0])) == 0 and "straggler_pct" not in metrics.of_repetition(rows(replica=[0, 0])), "one waits for nobody"
    assert math.isnan(metrics.straggler(rows(last_token_s=[math.nan, math.nan])))


def test_the_answer_that_ends_last():
    """Of 4 s its tokens came for three, whichever replica it was on."""
    assert metrics.last_answer(rows()) == metrics.last_answer(rows(replica=[0, 0])) == pytest.approx(75)
    assert metrics.last_answer(rows(arrival_s=[1.0, 1.0], first_token_s=[1.2, 1.3])) == pytest.approx(90), "from the first arrival"
    assert metrics.last_answer(rows(last_token_s=[1.5, math.nan])) == pytest.approx(100 / 1.5), "a request that failed ended at no time"
    assert math.isnan(metrics.last_answer(rows(last_token_s=[math.nan, math.nan])))


def test_percentiles_are_never_pooled():
    both = pd.concat([rows().assign(session=1, repetition=1, point=0), rows(last_token_s=[2.5, 5.0]).assign(session=1, repetition=2, point=0)])
    assert list(metrics.by_repetition(both).e2e_p50_ms) == pytest.approx([2750, 3750])
    assert list(metrics.table(metrics.by_repetition(both)).columns) == ["metric", "unit", "1", "2", "definition"]


def test_a_sweep_has_a_column_for_each_point():
    both = pd.concat([rows().assign(session=1, repetition=1, point=p) for p in (8, 32)])
    found = metrics.by_repetition(both)
    assert {"output_tok_s@8", "output_tok_s@32"} < set(found) and "output_tok_s" not in found
    assert metrics.headline(found) == "output_tok_s@32" and metrics.kind("output_tok_s@8").unit == "tok/s"
    assert metrics.headline(["output_tok_s", "ttft_p50_ms"]) == "output_tok_s" and metrics.headline(["ttft_p50_ms"]) == ""
    assert metrics.sessions(found, "output_tok_s@8") == [[pytest.approx(10)]] and metrics.sessions(found, "acceptance_pct") == []


def test_acceptance_comes_from_the_engines_counters():
    counted = {"vllm:spec_decode_num_draft_tokens": 40.0, "vllm:spec_decode_num_accepted_tokens": 30.0}
    found = metrics.by_repetition(rows().assign(session=1, repetition=1, point=0), [{"session": 1, "repetition": 1, "point": 0, "counters": counted}])
    assert found.acceptance_pct.tolist() == [75.0]
    assert "acceptance_pct" not in metrics.by_repetition(rows().assign(session=1, repetition=1, point=0), [{"session": 1, "repetition": 1, "point": 0, "counters": {}}])


class Echo:
    """An engine that answers at once: what is tested is which requests reach it."""

    def counters(self):
        return {"calls": 1.0}

    def kv_cache_peak(self):
        return 12.5

    def generate(self, requests, bar):
        return [Answer(r.prompt_id, r.sample, "7", [5], 1, 3, 8, "stop", 1.0, 1.0, 1.0, 1.0, replica=r.prompt_id % 2) for r in requests]


def test_a_sweep_sends_the_first_requests_of_each_size():
    batch = load.requests(EXAM, [Question(i, "q", [1], 8, None) for i in range(2)])
    done = load.measure(Echo(), EXAM.model_copy(update={"concurrency": [1, 4]}), batch, 2)
    assert [(r.number, r.point, len(r.answers)) for r in done] == [(1, 1, 1), (1, 4, 4), (2, 1, 1), (2, 4, 4)]
    assert [r.point for r in load.measure(Echo(), EXAM, batch, 1)] == [0]
    frame = load.requests_frame(done)
    assert frame.groupby(["repetition", "point"]).size().tolist() == [1, 4, 1, 4] and set(frame.replica) == {0, 1}
    passes = load.passes(done, startup_s=20.0)
    assert [(p["repetition"], p["point"]) for p in passes] == [(1, 1), (1, 4), (2, 1), (2, 4)]
    assert [p["measured"] for p in passes] == [{"kv_cache_peak_pct": 12.5, "startup_s": 20.0}, *[{"kv_cache_peak_pct": 12.5}] * 3]


def test_only_a_schedule_can_be_fallen_behind():
    """A batch takes its time to be handed over; a load that comes at a rate and is late is not the load that was asked for."""
    class Slow(Echo):
        run = staticmethod(lambda work, at_once: load.arrivals.run(work()))

        async def answer(self, request):
            time.sleep(0.05)  # holds up the loop that sends
            return self.generate([request], False)[0]
    batch = load.requests(EXAM, [Question(i, "q", [1], 8, None) for i in range(4)])
    behind = {}
    for values in ({"load": "batch"}, {"load": "poisson", "request_rate": 100.0}):
        exam = params.check({"run": "x", "engine": "async", "num_prompts": 4, "n": 2, "temperature": 0.7} | values)
        (done,) = load.measure(Slow(), exam, batch, 1)
        behind[exam.load] = done.behind
    assert behind["batch"] == "" and "the load generator fell behind its schedule by up to" in behind["poisson"]


@pytest.mark.parametrize("values, at_once", [
    ({"load": "batch", "concurrency": [2, 8]}, [2, 8]), ({"load": "closed", "concurrency": [2, 3]}, [2, 3]),
    ({"load": "burst", "concurrency": 4, "request_rate": 1000.0}, [0]), ({"load": "poisson", "request_rate": 1000.0}, [0]),
], ids=["batch", "closed", "burst", "poisson"])
def test_an_engine_is_told_how_many_requests_are_due_at_once(values, at_once):
    class Told(Echo):
        def run(self, work, at_once):
            told.append(at_once)
            return load.arrivals.run(work())

        async def answer(self, request):
            return self.generate([request], False)[0]
    told = []
    exam = params.check({"run": "x", "engine": "server", "num_prompts": 4, "n": 2, "temperature": 0.7} | values)
    load.measure(Told(), exam, load.requests(exam, [Question(i, "q", [1], 8, None) for i in range(4)]), 1)
    assert told == at_once


def repetition() -> load.Repetition:
    answers = [Answer(0, s, "7", [5, 6], 2, 3, 8, "stop", 100.1, 100.2, 100.5, 101.0) for s in (0, 1)]
    return load.Repetition(1, 0, 100.0, 101.5, answers, {})


def test_rows_count_from_the_arrival():
    frame = load.requests_frame([repetition()])
    assert frame.loc[0, ["queued_s", "scheduled_s", "first_token_s", "last_token_s", "finished_s"]].tolist() == pytest.approx([0.1, 0.2, 0.5, 1.0, 1.5])
    assert frame.loc[1, ["sample", "output_tokens", "prompt_tokens", "replica"]].tolist() == [1, 2, 3, 0]


def test_generations_hold_prompt_and_answer():
    frame = load.generations_frame(repetition(), [Question(0, "3 + 4 =", [1, 2, 3], 8, "7")])
    assert frame.loc[0, ["prompt", "gold", "answer", "finish_reason"]].tolist() == ["3 + 4 =", "7", "7", "stop"]


def test_every_sample_is_a_request_with_a_seed_of_its_own():
    batch = load.requests(EXAM, [Question(i, "q", [1], 8, None) for i in range(3)])
    assert [(r.prompt_id, r.sample) for r in batch] == [(i, s) for i in range(3) for s in (0, 1)]
    assert len({r.seed for r in batch}) == 6
    assert batch == load.requests(EXAM, [Question(i, "q", [1], 8, None) for i in range(3)])
    assert load.request_seed(params.check({"run": "x"}), 0, 0) is None
