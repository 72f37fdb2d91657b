"""The schema, and the exact sentence each kind of wrong parameter gets."""
import json

import nbformat
import pytest
import yaml
from conftest import ROOT
from workbook import params
from workbook.errors import BadInput

GOOD = {"run": "x"}
RANDOM = {"subject": "random", "input_len": 8, "output_len": 4, "max_tokens": 0, "chat_template": False}
ASYNC = {"engine": "async"}
WRONG = [
    ({"num_promts": 5}, "parameters: unknown key 'num_promts' (value 5); did you mean 'num_prompts'?"),
    ({"zebra": 5}, "parameters: unknown key 'zebra' (value 5)"),
    ({"num_prompts": "5"}, "parameters: key 'num_prompts' is '5' (text); expected a whole number"),
    ({"num_prompts": 0}, "parameters: key 'num_prompts' is 0; expected at least 1"),
    ({"num_prompts": True}, "parameters: key 'num_prompts' is True (true or false); expected a whole number"),
    ({"num_prompts": 1.5}, "parameters: key 'num_prompts' is 1.5 (a number); expected a whole number"),
    ({"temperature": "1e-3"}, "parameters: key 'temperature' is '1e-3' (text); expected a number"),
    ({"temperature": True}, "parameters: key 'temperature' is True (true or false); expected a number"),
    ({"top_p": 1.5}, "parameters: key 'top_p' is 1.5; expected at most 1.0"),
    ({"ignore_eos": "yes"}, "parameters: key 'ignore_eos' is 'yes' (text); expected true or false"),
    ({"title": None}, "parameters: key 'title' is None (nothing); expected text"),
    ({"warmup": -1}, "parameters: key 'warmup' is -1; expected auto, or a whole number of at least 0"),
    ({"warmup": "soon"}, "parameters: key 'warmup' is 'soon'; expected auto, or a whole number of at least 0"),
    ({"warmup": True}, "parameters: key 'warmup' is True; expected auto, or a whole number of at least 0"),
    ({"model": ""}, "parameters: key 'model' is ''; expected a text that is not empty"),
    ({"scorers": "numeric"}, "parameters: key 'scorers' is 'numeric' (text); expected a list"),
    ({"engine_args": [1]}, "parameters: key 'engine_args' is [1] (a list); expected a mapping of keys to values"),
    ({"engine": "ofline"}, "parameters: key 'engine' is 'ofline'; expected 'offline', 'async', 'server' or 'endpoint'; did you mean 'offline'?"),
    ({"requires": {"gpu": 1}}, "parameters: unknown key 'requires.gpu' (value 1); did you mean 'gpus'?"),
    ({"gates": {"output_tok_s": {"delta": 5.0}}}, "parameters: key 'gates.output_tok_s.delta' is 5.0; expected less than 1.0"),
    ({"gates": {"output_tok": {}}}, "parameters: key 'gates' names the metric 'output_tok'; expected one that is measured; did you mean 'output_tok_s'?"),
    ({"gates": {"foo": {}}}, "parameters: key 'gates' names the metric 'foo'; expected one that is measured, such as 'output_tok_s'"),
    ({"concurrency": [1, 32], "gates": {"output_tok_s@23": {}}},
     "parameters: key 'gates' names the metric 'output_tok_s@23'; expected one measured at a point of the sweep, such as 'output_tok_s@32'; did you mean 'output_tok_s@32'?"),
    ({"n": 4}, "parameters: key 'n' is 4: temperature 0 gives the same answer every time; expected n = 1 or a temperature above 0"),
    ({"repeat_prompts": True, "scorers": ["numeric"]}, "parameters: key 'repeat_prompts' is true: at temperature 0 repeated questions get repeated answers, which are no more evidence; "
     "expected false, or scorers: [] instead of ['numeric']"),
    ({"max_tokens": 0}, "parameters: key 'max_tokens' is 0: subject 'chain_sum' has no answer lengths of its own; expected 1 or more"),
    ({"run": "a/b"}, "parameters: key 'run' is 'a/b'; expected a text of the form ^[A-Za-z0-9][A-Za-z0-9._@-]*$"),
    ({"engine_args": {"data_parallel_size": 2}},
     "parameters: key 'engine_args.data_parallel_size' is 2: the offline engine is one replica; expected 1, or engine: async"),
    ({"engine_args": {"load_format": "dummy"}}, "parameters: key 'engine_args.load_format' is 'dummy', behind the report's back; expected the key weights: dummy"),
    ({"weights": "dummy", "weights_sha256": "a" * 64}, "parameters: key 'weights_sha256' is set: with weights: dummy there is nothing to assert; expected ''"),
    ({"concurrency": [8, 1]}, "parameters: key 'concurrency' is [8, 1]; expected different sizes, ascending"),
    ({"concurrency": [1, 8]}, "parameters: key 'concurrency' ends with 8: a batch asks that many of the 32 requests (num_prompts x n) at once; expected the last to be 32"),
    ({"load": "poisson", "request_rate": 2}, "parameters: key 'load' is 'poisson': the offline engine takes all requests at once; expected batch, or engine: async, server or endpoint"),
    (ASYNC | {"load": "poisson"}, "parameters: key 'request_rate' is 0: load 'poisson' sends by the clock; expected more than 0, requests a second"),
    (ASYNC | {"load": "gamma", "request_rate": -1.0}, "parameters: key 'request_rate' is -1.0; expected at least 0.0"),
    (ASYNC | {"load": "poisson", "request_rate": float("inf")}, "parameters: key 'request_rate' is inf; expected a finite number"),
    ({"slo": {"ttft_ms": float("nan")}}, "parameters: key 'slo.ttft_ms' is nan; expected a finite number"),
    (ASYNC | {"load": "closed"}, "parameters: key 'concurrency' is empty: a closed loop keeps so many requests under way; expected one size or several"),
    (ASYNC | {"load": "closed", "concurrency": [4], "request_rate": 2},
     "parameters: key 'request_rate' is 2: load 'closed' has no rate; expected 0, or load: poisson, gamma or burst"),
    (ASYNC | {"load": "burst", "concurrency": [1, 2], "request_rate": 2}, "parameters: key 'concurrency' is [1, 2]: a burst has one size; expected one"),
    (ASYNC | {"load": "poisson", "concurrency": [4], "request_rate": 2},
     "parameters: key 'concurrency' is [4]: requests of load 'poisson' come at a rate, however many are under way; expected []"),
    (ASYNC | {"load": "closed", "concurrency": [8, 64]},
     "parameters: key 'concurrency' ends with 64: there are 32 requests (num_prompts x n), so that many are never under way; expected at most 32"),
    (ASYNC | {"load": "burst", "concurrency": 33, "request_rate": 2},
     "parameters: key 'concurrency' ends with 33: there are 32 requests (num_prompts x n), so that many are never under way; expected at most 32"),
    ({"env": {"CUDA_VISIBLE_DEVICES": "1"}}, "parameters: key 'env' has CUDA_VISIBLE_DEVICES: '1', of which what watches the GPUs would not know; "
     "expected it in the environment of make, or of Jupyter"),
    ({"engine_args": {"disable_log_stats": True}}, "parameters: key 'engine_args.disable_log_stats' is true: the offline engine then keeps no times of its requests; expected false"),
    ({"gates": {"goodput_s": {}}}, "parameters: key 'gates' names the metric 'goodput_s', which counts requests within limits: expected some in key 'slo'"),
    ({"gates": {"itl_p50_ms": {}}}, "parameters: key 'gates' names the metric 'itl_p50_ms', the gaps of a stream, and engine 'offline' gives none: expected engine: server or endpoint"),
    ({"engine": "server", "engine_args": {"stream_interval": 64}, "gates": {"itl_p99_ms": {}}}, "parameters: key 'gates' names the metric 'itl_p99_ms', the gaps of a stream, "
     "whose events hold 64 tokens each by engine_args.stream_interval: expected 1, or a gate of tpot"),
    ({"engine": "server", "gates": {"queue_p50_ms": {}}}, "parameters: key 'gates' names the metric 'queue_p50_ms', which engine 'server' does not tell: expected engine: offline or async"),
    ({"engine_args": {"speculative_config": {"method": "suffix"}}}, "parameters: key 'engine_args.speculative_config.method' is 'suffix', which drafts from earlier answers: "
     "a pass would be fed by the one before; expected suffix_decoding_max_cached_requests: 0 beside it"),
    ({"gates": {"acceptance_pct": {}}}, "parameters: key 'gates' names the metric 'acceptance_pct', of speculative decoding: expected engine_args.speculative_config"),
    ({"requires": {"device": "cpu"}, "gates": {"gpu_clock_mhz": {}}}, "parameters: key 'gates' names the metric 'gpu_clock_mhz', which is measured only where a GPU generates: expected requires.device: gpu or any"),
    ({"requires": {"device": "cpu"}, "gates": {"front_end_cpu_pct": {}}}, "parameters: key 'gates' names the metric 'front_end_cpu_pct', which is measured only where a GPU generates: expected requires.device: gpu or any"),
    ({"gates": {"client_cpu_pct": {}}}, "parameters: key 'gates' names the metric 'client_cpu_pct', of the process that asks, which with engine 'offline' is the engine's own: expected another engine"),
    ({"engine": "server", "gates": {"straggler_pct": {}}}, "parameters: key 'gates' names the metric 'straggler_pct', how long replicas wait for the slowest: expected several (key 'replicas', with engine: server)"),
    ({"engine": "endpoint", "endpoint": "http://localhost:1", "gates": {"startup_s": {}}}, "parameters: key 'gates' names the metric 'startup_s', which of a server that runs already is not known: expected another engine"),
    ({"gates": {"e2e_p99_ms": {}}}, "parameters: key 'gates' names the metric 'e2e_p99_ms', of 32 requests a repetition, of which it is no more than the slowest few: "
     "expected 1,000 or more, or a lower percentile"),
    ({"num_prompts": 2000, "concurrency": [500, 2000], "gates": {"e2e_p99_ms@500": {}}}, "parameters: key 'gates' names the metric 'e2e_p99_ms@500', of 500 requests a repetition, "
     "of which it is no more than the slowest few: expected 1,000 or more, or a lower percentile"),
    ({"max_tokens": 512, "engine_args": {"max_model_len": 512}}, "parameters: key 'max_tokens' is 512, and engine_args.max_model_len, which a prompt and its answer share, is 512; expected max_tokens below it"),
    ({"engine": "endpoint"}, "parameters: key 'endpoint' is empty: engine 'endpoint' is a server that runs already; expected its URL"),
    ({"engine": "endpoint", "endpoint": "https://me:secret@host/v1"}, "parameters: key 'endpoint' has a user name, a password or a query: the report shows it to everybody; "
     "expected scheme, host, port and path alone, the key being in the environment variable OPENAI_API_KEY"),
    (ASYNC | {"endpoint": "http://x"}, "parameters: key 'endpoint' is 'http://x': engine 'async' is started for the run; expected '', or engine: endpoint"),
    (ASYNC | {"replicas": 2}, "parameters: key 'replicas' is 2: only servers run side by side; expected 1, or engine: server"),
    ({"slo": {"tfft_ms": 5}}, "parameters: unknown key 'slo.tfft_ms' (value 5); did you mean 'ttft_ms'?"),
    ({"requires": {"device": "cpu", "gpus": 2}}, "parameters: key 'requires.gpus' is 2: the exam requires the device 'cpu'; expected 0"),
    ({"subject": "jsonl"}, "parameters: key 'subject_path' is empty: subject 'jsonl' is read from a file; expected its path"),
    ({"subject_path": "x"}, "parameters: key 'subject_path' is 'x': subject 'chain_sum' is generated; expected '', or one of the subjects gsm8k, jsonl, sharegpt"),
    ({"input_len": 5}, "parameters: key 'input_len' is 5: subject 'chain_sum' has lengths of its own; expected 0, or subject 'random'"),
    (RANDOM | {"input_len": 0}, "parameters: key 'input_len' is 0: subject 'random' is made to length; expected 1 or more"),
    (RANDOM | {"max_tokens": 64}, "parameters: key 'max_tokens' is 64 and key 'output_len' is 4: subject 'random' is made to length; expected max_tokens: 0"),
    (RANDOM | {"chat_template": True}, "parameters: key 'chat_template' is true: subject 'random' is token ids, not text; expected false"),
    (RANDOM | {"scorers": ["numeric"]}, "parameters: key 'scorers' is ['numeric']: subject 'random' has no right answers; expected []"),
    ({"variants": {"a": {}, "b": {}}}, "parameters: key 'variants' makes this file into several runs; expected the flat parameters of one of x@a, x@b "
                                       "(python -m workbook params RUN prints them)"),
]


