"""Engines behind a URL: every load against a scripted server, its faults, and what a server is started with."""
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace

import httpx
import numpy as np
import pandas as pd
import psutil
import pytest
import scripted_server

from workbook import client, embedded, load, measurement, metrics, models, params, platforms, sampling, validity
from workbook.engines import EngineDied, http, ports, server
from workbook.errors import BadInput
from workbook.subjects import Question

SCRIPT = {"ttft": 0.05, "gap": 0.01}
QUESTIONS = [Question(i, f"question {i}", [1, 2, 3], 11, None) for i in range(12)]
CLOSED = {"load": "closed", "concurrency": [3]}


def exam(url="", **values):
    return params.check({"run": "x", "engine": "endpoint", "endpoint": url, "num_prompts": 12, "max_tokens": 11, "ignore_eos": True, "repetitions": 2} | values)


def measured(url, **values):
    asked = exam(url, **values)
    questions = [replace(q, max_tokens=asked.max_tokens) for q in QUESTIONS]
    done = load.measure(http.HttpEngine(asked, [url]), asked, load.requests(asked, questions), 2)
    return asked, done, load.requests_frame(done)


@pytest.fixture(scope="module")
def scripted():
    with scripted_server.running(SCRIPT) as running:
        yield running


def test_what_is_due_at_once_finds_its_connections_open(scripted):
    async def opened():
        return [len(c.idle) for c in engine._clients]
    engine = http.HttpEngine(exam(scripted.url), [scripted.url, scripted.url])
    assert engine.run(opened, 5) == [3, 3] and engine.run(opened) == [0, 0]


@pytest.mark.parametrize("values, arrivals", [
    ({"load": "batch"}, lambda a: (a == 0).all()),
    (CLOSED, lambda a: (a[:3] < 0.14).all() and (a[3:] > 0.14).all() and (a[9:] > 0.42).all()),
    ({"load": "poisson", "request_rate": 40.0}, lambda a: np.isclose(a[-1], 12 / 40) and np.diff(a).std() > 0.005),
    ({"load": "burst", "request_rate": 40.0, "concurrency": 4}, lambda a: np.allclose(a, np.repeat([0, 0.1, 0.2], 4))),
], ids=["batch", "closed", "poisson", "burst"])
def test_every_load_reaches_the_server_and_is_timed(scripted, values, arrivals):
    """The script's own times come back, in the right unit and the right column: first token after 50 ms, then one every
    10 ms. Never sooner; how much later is the server's affair on a busy machine (a 10 ms gap took 14 ms and more beside
    two busy processes). How exact the client is, whatever the server does, is held against the server's log in test_client."""
    asked, _, frame = measured(scripted.url, **values)
    one = frame[frame.repetition == 1]
    assert len(frame) == 24 and (frame.output_tokens == 11).all() and set(frame.finish_reason) == {"length"}
    assert arrivals(np.sort(one.arrival_s.to_numpy())), one.arrival_s.tolist()
    found = metrics.of_repetition(one)
    for name, due in (("ttft_p50_ms", 50), ("tpot_p50_ms", 10), ("itl_p50_ms", 10), ("e2e_p50_ms", 150)):
        assert 0.95 * due <= found[name] <= 4 * due, name
    assert found["output_tok_s"] == pytest.approx(132 / (one.finished_s.max() - one.arrival_s.min()))
    assert np.isnan(found["queue_p50_ms"]), "a server does not say when it scheduled what"
    generations = pd.DataFrame({"answer": ["x"] * 12})
    assert validity.check(asked, frame, generations, weights="", cached=0).problems == []


def test_what_the_client_takes_of_a_core_is_its_own_work_in_the_pass(scripted):
    """Reading the counters of eight servers before a short pass is neither in the pass nor in this."""
    asked = exam(scripted.url)
    engine = http.HttpEngine(asked, [scripted.url])

    def counters():
        began = time.process_time()
        while time.process_time() - began < 0.5:
            pass
        return {}
    engine.counters = counters
    (done,) = load.measure(engine, asked, load.requests(asked, [replace(q, max_tokens=11) for q in QUESTIONS]), 1)
    assert 0 < done.measured["client_cpu_pct"] < 100 * 0.5 / (done.finished - done.arrival), done.measured


