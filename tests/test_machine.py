"""What depends on the machine: platform, controls, and what engines are started with."""
import dataclasses
import os
import re
import sys
import time
import types
from typing import Literal

import psutil
import pydantic
import pytest
from workbook import controls, cores, params, paths, platforms
from workbook.engines import arguments, base
from workbook.errors import BadInput, Stopped

EXAM = params.check({"run": "x"})


def test_the_platform_is_more_than_a_marketing_name():
    name = platforms.platform_id(EXAM)
    if platforms.gpus():
        assert name == f"{platforms.gpus()[0].name} x1"
    else:
        assert name.endswith(f"x{len(os.sched_getaffinity(0))}") and " family " in name and " stepping " in name


@pytest.mark.parametrize("url, name", [
    ("http://127.0.0.1:8000", "endpoint 127.0.0.1_8000"), ("https://llm.example.org/v1/", "endpoint llm.example.org_443"),
    ("https://gate.example.org/team a/v1", "endpoint gate.example.org_443_team_a"), ("http://[::1]:8000", "endpoint 1_8000"),
])
def test_an_endpoints_platform_is_its_address(url, name, monkeypatch):
    """Whatever machine asks. (A URL with something secret in it is no endpoint: test_params.)"""
    monkeypatch.setattr(platforms, "gpus", lambda: (platforms.Gpu(0, "G", 1),))
    exam = params.check({"run": "x", "engine": "endpoint", "endpoint": url})
    assert platforms.platform_id(exam) == name and platforms.used_gpus(exam) == ()


@pytest.mark.parametrize("requires, reason", [({"device": "gpu"}, "needs an NVIDIA GPU; this machine has none"), ({"gpus": 2}, "needs 2 GPUs; this machine has 0"),
                                              ({"device": "cpu"}, ""), ({}, "")])
def test_what_a_machine_lacks_is_said(monkeypatch, requires, reason):
    monkeypatch.setattr(platforms, "gpus", lambda: ())
    assert platforms.unmet(params.check({"run": "x", "requires": requires})) == reason


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(platforms, "gpus", lambda: (platforms.Gpu(0, "G", 1),))
    with pytest.raises(BadInput, match="key 'engine_args' asks for 4 GPUs, the product of its parallel sizes; expected at most 1, the GPUs of this machine"):
        platforms.require(params.check({"run": "x", "engine_args": {"tensor_parallel_size": 4}}))
    with pytest.raises(BadInput, match="is sized for a CPU; this machine has a GPU"):
        platforms.require(params.check({"run": "x", "requires": {"device": "cpu"}}))


class Nvml(types.ModuleType):
    """NVML of a machine with so many GPUs, none of which says more than its name: a stand-in, for there is none here."""

    class NVMLError(Exception):
        pass

    def __init__(self, uuids):
        super().__init__("pynvml")
        self._uuids = uuids
        self.nvmlInit = lambda: None
        self.nvmlDeviceGetCount = lambda: len(uuids)
        self.nvmlDeviceGetHandleByIndex = lambda index: index
        self.nvmlDeviceGetUUID = lambda handle: uuids[handle]
        self.nvmlDeviceGetName = lambda handle: f"G{handle}"
        self.nvmlDeviceGetMemoryInfo = self.nvmlDeviceGetComputeRunningProcesses = self._unsupported

    def _unsupported(self, handle):
        raise self.NVMLError("Not Supported")


@pytest.fixture
def nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(["GPU-aa", "GPU-ab", "GPU-b", "GPU-c"]))
    platforms.gpus.cache_clear()
    yield
    platforms.gpus.cache_clear()


@pytest.mark.parametrize("visible, indices", [
    (None, [0, 1, 2, 3]), ("0,2", [0, 2]), ("3, 1", [3, 1]), ("GPU-b,GPU-ab", [2, 1]), ("", []), ("1,9,2", [1]), ("-1", [])])