@pytest.mark.parametrize("values, sentence", WRONG, ids=[f"{i}-{next(iter(w[0]))}" for i, w in enumerate(WRONG)])
def test_wrong_parameters_get_a_sentence(values, sentence):
    with pytest.raises(BadInput) as caught:
        params.check(GOOD | values)
    assert str(caught.value) == sentence


def test_several_errors_are_all_said():
    with pytest.raises(BadInput) as caught:
        params.check(GOOD | {"n": 0, "sead": 1})
    assert str(caught.value) == "parameters: key 'n' is 0; expected at least 1; parameters: unknown key 'sead' (value 1); did you mean 'seed'?"


def test_run_is_mandatory():
    with pytest.raises(BadInput, match="parameters: key 'run' is missing; expected the name of the run"):
        params.check({})


def test_an_integer_is_a_fine_number():
    assert params.check(GOOD | {"temperature": 1}).temperature == 1.0
    assert params.check(GOOD | {"gates": {"output_tok_s": {"margin": 0}}}).gates["output_tok_s"].margin == 0.0
    assert params.check(GOOD | {"concurrency": 32}).concurrency == [32]


def test_a_namespace_of_a_notebook_is_filtered():
    exam = params.check(GOOD | {"In": ["x"], "Out": {}, "_i1": "x", "json": json, "print": print, "exit": 1})
    assert exam.run == "x"