METRICS = """# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0"} 2.0
vllm:num_preemptions_total{engine="1"} 3.0
vllm:num_preemptions_created{engine="0"} 1.7e9
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} 0.5
# TYPE vllm:request_queue_time_seconds histogram
vllm:request_queue_time_seconds_bucket{engine="0",le="0.3"} 1.0
vllm:request_queue_time_seconds_bucket{engine="0",le="+Inf"} 4.0
vllm:request_queue_time_seconds_count{engine="0"} 4.0
vllm:request_queue_time_seconds_sum{engine="0"} 12.5
vllm:request_queue_time_seconds_created{engine="0"} 1.7e9
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_bucket{engine="0",le="+Inf"} 4.0
vllm:e2e_request_latency_seconds_sum{engine="0"} 99.0
"""


def test_the_counters_of_all_servers_are_summed(scripted, monkeypatch):
    engine = http.HttpEngine(exam(scripted.url), [scripted.url] * 2)
    monkeypatch.setattr(http.httpx, "get", lambda url, **_: http.httpx.Response(200, text=METRICS, request=http.httpx.Request("GET", url)))
    assert engine.counters() == {"vllm:num_preemptions": 10.0, "vllm:kv_cache_usage_perc": 1.0, "vllm:request_queue_time_seconds": 25.0}


@pytest.mark.parametrize("status, text, found", [
    (500, METRICS, {}), (200, "<!doctype html><title>It works</title>", {}),
    (200, METRICS.replace("perc{engine=\"0\"} 0.5", "perc{engine=\"0\"} NaN") + "# TYPE sglang:hits counter\nsglang:hits_total 3.0\n",
     {"vllm:num_preemptions": 5.0, "vllm:request_queue_time_seconds": 12.5})], ids=["it fails", "a page of a gateway", "what is no number, and another's"])
def test_counters_that_cannot_be_had_are_none(scripted, monkeypatch, status, text, found):
    engine = http.HttpEngine(exam(scripted.url), [scripted.url])
    monkeypatch.setattr(http.httpx, "get", lambda url, **_: http.httpx.Response(status, text=text, request=http.httpx.Request("GET", url)))
    assert engine.counters() == found


def test_without_counters_nobody_knows_of_the_prefix_cache(scripted):
    """Of a gateway that hides them, or of another engine: the first question's answer says so, and a pass alone needs none."""
    asked = exam(scripted.url)
    found = measurement.measure(http.HttpEngine(asked, [scripted.url]), asked, load.requests(asked, QUESTIONS))
    assert found.record()["prefix_cache_hits"] is None
    rows, answers = load.requests_frame(found.done), load.generations_frame(found.done[0], QUESTIONS)
    said = validity.check(asked, rows, answers, weights="", cached=None)
    assert said.problems == [] and said.unknown == "whether the prefix cache fed a pass from the one before is not known: the engine publishes no vllm:prefix_cache_hits"
    once = asked.model_copy(update={"repetitions": 1, "warmup": 0})
    assert validity.check(once, rows[rows.repetition == 1], answers, weights="", cached=None).unknown == ""


def test_growth_is_of_what_was_shown_before_and_after(scripted, monkeypatch):
    """Else all that the server ever counted would be this pass's."""
    shown = iter([{"vllm:num_preemptions": 2.0}, {"vllm:num_preemptions": 5.0, "vllm:prefix_cache_hits": 900.0}, {}, {"vllm:num_preemptions": 7.0}])
    monkeypatch.setattr(http.HttpEngine, "counters", lambda self: next(shown))
    _, done, _ = measured(scripted.url)
    assert [r.counters for r in done] == [{"vllm:num_preemptions": 3.0}, {}]


@pytest.mark.parametrize("token_ids", [True, False])
def test_the_models_own_penalties_are_not_the_exams(token_ids):
    """vLLM takes them from the model where a request leaves them out; OpenAI's API has no such fields."""
    with scripted_server.running(SCRIPT | {"refuses": [] if token_ids else ["return_token_ids", "repetition_penalty"]}) as server_:
        engine = http.HttpEngine(exam(server_.url, ignore_eos=False), [server_.url])
    assert engine._sampling == {"temperature": 0.0, "top_p": 1.0} | (http.NEUTRAL if token_ids else {})