def test_cuda_visible_devices_is_respected_in_its_order(monkeypatch, nvml, visible, indices):
    """The first of them is CUDA's first, whatever NVML calls it."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [g.index for g in platforms.gpus()] == indices
    assert [g.index for g in platforms.used_gpus(EXAM)] == indices[:1]


def test_a_slice_of_a_gpu_is_refused(monkeypatch, nvml):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0a1b")
    with pytest.raises(BadInput, match="CUDA_VISIBLE_DEVICES is 'MIG-0a1b': a slice of a GPU"):
        platforms.gpus()


def test_a_gpu_that_does_not_say_everything_can_be_used(nvml, monkeypatch):
    """One that shares the host's memory, or one of a virtual machine."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert platforms.gpus()[0] == platforms.Gpu(0, "G0", 0)
    assert platforms.gpu_memory_used(EXAM) == {0: 0} and platforms.foreign_processes(EXAM) == []


@pytest.mark.parametrize("stat, allowed, chosen", [
    ("cpu  9\ncpu0 1\ncpu1 1\ncpu2 1\n", {0, 2}, "ac"), ("cpu  9\ncpu0 1\ncpu2 1\ncpu4 1\n", {2, 4}, "bc"),
    ("cpu  9\ncpu0 1\ncpu1 1\ncpu2 1\n", {8, 9, 10}, "abc")], ids=["all online", "some offline", "a container's own numbers"])