def test_work_hash_ignores_what_is_under_test():
    base = params.check(GOOD)
    assert base.work_hash() == params.check({"run": "y", "model": "/m", "engine_args": {"max_num_seqs": 1}, "repetitions": 9}).work_hash()
    assert base.work_hash() == params.check(GOOD | {"num_prompts": 32, "temperature": 0}).work_hash(), "a default that is written out changes nothing"
    assert len({params.check(GOOD | v).work_hash() for v in ({}, {"seed": 1}, {"weights": "dummy"}, RANDOM, RANDOM | {"output_len": 5})}) == 5


def test_synthetic_weights_are_not_scored():
    assert params.check(GOOD | {"scorers": ["numeric"]}).scored
    assert not params.check(GOOD | {"scorers": ["numeric"], "weights": "dummy"}).scored


def test_generate_defaults_are_the_smoke_exam():
    """Restart-and-Run-All in JupyterLab takes the smoke exam, and every key of the schema is declared."""
    notebook = nbformat.read(ROOT / "notebooks" / "generate.ipynb", as_version=4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    namespace: dict = {}
    exec(cell.source, namespace)
    declared = {k: v for k, v in namespace.items() if not k.startswith("__")}
    assert set(declared) == set(params.Exam.model_fields)
    smoke = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
    assert params.check(declared) == params.check(smoke)
    assert all("#" in line for line in cell.source.splitlines())