@pytest.mark.parametrize("script, fields, token_ids", [
    ({"token_ids": False}, {}, False), ({"token_ids": False, "refuses": ["top_k", "min_p"]}, {}, False), ({"refuses": ["min_p"]}, {}, True), ({}, http.NEUTRAL, True)],
    ids=["ignores what it does not know", "and minds what it knows", "gives token ids and minds", "vLLM"])
def test_a_server_is_vllm_if_it_gives_the_ids_of_its_tokens(script, fields, token_ids):
    """And not for taking a request that asks for them."""
    with scripted_server.running(SCRIPT | script) as lenient:
        engine = http.HttpEngine(exam(lenient.url, ignore_eos=False), [lenient.url])
        assert (engine._sampling, engine._token_ids) == ({"temperature": 0.0, "top_p": 1.0} | fields, token_ids)
        _, _, frame = measured(lenient.url, ignore_eos=False)
    assert set(frame.finish_reason) == {"length"} and (frame.output_tokens == 11).all()


def test_how_many_may_run_at_once_is_what_the_exam_says_of_its_servers(scripted):
    args = {"max_num_seqs": 64, "data_parallel_size": 2}
    served = exam(scripted.url).model_copy(update={"engine": "server", "replicas": 3, "engine_args": args})
    assert http.HttpEngine(served, [scripted.url]).slots() == 384
    for unknown in (exam(scripted.url, engine_args=args), served.model_copy(update={"engine_args": {}}), served.model_copy(update={"engine_args": {"max_num_seqs": None}})):
        assert http.HttpEngine(unknown, [scripted.url]).slots() == 0


def test_an_event_of_many_tokens_may_take_as_much_longer(scripted):
    served = exam(scripted.url).model_copy(update={"engine": "server", "engine_args": {"stream_interval": 128}})
    assert (http.HttpEngine(served, [scripted.url])._stall_s, http.HttpEngine(exam(scripted.url), [scripted.url])._stall_s) == (187, 60)


def test_an_empty_answer_of_a_server_that_counts_no_end_token_is_an_answer():
    """One of twelve: a share of empty answers, which has a ceiling, and no request that failed."""
    scripts = [SCRIPT | {"token_ids": False, "refuses": ["return_token_ids"]} | ({"fault": "blank"} if i == 1 else {}) for i in range(3)]
    with scripted_server.running(scripts) as blank:
        asked = exam(blank.url, ignore_eos=False)
        questions = [replace(q, token_ids=[1 if q.prompt_id == 5 else 2, 2, 3]) for q in QUESTIONS]
        found = measurement.measure(http.HttpEngine(asked, [blank.url]), asked, load.requests(asked, questions))
    rows, answers = load.requests_frame(found.done), load.generations_frame(found.done[0], questions)
    checked = validity.check(asked, rows, answers, weights="", cached=0)
    assert checked.problems == [] and checked.arrived == 24 and checked.empty == pytest.approx(1 / 12)
    assert (rows[rows.prompt_id == 5].output_tokens == 0).all() and np.isfinite(list(metrics.of_repetition(rows[rows.repetition == 1]).values())).sum() >= 12


def test_events_of_many_tokens_have_no_time_between_tokens(scripted):
    asked = exam(scripted.url).model_copy(update={"engine": "server", "engine_args": {"stream_interval": 4}})
    (done,) = load.measure(http.HttpEngine(asked, [scripted.url]), asked, load.requests(asked, QUESTIONS), 1)
    assert not [name for name in metrics.of_repetition(load.requests_frame([done])) if name.startswith("itl")]