def test_the_cores_of_this_process_among_those_that_are_counted(monkeypatch, tmp_path, stat, allowed, chosen):
    (tmp_path / "stat").write_text(stat)
    monkeypatch.setattr(cores, "STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    assert "".join(cores.own("abc")) == chosen


def test_the_cores_of_this_machine_are_those_that_psutil_counts():
    assert len(cores.own(psutil.cpu_times(percpu=True))) == len(os.sched_getaffinity(0))


def test_controls_time_both_pieces():
    found = controls.measure()
    assert {k: len(v) for k, v in found.items()} == {"host_s": controls.SAMPLES, "device_s": controls.SAMPLES}
    assert all(t > 0 for v in found.values() for t in v)


@pytest.mark.parametrize("cpu, names", [(True, {"device_beside_s", "host_beside_s", "copy_beside_s"}), (False, {"host_beside_s", "copy_beside_s"})])
def test_controls_beside_the_load_are_quick(cpu, names):
    with controls.beside(cpu) as times:
        began = time.monotonic()
        found = times()
        took = time.monotonic() - began
    assert found.keys() == names and 0 < sum(found.values()) < took < 20, "two seconds on a quiet machine"


def test_controls_beside_the_load_use_all_cores_though_the_kernel_is_bound_to_one():
    """As it is by an engine in its own process."""
    one = {min(controls.CORES)}
    os.sched_setaffinity(0, one)
    try:
        with controls.beside(cpu=False):
            (process,) = psutil.Process().children()
            assert (set(process.cpu_affinity()), os.sched_getaffinity(0)) == (controls.CORES, one)
        assert not process.is_running()
    finally:
        os.sched_setaffinity(0, controls.CORES)


@pytest.mark.parametrize("before", [True, False], ids=["long before", "just before"])
def test_controls_whose_process_ends_stop_the_session(monkeypatch, before):
    with pytest.raises(Stopped, match=r"the process of the controls ended with code -9: $"), controls.beside(cpu=False) as times:
        (process,) = psutil.Process().children()
        process.kill()
        while before and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        times()
    monkeypatch.setattr(controls, "CORES", {1 << 20})
    with pytest.raises(Stopped, match=r"the process of the controls ended with code 1: OSError: .*Invalid argument"), controls.beside(cpu=False):
        raise AssertionError("it was never ready")


def test_the_engine_uses_every_core_and_the_exam_wins(monkeypatch):
    monkeypatch.setattr(platforms, "gpus", lambda: ())
    found = base.environment(EXAM)
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == ",".join(map(str, sorted(os.sched_getaffinity(0))))
    assert found["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn" and found["CUDA_DEVICE_ORDER"] == paths.child_environment()["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert base.environment(params.check({"run": "x", "env": {"VLLM_CPU_OMP_THREADS_BIND": "0"}}))["VLLM_CPU_OMP_THREADS_BIND"] == "0"
    assert base.engine_args(EXAM)["disable_log_stats"] is False


def test_a_cpu_without_bf16_computes_in_float32_and_the_exam_wins(monkeypatch, tmp_path):
    """Where oneDNN has no bfloat16 a step of the embedded model took 28 s instead of 0.3."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(platforms, "gpus", lambda: ())
    assert (platforms.matrix_dtype() == "bfloat16") == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(platforms, "CPUINFO", cpuinfo)
    zen3 = "processor\t: 0\nflags\t\t: fpu fma avx2\n"
    for text, dtype in ((zen3, "float32"), (zen3.replace("avx2", "avx2 avx512bw"), "bfloat16"), (zen3.replace("avx2", "avx2 avx_ne_convert"), "bfloat16"),
                        ("Features\t: fp asimd\n", "float32"), ("Features\t: fp asimd bf16\n", "bfloat16"), ("isa\t: rv64\n", "bfloat16")):
        cpuinfo.write_text(text)
        assert platforms.matrix_dtype() == dtype, text
    cpuinfo.write_text(zen3)
    assert base.engine_args(EXAM)["dtype"] == platforms.describe(EXAM)["cpu"]["dtype"] == "float32"
    assert base.engine_args(params.check({"run": "x", "engine_args": {"dtype": "bfloat16"}}))["dtype"] == "bfloat16"
    monkeypatch.setattr(platforms, "gpus", lambda: (platforms.Gpu(0, "G", 1),))
    assert platforms.matrix_dtype() == "bfloat16" and "dtype" not in base.engine_args(EXAM)


def test_the_cause_of_a_dead_engine_is_found_in_its_log(tmp_path):
    log = tmp_path / "engine.log"
    assert base.last_error(log) == ""
    log.write_text("INFO fine\n(Worker pid=1) ERROR [x.py:1] RuntimeError: out of paper\nINFO bye\n")
    assert base.last_error(log) == "RuntimeError: out of paper"
    with log.open("a") as more:
        more.write("\n(APIServer pid=7) WARNING 11-22 04:09:59 [system_utils.py:255] This can cause fd limit errors like `OSError: [Errno 24] Too many open files`.\n")
    assert base.last_error(log) == "RuntimeError: out of paper", "a warning is no error"


def test_what_refuses_to_start_names_the_arguments():
    class Config(pydantic.BaseModel):
        dtype: Literal["auto", "half"] = "auto"
        seats: int = pydantic.Field(1, ge=1)
    with pytest.raises(pydantic.ValidationError) as refused:
        Config(dtype="bf16", seats=0)
    assert base.refusal(refused.value, {"dtype": "bf16"}) == "engine_args.dtype is 'bf16': Input should be 'auto' or 'half'; seats: Input should be greater than or equal to 1"
    assert base.refusal(TypeError("'<' not\nsupported"), {"max_num_seqs": "lots"}) == "TypeError: '<' not supported (engine_args: max_num_seqs 'lots')"
    assert base.keyed("ValueError: decrease --gpu-memory-utilization").endswith("engine_args.kv_cache_memory_bytes") and base.keyed("no") == "no"


def test_the_attention_that_vllm_chose_is_found_in_its_log(tmp_path):
    """The lines are vLLM's of a GPU, by every server the same, and one where the exam named the back end; a CPU's log has none."""
    log = tmp_path / "engine.log"
    assert base.chosen_attention(log) == "unknown"
    log.write_text("(EngineCore pid=1) INFO 11-26 13:11:30 [cuda.py:483] Using FLASH_ATTN attention backend out of potential backends: ['FLASH_ATTN', 'TRITON_ATTN'].\n"
                   "(EngineCore pid=1) INFO 11-26 13:11:30 [flash_attn.py:776] Using FlashAttention version 2\nINFO Using CUTLASS backend for GEMM.\n" * 2)
    assert base.chosen_attention(log) == "FLASH_ATTN, FlashAttention 2"
    before = log.stat().st_size
    with log.open("a") as more:
        more.write("(EngineCore pid=1) INFO 11-26 13:20:00 [cuda.py:422] Using AttentionBackendEnum.TRITON_ATTN backend.\n")
    assert base.chosen_attention(log, before) == "TRITON_ATTN", "an engine's own part of the log"


def test_the_peak_of_the_kv_cache_is_that_since_it_was_last_asked():
    engine = object.__new__(base.LocalEngine)
    for share in (0.1, 0.4, 0.2):
        engine._record_step(types.SimpleNamespace(kv_cache_usage=share), None, 0)
    engine._record_step(None, None, 0)
    engine._record_step(types.SimpleNamespace(), None, 1)
    assert engine.kv_cache_peak() == 40 and engine.kv_cache_peak() is None
    engine._record_step(types.SimpleNamespace(kv_cache_usage=0.0), None, 0)
    assert engine.kv_cache_peak() == 0


@pytest.mark.parametrize("engine, given, said", [
    ("offline", {"max_modle_len": 1}, "key 'engine_args' has 'max_modle_len' (value 1); expected an argument of vLLM's engine; did you mean 'max_model_len'?"),
    ("async", {"api_server_count": 2}, "key 'engine_args' has 'api_server_count' (value 2); expected an argument of vLLM's engine"),
    ("server", {"max_num_seq": 8}, "key 'engine_args' has 'max_num_seq' (value 8); expected an argument of vLLM's server; did you mean 'max_num_seqs'?"),
    ("server", {"model": "x"}, "key 'engine_args' has 'model' (value 'x'); use key 'model'"),
])
def test_wrong_engine_arguments_are_said_by_name(engine, given, said):
    with pytest.raises(BadInput, match=f"^{re.escape(said)}"):
        arguments.require(params.check({"run": "x", "engine": engine, "engine_args": given}))


def test_every_argument_of_the_installed_vllm_is_known():
    """Of the engine's fields, and of the options that `vllm serve` itself takes here."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    fields = {field.name: 1 for field in dataclasses.fields(AsyncEngineArgs) if field.name not in ("model", "load_format") and "_parallel_" not in field.name}
    arguments.require(params.check({"run": "x", "engine": "async", "engine_args": fields | {"max_model_len": 100}}))
    parser = ServeSubcommand().subparser_init(FlexibleArgumentParser().add_subparsers())
    words = {word[2:].replace("-", "_"): 1 for action in parser._actions for word in action.option_strings if word.startswith("--")}
    assert len(words) > 200 and "no_enable_prefix_caching" in words
    kept = {word: 1 for word in words if word not in ("model", "load_format") and "_parallel_" not in word}
    arguments.require(params.check({"run": "x", "engine": "server", "engine_args": kept | {"max_model_len": 100}}))


def test_where_vllm_has_no_source_to_read_nothing_is_refused(tmp_path, monkeypatch):
    exam = params.check({"run": "x", "engine_args": {"max_modle_len": 1}})
    for folder in (None, tmp_path):
        monkeypatch.setattr(arguments, "_folder", lambda: folder)
        arguments.require(exam)
    broken = tmp_path / "broken"  # a folder of its own: what was read of one is kept
    (broken / "engine").mkdir(parents=True)
    (broken / "engine" / "arg_utils.py").write_text("class EngineArgs(:\n")
    monkeypatch.setattr(arguments, "_folder", lambda: broken)
    arguments.require(exam)


def test_the_size_of_a_parallel_engine_is_a_number():
    with pytest.raises(BadInput, match="key 'engine_args' has the parallel size 'two'; expected a whole number from 1 on"):
        platforms.require(params.check({"run": "x", "engine_args": {"tensor_parallel_size": "two"}}))
