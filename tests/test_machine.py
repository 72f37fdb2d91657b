"""What depends on the machine: platform, controls, telemetry, models, subjects."""
import json
import os
import struct
import time

import pytest
from transformers import AutoTokenizer
from workbook import controls, engines, models, params, platforms, subjects, telemetry
from workbook.errors import BadInput

EXAM = params.check({"run": "x"})


def test_the_platform_is_more_than_a_marketing_name():
    name = platforms.platform_id(EXAM)
    if platforms.gpus():
        assert name == f"{platforms.gpus()[0].name} x1"
    else:
        assert name.endswith(f"x{len(os.sched_getaffinity(0))}") and " family " in name and " stepping " in name


@pytest.mark.parametrize("requires, reason", [({"device": "gpu"}, "needs an NVIDIA GPU; this machine has none"), ({"gpus": 2}, "needs 2 GPUs; this machine has 0"),
                                              ({"device": "cpu"}, ""), ({}, "")])
def test_what_a_machine_lacks_is_said(monkeypatch, requires, reason):
    monkeypatch.setattr(platforms, "gpus", lambda: ())
    assert platforms.unmet(params.check({"run": "x", "requires": requires})) == reason


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(platforms, "gpus", lambda: (platforms.Gpu(0, "G", 1),))
    with pytest.raises(BadInput, match="key 'engine_args' asks for 4 GPUs; expected at most 1"):
        platforms.require(params.check({"run": "x", "engine_args": {"tensor_parallel_size": 4}}))
    with pytest.raises(BadInput, match="is sized for a CPU; this machine has a GPU"):
        platforms.require(params.check({"run": "x", "requires": {"device": "cpu"}}))


@pytest.mark.parametrize("visible, index, uuid, expected", [("0,2", 2, "GPU-a", True), ("0,2", 1, "GPU-a", False), ("GPU-ab", 0, "GPU-abc", True), ("", 0, "GPU-a", False)])
def test_cuda_visible_devices_is_respected(monkeypatch, visible, index, uuid, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert platforms._is_visible(index, uuid) is expected


def test_controls_time_both_pieces():
    found = controls.measure()
    assert {k: len(v) for k, v in found.items()} == {"host_s": controls.SAMPLES, "device_s": controls.SAMPLES}
    assert all(t > 0 for v in found.values() for t in v)


def test_telemetry_sees_the_load():
    with telemetry.Sampler() as sampler:
        began = time.monotonic()
        while time.monotonic() - began < 3:
            sum(range(1000))
        ended = time.monotonic()
    frame = sampler.frame()
    inside = frame[frame.time.between(began, ended)]
    assert len(inside) >= 4 and (frame.rss_gb > 0).all(), "twice a second, however busy this process is"
    assert telemetry.busy(frame, [(began, ended)])["cpu_busy_pct"] > 50 / len(platforms.cores())
    assert telemetry.busy(frame, [(0, 1)]) == {}


def test_the_engine_uses_every_core_and_the_exam_wins(monkeypatch):
    monkeypatch.setattr(platforms, "gpus", lambda: ())
    found = engines.environment(EXAM)
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == ",".join(map(str, sorted(os.sched_getaffinity(0))))
    assert found["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert engines.environment(params.check({"run": "x", "env": {"VLLM_CPU_OMP_THREADS_BIND": "0"}}))["VLLM_CPU_OMP_THREADS_BIND"] == "0"
    assert engines.engine_args(EXAM)["disable_log_stats"] is False


def test_the_cause_of_a_dead_engine_is_found_in_its_log(tmp_path):
    log = tmp_path / "engine.log"
    assert engines.last_error(log) == ""
    log.write_text("INFO fine\n(Worker pid=1) ERROR [x.py:1] RuntimeError: out of paper\nINFO bye\n")
    assert engines.last_error(log) == "RuntimeError: out of paper"


# -- models -------------------------------------------------------------------------------------


def safetensors(path, tensors, metadata=None):
    header, data = ({"__metadata__": metadata} if metadata else {}), b""
    for name, blob in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(blob)], "data_offsets": [len(data), len(data) + len(blob)]}
        data += blob
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_weights_hash_is_of_the_tensors(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    safetensors(tmp_path / "one" / "model.safetensors", {"a": b"123", "b": b"45"})
    safetensors(tmp_path / "two" / "1.safetensors", {"b": b"45"}, {"format": "pt"})
    safetensors(tmp_path / "two" / "2.safetensors", {"a": b"123"})
    safetensors(tmp_path / "three" / "model.safetensors", {"a": b"124", "b": b"45"})
    one, two, three = (models.weights_sha256(tmp_path / n) for n in ("one", "two", "three"))
    assert one == two != three
    path = tmp_path / "one" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadInput, match="ends before tensor 'b' does"):
        models.weights_sha256(tmp_path / "one")


def test_the_embedded_model_is_the_expected_one():
    folder = models.resolve(models.EMBEDDED)
    assert models.weights_sha256(folder) == models.EMBEDDED_SHA256
    assert models.prepare() == folder