def test_goodput_counts_requests_within_every_limit(scripted):
    _, _, frame = measured(scripted.url, load="batch")
    one = frame[frame.repetition == 1]
    rate = metrics.of_repetition(one)["requests_s"]
    for limits, share in (({"ttft_ms": 1000.0}, 1), ({"ttft_ms": 1.0}, 0), ({"ttft_ms": 1000.0, "tpot_ms": 5.0}, 0), ({"tpot_ms": 15.0, "e2e_ms": 1000.0}, 1)):
        assert metrics.of_repetition(one, slo=params.Slo(**limits))["goodput_s"] == pytest.approx(share * rate)
    assert "goodput_s" not in metrics.of_repetition(one)


def test_requests_go_to_the_server_with_the_fewest_under_way():
    with scripted_server.running(SCRIPT) as quick, scripted_server.running({"ttft": 0.35, "gap": 0.0}) as slow:
        asked = exam(quick.url, num_prompts=30, **CLOSED | {"concurrency": [2]})
        questions = [Question(i, "q", [1], 2, None) for i in range(30)]
        done = load.measure(http.HttpEngine(asked, [quick.url, slow.url]), asked, load.requests(asked, questions), 1)
        counts = load.requests_frame(done).replica.value_counts()
        assert counts[0] > 2 * counts[1] > 0 and (quick.count() - 1, slow.count()) == (counts[0], counts[1]), "and one that asked the first what it takes"


@pytest.mark.parametrize("fault, reason", [
    ({"fault": "status", "message": "the engine is on fire"}, "error: the server answered HTTP 500: the engine is on fire"),
    ({"fault": "truncate"}, "error: the connection closed after 2 tokens, before the end of the stream"),
    ({"fault": "stall"}, "error: no byte came for 0.3 s after 2 tokens"),
    ({"fault": "few"}, None),
], ids=lambda f: f["fault"] if isinstance(f, dict) else "")
def test_a_fault_makes_the_run_invalid_and_keeps_what_came(monkeypatch, fault, reason):
    if fault["fault"] == "stall":
        monkeypatch.setattr(client, "STALL_S", 0.3)
    with scripted_server.running(SCRIPT | fault) as broken:
        asked, _, frame = measured(broken.url, **CLOSED)
    assert len(frame) == 24 and all(r.startswith("error: ") for r in frame.finish_reason)
    if reason:
        assert set(frame.finish_reason) == {reason}
    (problem, *_) = validity.check(asked, frame, pd.DataFrame({"answer": [""] * 12}), weights="", cached=0).problems
    assert problem.startswith("24 of 24 answers are missing or failed (24 × error: ")


def test_a_server_that_dies_during_the_load():
    with scripted_server.running(SCRIPT | {"gap": 0.2}) as dying:
        asked = exam(dying.url, **CLOSED)
        engine = http.HttpEngine(asked, [dying.url])
        answer = engine.answer

        async def kill_then_answer(request):
            if request.prompt_id == 5:
                dying.process.kill()
            return await answer(request)
        engine.answer = kill_then_answer
        frame = load.requests_frame(load.measure(engine, asked, load.requests(asked, QUESTIONS), 1))
    assert len(frame) == 12 and (frame.finish_reason == "length").sum() == 3
    assert any("closed" in r or "refused" in r for r in frame.finish_reason)


def test_an_endpoint_that_is_none(scripted, monkeypatch):
    monkeypatch.delenv(client.KEY_VARIABLE, raising=False)
    with pytest.raises(BadInput, match="key 'endpoint' is 'http://127.0.0.1:9': no server answers there .*expected the URL of an OpenAI-compatible server that runs"):
        http.HttpEngine(exam("http://127.0.0.1:9"), ["http://127.0.0.1:9"])
    with pytest.raises(BadInput, match="/v1/models answers HTTP 404 and no list of models; expected an OpenAI-compatible server"):
        http.HttpEngine(exam(scripted.url), [scripted.url + "/nothing"])
    with scripted_server.running(SCRIPT, api_key="right") as guarded:
        with pytest.raises(BadInput, match=r"the server refused the API key \(HTTP 401\); expected it in the environment variable OPENAI_API_KEY"):
            http.HttpEngine(exam(guarded.url), [guarded.url])
        monkeypatch.setenv(client.KEY_VARIABLE, "right")
        _, _, frame = measured(guarded.url)
        assert set(frame.finish_reason) == {"length"}


