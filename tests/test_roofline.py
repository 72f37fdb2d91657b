"""Roofs, shares of them by hand, and the diagnosis of small constructed loads."""
import datetime
import json
from math import isnan, nan

import pandas as pd
import pytest
from workbook import controls, diagnosis, metrics, params, platforms, results, roofline
from workbook.diagnosis import Evidence
from workbook.load import Repetition

GROWTH = {"vllm:estimated_read_bytes_per_gpu": 60e9, "vllm:estimated_write_bytes_per_gpu": 20e9, "vllm:estimated_flops_per_gpu": 1e12}
ROOF = roofline.Calibration(key="k", bytes_s=40e9, flop_s=1e12, others_pct=0, measured="2026-11-22T00:00:00Z")


def one(measured=None, counters=GROWTH, number=1, point=0, begin=0.0) -> Repetition:
    """A pass of 10 s."""
    return Repetition(number, point, begin, begin + 10.0, [], counters, measured=measured or {})


def exam(**values) -> params.Exam:
    return params.check({"run": "x", **values})


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A cache of its own, and rates that are handed out instead of measured; returns them, last first."""
    monkeypatch.setenv("GOLDBOOK_CACHE", str(tmp_path))
    rates = []
    monkeypatch.setattr(controls, "in_own_process", lambda module: rates.pop())
    return rates


def rates(bytes_s=40e9, flop_s=1e12, others_pct=0.0) -> dict[str, float]:
    return {"bytes_s": bytes_s, "flop_s": flop_s, "others_pct": others_pct}


def cache_file():
    (found,) = (roofline.paths.cache() / "roofline").glob("*.json")
    return found


def test_the_roofs_are_bytes_and_operations_over_the_fastest_time(monkeypatch):
    """0.1 s for anything: a copy moves twice the buffer, a product of n × n takes 2·n³ operations, and at LONG_S no
    larger one is tried."""
    tried = []

    def best(work, wait, loops):
        tried.append(work())
        return 0.1
    monkeypatch.setattr(roofline, "_best", best)
    found = roofline.measure(1 << 20, (64, 128))
    assert found["bytes_s"] == pytest.approx(2 * (1 << 20) / 0.1) and found["flop_s"] == pytest.approx(2 * 128**3 / 0.1)
    assert found["others_pct"] >= 0 and str(tried[2].dtype) == f"torch.{platforms.matrix_dtype()}"
    monkeypatch.setattr(roofline, "LONG_S", 0.05)
    assert roofline.measure(1 << 20, (64, 128))["flop_s"] == pytest.approx(2 * 64**3 / 0.1)


def test_the_fastest_sample_counts(monkeypatch):
    monkeypatch.setattr(roofline, "SAMPLE_S", 0)
    ran = []
    # The loop looks at the clock before a sample only once there are enough of them.
    times = iter([0.0, 0.0, 3.0, 10.0, 11.0, 20.0, 22.0, 30.0, 35.0, 40.0, 44.0, 99.0])
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: next(times))
    assert roofline._best(lambda: ran.append(1), lambda: None, 2) == 0.5 and len(ran) == 1 + 2 * roofline.SAMPLES


def test_this_machine_has_roofs(monkeypatch, tmp_path):
    monkeypatch.setenv("GOLDBOOK_CACHE", str(tmp_path))
    found = roofline.calibrate()
    assert found.bytes_s > 1e8 and found.flop_s > 1e8 and found.key == roofline._key()


def test_a_calibration_is_measured_once(measured):
    measured.append(rates())
    first = roofline.calibrate()
    assert roofline.calibrate() == first and not measured, "the second one would find nothing to measure"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": "other"}', '{"bytes_s": 1}'])
def test_a_broken_cache_is_measured_again(measured, text):
    measured += [rates(flop_s=2e12), rates()]
    roofline.calibrate()
    cache_file().write_text(text)
    assert roofline.calibrate().flop_s == 2e12 and json.loads(cache_file().read_text())["flop_s"] == 2e12


@pytest.mark.parametrize("change", [{"key": "another device"}, {"bytes_s": 0}, {"bytes_s": "nan"}, {"unknown": 1}])
def test_a_cache_of_something_else_is_measured_again(measured, change):
    measured += [rates(flop_s=2e12), rates(bytes_s=90e9)]
    roofline.calibrate()
    cache_file().write_text(json.dumps(json.loads(cache_file().read_text()) | change))
    assert roofline.calibrate().bytes_s == 40e9


def test_a_cache_of_another_number_format_is_measured_again(measured, monkeypatch):
    measured += [rates(flop_s=2e12), rates(flop_s=3e12)]
    monkeypatch.setattr(platforms, "matrix_dtype", lambda: "bfloat16")
    assert "3.00 bfloat16 TFLOP/s" in roofline.calibrate().sentence
    monkeypatch.setattr(platforms, "matrix_dtype", lambda: "float32")
    assert roofline.calibrate().flop_s == 2e12 and "2.00 float32 TFLOP/s" in roofline.calibrate().sentence


@pytest.mark.parametrize("age", [datetime.timedelta(days=2), datetime.timedelta(days=-2)])
def test_an_old_calibration_is_only_raised(measured, age):
    measured += [rates(bytes_s=30e9, flop_s=3e12), rates()]
    first = roofline.calibrate()
    cache_file().write_text(first.model_copy(update={"measured": first.measured - age}).model_dump_json())
    again = roofline.calibrate()
    assert (again.bytes_s, again.flop_s) == (40e9, 3e12)


def test_a_disturbed_calibration_is_not_kept(measured):
    measured += [rates(), rates(bytes_s=10e9, others_pct=60)]
    assert roofline.calibrate().bytes_s == 10e9
    assert roofline.calibrate().bytes_s == 40e9


def test_what_was_measured_in_quiet_is_not_called_disturbed(measured):
    measured += [rates(bytes_s=50e9, others_pct=45), rates(bytes_s=20e9, flop_s=5e11, others_pct=45), rates()]
    first = roofline.calibrate()
    cache_file().write_text(first.model_copy(update={"measured": first.measured - datetime.timedelta(days=2)}).model_dump_json())
    known = roofline.calibrate()
    assert (known.bytes_s, known.others_pct) == (40e9, 0) and known.measured == first.measured - datetime.timedelta(days=2)
    assert roofline.calibrate().bytes_s == 50e9, "a roof is at least what was seen"


def test_what_a_calibration_depends_on(monkeypatch):
    monkeypatch.setattr(platforms, "gpus", lambda: (platforms.Gpu(0, "Some GPU", 1),))
    monkeypatch.setattr(platforms, "driver", lambda: "570.1")
    monkeypatch.setattr(platforms, "versions", lambda: {"torch": "2.9"})
    assert roofline._key() == "Some GPU, torch 2.9, driver 570.1"


@pytest.mark.parametrize("gpus, sizes, replicas, factor", [
    (0, {}, 1, 1),                                                      # one worker is all of the CPU
    (0, {"tensor_parallel_size": 2}, 1, 2),                             # two workers share it
    (8, {"tensor_parallel_size": 2}, 1, 1),
    (8, {"data_parallel_size": 4}, 1, 1 / 4),                           # four engines added up, on four GPUs
    (8, {"data_parallel_size": 2, "tensor_parallel_size": 2}, 2, 1 / 4),
    (8, {"tensor_parallel_size": 2}, 4, 1 / 4),
    (2, {}, 4, 1 / 2)])                                                 # four servers share two GPUs
def test_shares_by_hand(monkeypatch, gpus, sizes, replicas, factor):
    """80 GB and 1 TFLOP in 10 s, of 40 GB/s and 1 TFLOP/s: 20 % and 10 % if one engine is one accelerator."""
    monkeypatch.setattr(platforms, "gpus", lambda: tuple(platforms.Gpu(i, "G", 1) for i in range(gpus)))
    engine = {"engine": "server", "replicas": replicas} if replicas > 1 else {"engine": "async"}
    found = roofline.shares(exam(engine_args=sizes, **engine), GROWTH, 10.0, ROOF)
    assert found == pytest.approx({"bandwidth_roof_pct": 20 * factor, "compute_roof_pct": 10 * factor})


def test_shares_are_metrics_of_their_pass(monkeypatch, tmp_path):
    monkeypatch.setattr(platforms, "gpus", lambda: ())
    done = [one(point=8), one(point=32)]
    assert roofline.note(exam(), done, ROOF, tmp_path / "engine.log") == ""
    passes = [{"session": 1, "repetition": 1, "point": r.point, "counters": {}, "measured": r.measured} for r in done]
    found = metrics.by_repetition(pd.concat([load([(0, 1)]).assign(point=p) for p in (8, 32)]), passes)
    assert found["bandwidth_roof_pct@8"].item() == pytest.approx(20) and found["compute_roof_pct@32"].item() == pytest.approx(10)


PART = "INFO [perf.py:1] Instantiated ComponentMetrics [{}] with (x)\n"


@pytest.mark.parametrize("parts, counters, values, why", [
    ([], GROWTH, {}, ""),
    (["mla_attn", "ffn", "unembed"], GROWTH, {}, ""),
    (["unembed"], GROWTH, {}, "vLLM cannot estimate this model's attention and feed-forward layers"),
    (["attn", "unembed"], GROWTH, {}, "vLLM cannot estimate this model's feed-forward layers"),
    ([], {}, {}, "vLLM gave no estimate of bytes and FLOPs"),
    ([], GROWTH | {roofline.FLOPS: 0.0}, {}, "vLLM gave no estimate of bytes and FLOPs"),
    ([], GROWTH, {"engine": "endpoint", "endpoint": "http://127.0.0.1:1"}, "the server may run on another machine")])
def test_why_there_are_no_shares(tmp_path, parts, counters, values, why):
    """A log that says nothing of its parts is no reason; one pass without counters is."""
    log = tmp_path / "engine.log"
    log.write_text("".join(PART.format(part) for part in parts))
    done = [one(), one(counters=counters)]
    assert roofline.note(exam(**values), done, ROOF, log) == why
    assert all(set(r.measured) == (set() if why else set(roofline.SHARES)) for r in done)


def load(times: list[tuple[float, float]], queued: float = 0.0, repetition: int = 1) -> pd.DataFrame:
    """Requests that arrive at once in the engine and end at the given times, after `queued` of it in the queue."""
    return pd.DataFrame([{"session": 1, "repetition": repetition, "point": 0, "replica": 0, "arrival_s": begin, "queued_s": begin,
                          "scheduled_s": begin + queued * (end - begin), "first_token_s": end, "last_token_s": end, "finished_s": 10.0,
                          "prompt_tokens": 1, "output_tokens": 1} for begin, end in times])


def kind(requests, busy, shares=(20.0, 10.0), preempted=0, client=20.0, **values) -> tuple[str, str]:
    done = [one(dict(zip(roofline.SHARES, shares, strict=False)) | {"client_cpu_pct": client}, {"vllm:num_preemptions": preempted})]
    return diagnosis.diagnose(diagnosis.evidence(exam(**values), requests, done, busy, ROOF, slots=8))


FULL = [(0, 10)] * 8


@pytest.mark.parametrize("expected, requests, busy, values, said", [
    ("bandwidth-bound", load(FULL), 99, {"shares": (70.0, 10.0)}, "70 % of the bandwidth roof, 10 % of the compute roof"),
    ("compute-bound", load(FULL), 99, {"shares": (65.0, 75.0)}, "75 % of the compute roof"),
    ("queue-bound", load(FULL * 2, queued=0.4), 99, {}, "for the scheduler 40 % of their time; 0 preemptions a request; 16.0 requests"),
    ("queue-bound", load(FULL), 99, {"preempted": 4}, "0.5 preemptions a request"),
    ("starved of requests", load([(0, 2), (1, 3), (5, 6)]), 90, {}, "0.5 requests under way on average, of 8 that may run at once; none 33 % of the time"),
    ("starved of requests", load([(0, 10)]), 50, {}, "1.0 requests under way on average, of 8"),
    ("starved of requests", load([(0, 6), (5, 10)]), 95, {"load": "poisson", "request_rate": 1.0, "engine": "async"}, "1.1 requests under way"),
    ("client-bound", load(FULL), 45, {"client": 97.0}, "too) used 97 % of a core; CPU 45 % busy with 8.0 requests under way"),
    ("client-bound", load(FULL * 2, queued=0.4), 45, {"client": 97.0}, "used 97 % of a core; CPU 45 % busy with 16.0 requests"),
    ("latency-bound", load(FULL), 96, {"client": 97.0}, "CPU 96 % busy"),
    ("host-bound", load(FULL), 45, {}, "CPU 45 % busy with 8.0 requests under way on average, of 8 that may run at once; 20 % of the bandwidth roof"),
    ("latency-bound", load(FULL), 96, {}, "CPU 96 % busy, yet far from both roofs"),
    ("latency-bound", load([(0, 10)]), 96, {}, "1.0 requests under way"),
    ("not known", load(FULL), 96, {"shares": ()}, "CPU 96 % busy; 8.0 requests under way on average, of 8 that may run at once; share of the"),
    ("not known", load(FULL), nan, {"client": 97.0}, "how busy the CPU was is not known"),
    ("not known", load([(0, 10)]), nan, {}, "how busy the CPU was is not known; 1.0 requests under way")])
def test_each_diagnosis(monkeypatch, expected, requests, busy, values, said):
    monkeypatch.setattr(platforms, "gpus", lambda: ())
    found, sentence = kind(requests, {"cpu_busy_pct": busy}, **values)
    assert found == expected in diagnosis.KINDS and sentence.startswith(f"{expected}: ") and said in sentence


def test_a_host_that_is_the_bound_is_named_by_its_processes(monkeypatch):
    monkeypatch.setattr(platforms, "gpus", lambda: (platforms.Gpu(0, "G", 1),))
    shares = {"client_cpu_pct": 20.0, "front_end_cpu_pct": 61.0, "engine_core_cpu_pct": 98.0}
    found = diagnosis.evidence(exam(), load(FULL), [one(shares)], {"gpu0_busy_pct": 45}, ROOF, slots=8)
    said = "of one core, the busiest engine core used 98 %, the busiest front end used 61 %, the client used 20 %"
    assert said in diagnosis.diagnose(found)[1] and found.processes == (("front_end", 61.0), ("engine_core", 98.0))
    waiting = diagnosis.evidence(exam(), load(FULL * 2, queued=0.4), [one(shares)], {"gpu0_busy_pct": 45}, ROOF, slots=8)
    assert diagnosis.diagnose(waiting)[0] == "host-bound", "the queue is behind the core"


def test_a_server_says_how_long_its_requests_waited(monkeypatch):
    """Not of each: it keeps the seconds of all of them."""
    monkeypatch.setattr(platforms, "gpus", lambda: (platforms.Gpu(0, "G", 1),))
    untimed = load(FULL * 2).assign(queued_s=nan, scheduled_s=nan)
    done = [one(dict(zip(roofline.SHARES, (20.0, 10.0), strict=True)) | {"engine_core_cpu_pct": 90.0}, dict(zip(metrics.SECONDS, (40.0, 60.0), strict=True)))]
    found = diagnosis.evidence(exam(), untimed, done, {"gpu0_busy_pct": 92.0}, ROOF, slots=8)
    assert found.queue_pct == pytest.approx(40)
    kind, sentence = diagnosis.diagnose(found)
    assert kind == "queue-bound" and "requests wait for the scheduler 40 % of their time" in sentence and "the busiest engine core used 90 %" in sentence
    assert "requests sent and not answered on average, 8 of which may run at once; GPU 92 % busy" in sentence
    assert isnan(found.outside_pct) and "not in the engine" not in sentence
    done[0].counters[metrics.ANSWERED] = len(untimed)  # of the 160 s that they took 100 are the engine's
    found = diagnosis.evidence(exam(), untimed, done, {"gpu0_busy_pct": 92.0}, ROOF, slots=8)
    assert found.outside_pct == pytest.approx(37.5) and "requests are not in the engine 38 % of their time, but with the client or the front end" in diagnosis.diagnose(found)[1]


def test_the_device_is_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(platforms, "gpus", lambda: (platforms.Gpu(0, "G", 1), platforms.Gpu(1, "G", 1)))
    found = diagnosis.evidence(exam(), load(FULL), [one()], {"cpu_busy_pct": 5.0, "gpu0_busy_pct": 90.0, "gpu1_busy_pct": 70.0}, ROOF)
    assert (found.device, found.busy_pct, found.slots) == ("GPU", 80.0, 0) and isnan(found.bandwidth_pct)
    unknown = diagnosis.evidence(exam(), load(FULL), [one({"engine_core_cpu_pct": 98.0})], {"cpu_busy_pct": 5.0}, ROOF)
    assert isnan(unknown.busy_pct), "the CPU's is not the GPU's"
    kind, sentence = diagnosis.diagnose(unknown)
    assert kind == "not known" and "how busy the GPU was is not known" in sentence and "the busiest engine core used 98 %" in sentence


@pytest.mark.parametrize("parallel, busy", [({}, 65.0), ({"data_parallel_size": 4}, 65.0), ({"tensor_parallel_size": 2}, 40.0), ({"tensor_parallel_size": 4}, 30.0)])
def test_in_tensor_parallel_the_least_busy_gpu_counts(monkeypatch, parallel, busy):
    monkeypatch.setattr(platforms, "gpus", lambda: tuple(platforms.Gpu(i, "G", 1) for i in range(4)))
    shares = {"cpu_busy_pct": 5.0, "gpu0_busy_pct": 30.0, "gpu1_busy_pct": 90.0, "gpu2_busy_pct": 90.0, "gpu3_busy_pct": 50.0}
    found = diagnosis.evidence(exam(engine="async", engine_args=parallel), load(FULL), [one()], shares, ROOF)
    assert found.busy_pct == busy
    assert ("that work as one the least busy" in diagnosis.diagnose(found)[1]) == (busy < 65)


def test_an_endpoint_says_nothing_of_its_machine():
    asked, untimed = exam(engine="endpoint", endpoint="http://127.0.0.1:1"), load(FULL).assign(queued_s=nan, scheduled_s=nan)
    found = diagnosis.evidence(asked, untimed, [one()], {"cpu_busy_pct": 95.0}, ROOF, "elsewhere")
    assert isnan(found.busy_pct) and isnan(found.queue_pct) and found.slots == 0
    assert "how busy the accelerator was is not known" in diagnosis.diagnose(found)[1] and diagnosis.diagnose(found)[1].endswith("share of the roofs not known: elsewhere")


def test_a_failed_request_has_no_time():
    requests = pd.concat([load(FULL), load([(0, nan)])])
    assert diagnosis.evidence(exam(), requests, [one()], {}, ROOF).in_flight == pytest.approx(8)
    none = diagnosis.evidence(exam(), load([(0, nan)]), [one()], {}, ROOF)
    assert (none.in_flight, none.idle_pct) == (0, 0) and diagnosis.diagnose(none)[1]


def test_more_than_the_roof_is_said():
    assert "more than all of it" in diagnosis.diagnose(Evidence(bandwidth_pct=130, compute_pct=3))[1]
    assert "while other processes took 83 % of the CPU" in diagnosis.diagnose(Evidence(bandwidth_pct=30, compute_pct=3, others_pct=83))[1]


def test_repetitions_are_averaged():
    requests = pd.concat([load(FULL), load([(0, 3), (4, 5)], repetition=2)])
    found = diagnosis.evidence(exam(), requests, [one({"bandwidth_roof_pct": 20.0}), one({"bandwidth_roof_pct": 30.0}, number=2)], {}, ROOF)
    assert (found.in_flight, found.idle_pct, found.bandwidth_pct) == pytest.approx((4.2, 100 / 15, 25))


def test_a_sweep_is_diagnosed_point_by_point_and_the_largest_is_on_the_first_screen():
    from workbook.validity import Completeness
    sweep = exam(engine="async", load="closed", concurrency=[1, 8], num_prompts=8, n=1)
    requests = pd.concat([load([(0, 10)]).assign(point=1), load(FULL).assign(point=8)])
    done = [one({"bandwidth_roof_pct": 80.0, "compute_roof_pct": 2.0}, point=8, begin=100.0),
            one({"bandwidth_roof_pct": 20.0, "compute_roof_pct": 1.0}, point=1, begin=200.0)]
    samples = pd.DataFrame({"time": [105.0, 205.0], "cpu_busy_pct": [95.0, 40.0]})
    found = diagnosis.of_run(sweep, requests, done, samples, ROOF, slots=8)
    assert [(p["point"], p["bound"], p["busy_pct"]) for p in found] == [(1, "starved of requests", 40.0), (8, "bandwidth-bound", 95.0)]
    json.dumps(found, allow_nan=False)
    complete = Completeness(**{name: 0 for name in Completeness.__dataclass_fields__} | {"problems": []})
    record = {"busy": {"cpu_busy_pct": 67.0}, "telemetry_problem": "", "bound": found, "machine": {"gpus": []}}
    answer = results.five_questions(sweep, complete, record, requests, {}, "", None, None)[1]["answer"]
    assert answer == "CPU 67 % busy; at 8, bandwidth-bound: 80 % of the bandwidth roof, 2 % of the compute roof"


@pytest.mark.parametrize("busy, bound, said", [
    ({"cpu": 100}, "latency-bound: CPU 100 % busy, yet far", "latency-bound: CPU 100 % busy, yet far"),
    ({"cpu": 100}, "host-bound: CPU 10 % busy", "CPU 100 % busy; host-bound: CPU 10 % busy"),
    ({"cpu": 35, "gpu1": 93}, "queue-bound: GPU 93 % busy", "CPU 35 % busy; queue-bound: GPU 93 % busy"),
    ({"cpu": 35, "gpu0": 93, "gpu1": 91}, "queue-bound: GPU 93 % busy", "CPU 35 % busy, GPU0 93 % busy, GPU1 91 % busy; queue-bound: GPU 93 % busy"),
    ({}, "not known: how busy the GPU was is not known", "the load was too short to sample; not known: how busy the GPU was is not known")])
def test_how_busy_it_was_is_said_once(busy, bound, said):
    from workbook.validity import Completeness
    asked = exam(engine="async", load="batch", concurrency=[8], num_prompts=8, n=1)
    complete = Completeness(**{name: 0 for name in Completeness.__dataclass_fields__} | {"problems": []})
    record = {"busy": {f"{name}_busy_pct": float(share) for name, share in busy.items()}, "telemetry_problem": "", "bound": [{"sentence": bound}], "machine": {"gpus": []}}
    assert results.five_questions(asked, complete, record, load(FULL).assign(point=8), {}, "", None, None)[1]["answer"] == said