@pytest.mark.parametrize("files, message", [
    (None, "no such folder; expected 'smollm2-135m-instruct' or a local model folder"), ([], "the folder has no config"),
    (["config.json"], "the folder has no tokenizer; expected a file tokenizer"),
    (["config.json", "tokenizer.json"], "the folder has no weights"),
])
def test_a_folder_that_is_no_model(tmp_path, files, message):
    folder = tmp_path / "m"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).touch()
    with pytest.raises(BadInput, match=message):
        models.resolve(str(folder))


def test_a_damaged_package_is_refused(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    monkeypatch.setenv("GOLDBOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_packaged_gguf", lambda: tmp_path / "x.gguf")
    with pytest.raises(BadInput, match="damaged or of another version"):
        models.prepare()
    monkeypatch.setattr(models, "GGUF_SHA256", __import__("hashlib").sha256(b"not a model").hexdigest())
    with pytest.raises(BadInput, match="cannot be converted"):
        models.prepare()
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")] == []


def test_an_unwritable_cache_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GOLDBOOK_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BadInput, match="cannot hold the embedded model .* GOLDBOOK_CACHE names another"):
        models.prepare()


# -- subjects -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(models.resolve(models.EMBEDDED))


def test_chain_sum_is_the_same_for_a_seed(tokenizer):
    exam = params.check({"run": "x", "num_prompts": 20, "subject_args": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}})
    first, again = (subjects.questions(exam, tokenizer) for _ in range(2))
    assert first == again and len(first) == 20
    other = subjects.questions(exam.model_copy(update={"seed": 1}), tokenizer)
    assert subjects.prompt_set_sha256(first) == subjects.prompt_set_sha256(again) != subjects.prompt_set_sha256(other)
    import re
    for q in first:
        a, sign, b = re.search(r"(\d) ([+-]) (\d) =", q.text).groups()
        assert int(q.gold) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert q.text.endswith("<|im_start|>assistant\n") and tokenizer.decode(q.token_ids) == q.text


def test_wrong_subject_options_are_said(tokenizer):
    for wrong in ({"terms": 2}, {"min_terms": 5, "max_terms": 2}):
        with pytest.raises(BadInput, match="expected options of reasoning-gym's chain_sum"):
            subjects.questions(params.check({"run": "x", "subject_args": wrong}), tokenizer)


def test_sharegpt_follows_vllms_filter(tokenizer):
    exam = params.check({"run": "x", "subject": "sharegpt", "num_prompts": 30, "max_tokens": 0, "chat_template": False})
    found = subjects.questions(exam, tokenizer)
    assert all(4 <= len(q.token_ids) <= 1024 and q.max_tokens >= 4 and len(q.token_ids) + q.max_tokens <= 2048 for q in found)
    assert len({q.max_tokens for q in found}) > 10
    capped = subjects.questions(exam.model_copy(update={"max_tokens": 16}), tokenizer)
    assert [q.max_tokens for q in capped] == [min(16, q.max_tokens) for q in found]


def test_too_many_prompts_is_refused(tokenizer, monkeypatch):
    monkeypatch.setitem(subjects.SUBJECTS, "chain_sum", lambda exam: iter([subjects.Prompt("1 + 1 =", "2")] * 3))
    with pytest.raises(BadInput, match="key 'num_prompts' is 32: subject 'chain_sum' has 3; expected at most that"):
        subjects.questions(EXAM, tokenizer)


def test_a_gpu_is_sampled_through_nvml(monkeypatch):
    """A stand-in for the driver, which a machine without a GPU cannot have; it knows no call that the real
    module does not have."""
    import types

    import pynvml as real
    answers = {"nvmlInit": None, "nvmlDeviceGetHandleByIndex": "handle", "nvmlDeviceGetUtilizationRates": types.SimpleNamespace(gpu=97),
               "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(used=5e9), "nvmlDeviceGetPowerUsage": 612_000,
               "nvmlDeviceGetClockInfo": 1980, "nvmlDeviceGetCurrentClocksThrottleReasons": 4}
    fake = types.ModuleType("pynvml")
    fake.NVML_CLOCK_SM = real.NVML_CLOCK_SM
    for name, answer in answers.items():
        assert hasattr(real, name)
        setattr(fake, name, lambda *_, answer=answer: answer)
    monkeypatch.setitem(__import__("sys").modules, "pynvml", fake)
    assert telemetry._gpu_sample([3]) == {"gpu3_busy_pct": 97, "gpu3_memory_gb": 5.0, "gpu3_power_w": 612.0, "gpu3_sm_mhz": 1980, "gpu3_throttle": 4}
    assert telemetry._gpu_sample([]) == {}


def test_wrong_engine_arguments_are_said_by_name():
    known = ["max_model_len", "enforce_eager", "model"]
    engines._check_names({"max_model_len": 1}, known)
    with pytest.raises(BadInput, match="key 'engine_args' has 'max_modle_len' .value 1.; expected an argument of vLLM's engine, such as 'max_model_len'"):
        engines._check_names({"max_modle_len": 1}, known)
    with pytest.raises(BadInput, match="key 'engine_args' has 'model' .value 'x'.; use key 'model'"):
        engines._check_names({"model": "x"}, known)
    with pytest.raises(BadInput, match="key 'engine_args' has the parallel size 'two'; expected a whole number from 1 on"):
        platforms.require(params.check({"run": "x", "engine_args": {"tensor_parallel_size": "two"}}))