@pytest.mark.parametrize("listed, asked, chosen", [
    (["only"], "x", "only"), (["a", "b"], "b", "b"), (["a", "b"], "b@v1", "b"), ([("a", "/weights/a"), ("b", "owner/b")], "owner/b@main", "b")])
def test_of_several_models_the_exams_is_measured(monkeypatch, listed, asked, chosen):
    """By the name that the server gives it, or by what it was loaded from."""
    cards = [{"id": card} if isinstance(card, str) else {"id": card[0], "root": card[1]} for card in listed]
    monkeypatch.setattr(http.httpx, "get", lambda url, **_: httpx.Response(200, json={"data": cards}, request=httpx.Request("GET", url)))
    monkeypatch.setattr(http.HttpEngine, "_taken", lambda self, wanted: (wanted, True))
    assert http.HttpEngine(exam("http://gate", model=asked), ["http://gate"]).serves == chosen
    if len(listed) > 1:
        with pytest.raises(BadInput, match="key 'model' is 'c': http://gate serves a, b; expected one of these"):
            http.HttpEngine(exam("http://gate", model="c"), ["http://gate"])


def test_proxies_of_the_environment_are_not_asked(scripted, monkeypatch):
    """The load goes to the server itself, and so does what is asked before and beside it."""
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    _, _, frame = measured(scripted.url)
    assert set(frame.finish_reason) == {"length"} and server._is_ready(scripted.url)
    assert sampling.kv_cache_pct([scripted.url]) is None and sampling.DIRECT.open(f"{scripted.url}/health", timeout=5).status == 200


def test_a_strict_server_is_asked_for_what_it_knows():
    """Without the ids of the tokens, their number is the usage's."""
    with scripted_server.running(SCRIPT | {"refuses": ["return_token_ids", "top_k"], "tokens": 2}) as strict:
        _, _, frame = measured(strict.url, max_tokens=12)
    assert set(frame.finish_reason) == {"length"} and (frame.output_tokens == 12).all()
    assert (frame.itl_ms.str.len() == 5).all(), "six chunks of two tokens"


@pytest.mark.parametrize("refuses, values, said", [
    (["ignore_eos"], {}, "key 'ignore_eos' is true: the server answered HTTP 400: Unrecognized request argument supplied: ignore_eos; "
                         "expected an endpoint that takes the field 'ignore_eos', as vLLM does"),
    (["top_k"], {"temperature": 1.0, "top_k": 50}, "key 'top_k' is 50: the server answered HTTP 400: Unrecognized request argument supplied: top_k; "
                                                   "expected an endpoint that takes the field 'top_k', as vLLM does"),
    (["prompt"], {}, "key 'endpoint' is '{url}': the server answered HTTP 400: Unrecognized request argument supplied: prompt; "
                     "expected a server that completes a prompt of token ids"),
])
def test_a_field_that_is_needed_and_refused(refuses, values, said):
    with scripted_server.running(SCRIPT | {"refuses": refuses}) as strict, pytest.raises(BadInput) as refused:
        http.HttpEngine(exam(strict.url, **values), [strict.url])
    assert str(refused.value) == said.replace("{url}", strict.url)


def test_a_key_that_only_the_completions_refuse():
    with scripted_server.running({"fault": "unauthorized"}) as guarded, pytest.raises(BadInput, match=r"the server refused the API key \(HTTP 401"):
        http.HttpEngine(exam(guarded.url), [guarded.url])


# -- servers of our own -------------------------------------------------------------------------


def test_engine_arguments_become_words_of_the_command_line():
    assert server.arguments({"max_model_len": 64, "enforce_eager": True, "enable_prefix_caching": False, "disable_log_stats": False,
                             "speculative_config": {"method": "ngram"}, "served_model_name": ["a", "b"], "seed": 0, "lora_target_modules": None}) == [
        "--max-model-len", "64", "--enforce-eager", "--no-enable-prefix-caching", "--speculative-config", '{"method": "ngram"}',
        "--served-model-name", "a", "b", "--seed", "0"]


def test_replicas_are_placed_on_gpus_of_their_own_where_there_are_enough(monkeypatch):
    asked = params.check({"run": "x", "engine": "server", "replicas": 2, "engine_args": {"tensor_parallel_size": 2}})
    monkeypatch.setattr(platforms, "gpus", lambda: tuple(platforms.Gpu(i, "G", 1) for i in range(4)))
    assert [server.placement(asked, i)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["0,1", "2,3"] and platforms.accelerators_used(asked) == 4
    monkeypatch.setattr(platforms, "gpus", lambda: tuple(platforms.Gpu(i, "G", 1) for i in (5, 6)))
    assert [server.placement(asked, i)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["5,6", "5,6"] and platforms.accelerators_used(asked) == 2
    four = asked.model_copy(update={"replicas": 4, "engine_args": {}})
    assert [server.placement(four, i)["CUDA_VISIBLE_DEVICES"] for i in range(4)] == ["5", "6", "5", "6"] and platforms.accelerators_used(four) == 2
    one = params.check(four.model_dump() | {"requires": {"device": "gpu", "gpus": 1}})
    assert [server.placement(one, i)["CUDA_VISIBLE_DEVICES"] for i in range(4)] == ["5"] * 4, "an exam for one GPU is not spread over a host's two"
    assert platforms.platform_id(one) == "G x1" and [g.index for g in platforms.used_gpus(one)] == [5]
    monkeypatch.setattr(platforms, "gpus", lambda: ())
    monkeypatch.setattr(platforms, "cores", lambda: [0, 1, 2, 3])
    assert [server.placement(asked, i)["VLLM_CPU_OMP_THREADS_BIND"] for i in (0, 1)] == ["0|1", "2|3"]


def test_a_server_that_does_not_stop_says_where_it_hangs_and_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "STOP_S", 0.3)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)\ndef waits_for_ever():\n  time.sleep(60)\nwaits_for_ever()"
    log = tmp_path / "engine.log"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-c", stubborn], env=os.environ | server.FAULTS, stdout=subprocess.PIPE, stderr=out, preexec_fn=server._prepare)
    assert process.stdout.readline() == b"up\n"
    engine = object.__new__(server.ServerEngine)
    engine._processes, engine._tree, engine._ports = [process], [], []
    engine._stop()
    assert not psutil.pid_exists(process.pid)
    assert "Aborted" in log.read_text() and "in waits_for_ever" in log.read_text()


def test_a_server_that_does_not_start_says_why(tmp_path):
    """The real server, with an argument that it does not know; nothing of it is left."""
    asked = params.check({"run": "x", "engine": "server", "engine_args": {"max_modle_len": 64}, "timeout_s": 120})
    with pytest.raises(EngineDied, match="the server did not start: error: unrecognized arguments: --max-modle-len"):
        server.ServerEngine(asked, embedded.prepare(), tmp_path / "engine.log")
    assert not [p for p in psutil.Process().children(recursive=True) if "api_server" in " ".join(p.cmdline())]


def test_a_port_that_another_has_taken(tmp_path, monkeypatch):
    """Whoever answers there is not taken for the server that was started."""
    with scripted_server.running() as other:
        monkeypatch.setattr(ports, "take", lambda count: [ports.Block(int(other.url.rpartition(":")[2]), 0, socket.socket())])
        asked = params.check({"run": "x", "engine": "server", "timeout_s": 200})
        with pytest.raises(EngineDied, match=r"the server did not start: OSError: \[Errno 98\] Address already in use"):
            server.ServerEngine(asked, embedded.prepare(), tmp_path / "engine.log")


def test_each_server_has_ports_of_its_own(tmp_path, monkeypatch):
    """What vLLM is given, and that it looks there: data parallel engines would all look at the same port at once, and are given none."""
    monkeypatch.delenv("VLLM_PORT", raising=False)
    started, asked = [], params.check({"run": "x", "engine": "server", "replicas": 2})
    monkeypatch.setattr(server.subprocess, "Popen", lambda words, env, **_: started.append((words, env)))
    engine = object.__new__(server.ServerEngine)
    engine._log, engine._processes, blocks = tmp_path / "engine.log", [], ports.take(2)
    urls = [engine._launch(asked, tmp_path, i, block) for i, block in enumerate(blocks)]
    assert [words[words.index("--port") + 1] for words, _ in started] == [str(b.api) for b in blocks] == [url.rpartition(":")[2] for url in urls]
    assert [env["VLLM_PORT"] for _, env in started] == [str(b.engines) for b in blocks]
    engine._launch(asked.model_copy(update={"engine_args": {"data_parallel_size": 2}}), tmp_path, 0, blocks[0])
    engine._launch(asked.model_copy(update={"env": {"VLLM_PORT": "40001"}}), tmp_path, 0, blocks[0])
    assert "VLLM_PORT" not in started[2][1] and started[3][1]["VLLM_PORT"] == "40001", "the exam's own wins"
    from vllm.utils.network_utils import get_open_port
    monkeypatch.setenv("VLLM_PORT", str(blocks[1].engines))
    with socket.create_server(("", blocks[1].engines)):
        assert get_open_port() == blocks[1].engines + 1, "the first that is free"
    for block in blocks:
        block.close()


def penalised(folder):
    """The embedded model with a penalty among its sampling defaults, as some models are published."""
    folder.mkdir()
    for path in embedded.prepare().iterdir():
        if path.name != "generation_config.json":
            (folder / path.name).symlink_to(path)
    (folder / "generation_config.json").write_text('{"repetition_penalty": 4.0, "top_k": 3}')
    return str(folder)


@pytest.mark.engine
def test_a_real_server_killed_during_the_load(tmp_path, monkeypatch):
    """What came is kept, the rest says why, and no process is left. Before that the exam's sampling is all that counts, and no key that
    lies in the environment for somebody's own server."""
    monkeypatch.setenv("VLLM_API_KEY", "somebody's")
    args = {"max_model_len": 128, "kv_cache_memory_bytes": 67_108_864, "enforce_eager": True}
    asked = params.check({"run": "x", "model": penalised(tmp_path / "model"), "engine": "server", "engine_args": args, "num_prompts": 4, "max_tokens": 11, "ignore_eos": True, "timeout_s": 200, "load": "closed", "concurrency": 1})
    engine = server.ServerEngine(asked, models.resolve(asked), tmp_path / "engine.log")
    try:
        assert engine.window() == 128 and engine.load_s > 1
        batch = load.requests(asked, QUESTIONS[:4])
        (done,) = load.measure(engine, asked, batch, 1)
        assert [len(a.token_ids) for a in done.answers] == [11] * 4 and done.counters["vllm:generation_tokens"] == 44
        assert all(len(a.chunk_times) == 11 for a in done.answers), "a chunk a token"
        assert done.counters[metrics.ANSWERED] == 4 and 0 < metrics.outside_engine(load.requests_frame([done]), done.counters) < 50
        plain, penalty = (httpx.post(f"{engine._urls[0]}/v1/completions", json={"model": engine._model, "prompt": [1, 2, 3], "max_tokens": 11, "temperature": 0,
                                                                                "ignore_eos": True} | more).json()["choices"][0]["text"] for more in (http.NEUTRAL, {}))
        assert {a.text for a in done.answers} == {plain} and plain != penalty, "the model's own penalty is not the exam's"
        assert 0 <= sampling.kv_cache_pct(engine.metrics_urls) <= 100
        answer, processes, tree = engine.answer, engine._processes[:], engine._tree
        assert len(tree) >= 2, "the server and its engine core"

        async def kill_then_answer(request):
            if request.prompt_id == 2:
                processes[0].kill()
            return await answer(request)
        engine.answer = kill_then_answer
        with pytest.raises(load.Unfinished, match=r"^a server died: killed by SIGKILL \(in repetition 1/1, closed of 1, with 4 of 4 answers\)$") as early:
            load.measure(engine, asked, batch, 1)
        assert [a.finish_reason.split(":")[0] for a in early.value.found.answers] == ["length", "length", "error", "error"]
    finally:
        engine.close()
    assert not [p for p in tree if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("url", ["http://localhost:99999", "http://localhost:80a"])
def test_a_port_that_is_none(url):
    with pytest.raises(BadInput, match=f"key 'endpoint' is '{url}': .*; expected a port of 1 to 65535, or none"):
        platforms.require(exam(url))
