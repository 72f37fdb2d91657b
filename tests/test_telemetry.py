"""Telemetry: the sampling process as it runs, a scripted driver where there is no GPU, and what follows from samples."""
import http.server
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pynvml
import pytest
import scripted_server
from workbook import load, platforms, plots, sampling, telemetry
from workbook.engines import Answer


def test_it_sees_the_load():
    with telemetry.Sampler() as sampler:
        began = time.monotonic()
        while time.monotonic() - began < 3:
            sum(range(1000))
        ended = time.monotonic()
    frame = sampler.frame()
    inside = frame[frame.time.between(began, ended)]
    assert len(inside) >= 4 and (frame.rss_gb > 0).all(), "twice a second, however busy this process is"
    assert frame.time.iloc[0] <= began and frame.time.iloc[-1] >= ended, "a sample before and one after, so that a counter's growth is known"
    assert telemetry.busy(frame, [(began, ended)])["cpu_busy_pct"] > 50 / len(platforms.cores())
    assert telemetry.busy(frame, [(0, 1)]) == {} and sampler.problem == ""
    assert telemetry.of_window(frame, began, ended, 10) == {"memory_peak_gb": inside.rss_gb.max(), "others_cpu_pct": inside.others_cpu_pct.mean()}, "no GPU was watched: no energy"


def test_a_process_that_is_found_late_has_not_worked_for_all_its_life_in_one_sample():
    """The sampler looks for new ones every five seconds; until then what they take is the others'."""
    with telemetry.Sampler() as sampler:
        time.sleep(0.6)
        late = subprocess.Popen([sys.executable, "-c", "# vllm.entrypoints\nwhile True: pass"])
        time.sleep(7.5)
        late.kill()
        late.wait()
    used = sampler.frame().front_end_cpu_pct.dropna()
    assert 0 < used.max() < 200, "of one core, by one thread"


@pytest.mark.parametrize("strike, said", [("kill", "exit status -9"), ("bad", "")])
def test_a_sampling_process_that_dies_is_said(strike, said):
    """What was sampled until then is kept; a process that never samples does not hold up the run."""
    sampler = telemetry.Sampler(gpus=[99] if strike == "bad" else [])
    with sampler:
        if strike == "kill":
            sampler._process.kill()
    assert f"the sampling process ended after {len(sampler.frame())} samples (" in sampler.problem and said in sampler.problem
    assert sampler.problem.endswith("the telemetry is incomplete")
    assert (len(sampler.frame()) > 0) == (strike == "kill")
    assert telemetry.busy(sampler.frame(), [(0, 1)]) == {} and telemetry.of_window(sampler.frame(), 0, 1, 1) == {} and telemetry.disturbances(sampler.frame(), [(0, 1)]) == []


def test_an_interruption_while_it_starts_leaves_no_process(monkeypatch):
    """In JupyterLab the kernel lives on."""
    def interrupted(seconds):
        raise KeyboardInterrupt
    monkeypatch.setattr(telemetry.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        telemetry.Sampler().__enter__()
    assert not [p for p in psutil.Process().children(recursive=True) if "workbook.sampling" in p.cmdline()]


def test_the_tree_has_every_process_but_the_sampling_one():
    child = subprocess.Popen([sys.executable, "-c", "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"])
    try:
        while len(psutil.Process(child.pid).children()) < 1:
            time.sleep(0.02)
        tree = sampling.Tree(psutil.Process(child.pid))
        assert tree.pids == {child.pid, *(p.pid for p in psutil.Process(child.pid).children())}
        assert tree.usage()[0] > psutil.Process(child.pid).memory_info().rss
        assert os.getpid() not in sampling.Tree(psutil.Process(os.getppid())).pids
    finally:
        for process in psutil.Process(child.pid).children():
            process.kill()
        child.wait()
    assert tree.usage() == (0, {}), "those that ended count nothing"


@pytest.mark.parametrize("words, role", [
    (["VLLM::EngineCore_DP0"], "engine_core"), (["VLLM::Worker_TP1"], "worker"), (["VLLM::APIServer_2"], "front_end"),
    (["python", "-m", "vllm.entrypoints.openai.api_server", "--port", "1"], "front_end"), (["python", "-m", "workbook.engines.serve", "serve"], "front_end"),
    (["python", "-c", "from multiprocessing.resource_tracker import main"], "")])
def test_the_busiest_process_of_each_kind(words, role):
    """The first word of a command line is what a process calls itself: vLLM's have titles."""
    idle, busy = (subprocess.Popen([words[0], "-c", f"import time; end = time.time() + {spins}\nwhile time.time() < end: pass\nprint(flush=True); input()", *words[1:]],
                                   executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for spins in (0, 0.5))
    try:
        for process in (idle, busy):
            process.stdout.readline()
        tree = sampling.Tree(psutil.Process())
        used = tree.usage()[1]
        assert tree.busiest(used) == ({role: used[busy.pid]} if role else {}) and used[busy.pid] > used[idle.pid]
    finally:
        for process in (idle, busy):
            process.communicate(b"\n")


def test_what_others_take_of_the_cores_is_told_from_the_load():
    busy = "import time; end = time.time() + 3\nwhile time.time() < end: pass"
    share = 100 / len(psutil.Process().cpu_affinity())
    shares = {}
    for whose in ("own", "others"):
        kept = subprocess.Popen([sys.executable, "-c", busy] if whose == "own" else ["setsid", "--fork", sys.executable, "-c", busy])
        with telemetry.Sampler() as sampler:
            time.sleep(2)
        kept.wait()
        frame = sampler.frame()
        shares[whose] = telemetry.of_window(frame, frame.time.iloc[1] - 0.01, frame.time.iloc[-2], 1)["others_cpu_pct"]
        time.sleep(1.5)
    assert shares["others"] - shares["own"] > 0.5 * share, shares


class Metrics(http.server.BaseHTTPRequestHandler):
    """vLLM's page for two engine cores, the lines that matter."""
    text = ('# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.\n# TYPE vllm:kv_cache_usage_perc gauge\n'
            'vllm:kv_cache_usage_perc{engine="0",model_name="m"} 6.25e-02\nvllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25\n')

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.text.encode())

    def log_message(self, *_):
        pass


def test_a_server_is_asked_for_its_kv_cache():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metrics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert sampling.kv_cache_pct([url]) == sampling.kv_cache_pct(["http://127.0.0.1:9", url]) == 25.0
        with telemetry.Sampler(urls=[url]) as sampler:
            time.sleep(2)
        assert set(sampler.frame().kv_cache_pct.dropna()) == {25.0} and sampler.problem == ""
        server.shutdown()
    with scripted_server.running({}) as server:  # which has no such page
        assert sampling.kv_cache_pct([server.url]) is None
    assert sampling.kv_cache_pct(["http://127.0.0.1:9"]) is None


# -- a driver -----------------------------------------------------------------------------------


class Driver(types.ModuleType):
    """A stand-in for pynvml, which a machine without a GPU cannot try: each answer is what the real function of that
    name returns, or an error that it raises. It knows no function that the real module does not have."""
    NVMLError, NVML_CLOCK_SM, NVML_CLOCK_MEM = pynvml.NVMLError, pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM

    def __init__(self, **changes):
        super().__init__("pynvml")
        answers = {"nvmlInit": None, "nvmlDeviceGetHandleByIndex": "handle", "nvmlDeviceGetUtilizationRates": types.SimpleNamespace(gpu=97),
                   "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(used=5e9), "nvmlDeviceGetPowerUsage": 612_000,
                   "nvmlDeviceGetTotalEnergyConsumption": 7_000_500, "nvmlDeviceGetClockInfo": 1980,
                   "nvmlDeviceGetCurrentClocksThrottleReasons": 4, "nvmlDeviceGetComputeRunningProcesses": []} | changes
        assert all(hasattr(pynvml, name) for name in answers)
        self.calls = []
        for name, answer in answers.items():
            setattr(self, name, lambda *_, name=name, answer=answer: self._answer(name, answer))

    def _answer(self, name, answer):
        self.calls.append(name)
        if isinstance(answer, Exception):
            raise answer
        return answer


def watched(monkeypatch, pids=(), **changes) -> tuple[sampling.Gpus, Driver]:
    driver = Driver(nvmlDeviceGetComputeRunningProcesses=[types.SimpleNamespace(pid=p) for p in pids], **changes)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    return sampling.Gpus([3], sampling.Tree(psutil.Process())), driver


def test_a_gpu_is_sampled_through_nvml(monkeypatch):
    gpus, driver = watched(monkeypatch)
    whole = {"gpu3_busy_pct": 97, "gpu3_memory_gb": 5.0, "gpu3_power_w": 612.0, "gpu3_energy_j": 7000.5, "gpu3_sm_mhz": 1980, "gpu3_memory_mhz": 1980,
             "gpu3_throttle": 4, "gpu3_foreign": ""}
    assert gpus.sample() == gpus.sample() == whole and driver.calls.count("nvmlInit") == 1
    unsupported = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    gpus, _ = watched(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=unsupported, nvmlDeviceGetPowerUsage=unsupported)
    assert gpus.sample() == {k: v for k, v in whole.items() if k not in ("gpu3_energy_j", "gpu3_power_w")}, "what a card does not support is left out"


@pytest.mark.parametrize("before, during, foreign", [
    ([os.getpid()], [os.getpid()], ""), ([os.getpid()], [os.getpid(), 999_999_999], "999999999"),
    ([os.getpid(), 999_999_999], [os.getpid(), 999_999_999], "999999999"),
    ([888_888_888], [888_888_888], ""), ([888_888_888], [888_888_888, 999_999_999], "999999999")],
    ids=["ours", "another", "another from the start", "ours, by ids of the host", "another, by ids of the host"])
def test_foreign_processes_are_told_from_ours(monkeypatch, before, during, foreign):
    gpus, driver = watched(monkeypatch, before)
    driver.nvmlDeviceGetComputeRunningProcesses = lambda handle: [types.SimpleNamespace(pid=p) for p in during]
    assert gpus.sample()["gpu3_foreign"] == foreign


def test_the_multi_process_service_is_nobodys_work(monkeypatch, tmp_path):
    """Its server is listed on a GPU beside the processes whose kernels it runs."""
    (tmp_path / "nvidia-cuda-mps-server").symlink_to("/bin/sleep")
    server = subprocess.Popen([tmp_path / "nvidia-cuda-mps-server", "60"])
    try:
        gpus, driver = watched(monkeypatch, [os.getpid()])
        driver.nvmlDeviceGetComputeRunningProcesses = lambda handle: [types.SimpleNamespace(pid=p) for p in (os.getpid(), server.pid, 999_999_999)]
        assert gpus.sample()["gpu3_foreign"] == "999999999"
    finally:
        server.kill()
        server.wait()


def test_a_new_child_is_not_foreign(monkeypatch):
    gpus, driver = watched(monkeypatch, [os.getpid()])
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    driver.nvmlDeviceGetComputeRunningProcesses = lambda handle: [types.SimpleNamespace(pid=child.pid)]
    assert gpus.sample()["gpu3_foreign"] == ""
    child.communicate(b"\n")


# -- what follows -------------------------------------------------------------------------------


def samples(**columns) -> pd.DataFrame:
    """Ten seconds, a sample every half: two GPUs at 400 and 200 W, their counters with values from before."""
    time_s = np.arange(100.0, 110.5, 0.5)
    base = {"time": time_s, "cpu_busy_pct": 50.0, "rss_gb": 1.0, "gpu0_power_w": 400.0, "gpu0_energy_j": 7e6 + 400 * (time_s - 100), "gpu0_throttle": 4.0,
            "gpu0_memory_gb": np.where(time_s == 105, 70.0, 60.0), "gpu0_foreign": "", "gpu1_power_w": 200.0, "gpu1_energy_j": 9e6 + 200 * (time_s - 100),
            "gpu1_throttle": 0.0, "gpu1_memory_gb": 61.0, "gpu1_foreign": ""}
    return pd.DataFrame(base | columns)


def test_energy_is_a_counters_growth_between_the_edges_of_a_pass():
    frame = samples()
    assert telemetry.energy(frame, 102.2, 106.7) == pytest.approx(4.5 * 600)
    assert telemetry.energy(frame.drop(columns=["gpu0_energy_j", "gpu1_energy_j"]), 102.2, 106.7) == pytest.approx(4.5 * 600), "else power, integrated"
    assert telemetry.energy(samples(gpu0_energy_j=np.where(frame.time == 104, np.nan, frame.gpu0_energy_j)), 102.2, 106.7) == pytest.approx(4.5 * 600)
    for lacking in (frame.drop(columns=["gpu1_energy_j", "gpu1_power_w"]), frame[frame.time < 106], frame[frame.time > 103], frame[["time", "rss_gb"]]):
        assert np.isnan(telemetry.energy(lacking, 102.2, 106.7))


def test_metrics_of_a_pass():
    frame = samples(kv_cache_pct=[np.nan, 3.0, 5.0, 80.0] + [np.nan] * 17)
    assert telemetry.of_window(frame, 100.1, 104.1, 1200) == pytest.approx({"memory_peak_gb": 61.0, "kv_cache_peak_pct": 80.0, "energy_j_per_token": 2.0})
    assert telemetry.of_window(frame, 104.1, 105.9, 1200) == {"memory_peak_gb": 70.0}, "too short for an energy, and the server was not asked"
    assert telemetry.of_window(frame, 104.1, 104.4, 1200) == {} == telemetry.of_window(frame.head(0), 1, 9, 1200), "between two samples"
    assert telemetry.of_window(frame[["time", "rss_gb"]], 100, 109, 1) == {"memory_peak_gb": 1.0}
    clocked = telemetry.of_window(samples(gpu0_sm_mhz=1980.0, gpu1_sm_mhz=1755.0), 104.1, 105.9, 1)
    assert clocked == {"memory_peak_gb": 70.0, "gpu_clock_mhz": 1867.5}
    share = telemetry.of_window(samples(gpu0_busy_pct=98.0, gpu1_busy_pct=91.0), 104.1, 105.9, 1)["gpu_busy_pct"]
    assert share == 91.0, "of the one that has least to do"
    at = frame.time.to_numpy()
    stale = samples(gpu0_busy_pct=np.where((at >= 105) & (at < 106.5), 90.0, 0.0), gpu1_busy_pct=99.0)  # of 104.2 to 106.2, as a share of the last second is
    assert telemetry.of_window(stale, 104.2, 106.2, 1)["gpu_busy_pct"] == 90.0 == telemetry.busy(stale, [(104.2, 106.2)])["gpu0_busy_pct"], "not of what was before"
    assert "gpu_busy_pct" not in telemetry.of_window(stale, 104.4, 105.2, 1) and set(telemetry.busy(stale, [(104.4, 105.2)])) == {"cpu_busy_pct"}, "a short pass has none"
    processes = {"front_end_cpu_pct": 60.0, "engine_core_cpu_pct": 97.5}
    assert telemetry.of_window(samples(**processes), 104.1, 105.9, 1) == {"memory_peak_gb": 70.0} | processes
    assert telemetry.of_window(samples(**processes)[["time", "rss_gb", *processes]], 104.1, 105.9, 1) == {"memory_peak_gb": 1.0}, "on a CPU they are what computes"
    shared = samples(**processes, others_cpu_pct=30.0).drop(columns=["gpu0_memory_gb", "gpu1_memory_gb"])
    assert telemetry.of_window(shared, 104.1, 105.9, 1) == processes, "GPUs in the host's memory are GPUs"


def test_each_pass_notes_its_own():
    answers = [Answer(0, s, "7", [5], 600, 3, 600, "stop", None, None, None, None) for s in (0, 1)]
    done = [load.Repetition(1, 0, 100.0, 104.0, answers, {}, measured={"kv_cache_peak_pct": 9.0}), load.Repetition(2, 0, 104.0, 106.0, answers, {})]
    telemetry.note(done, samples())
    assert [r.measured for r in done] == [pytest.approx({"kv_cache_peak_pct": 9.0, "memory_peak_gb": 61.0, "energy_j_per_token": 2.0}),
                                          pytest.approx({"memory_peak_gb": 70.0, "energy_j_per_token": 1.0})]
    elsewhere = [load.Repetition(1, 0, 100.0, 104.0, answers, {})]
    telemetry.note(elsewhere, samples(kv_cache_pct=12.0), here=False)
    assert elsewhere[0].measured == {"kv_cache_peak_pct": 12.0}, "the memory and the energy here are not those of an engine elsewhere"


WINDOWS = [(101.0, 103.0), (104.0, 106.0)]  # ten samples


def test_a_power_cap_is_normal():
    assert telemetry.throttled(samples(), WINDOWS) == {"gpu0": {"power cap": 1.0}, "gpu1": {}}
    assert telemetry.disturbances(samples(), WINDOWS) == []


@pytest.mark.parametrize("columns, sentence", [
    ({"gpu1_throttle": lambda t: np.where(t == 102, 4 | 32, 4)}, "GPU 1 was slowed down while measuring: thermal slowdown (software) in 10 % of the samples"),
    ({"gpu1_throttle": lambda t: np.where(t > 104, 8 | 64, np.nan)},
     "GPU 1 was slowed down while measuring: hardware slowdown in 100 %, thermal slowdown (hardware) in 100 % of the samples"),
    ({"gpu0_throttle": lambda t: np.full(len(t), 128.0)}, "GPU 0 was slowed down while measuring: power brake (hardware) in 100 % of the samples"),
    ({"gpu0_foreign": lambda t: np.where(t == 105, "17 4", "")}, "another process used GPU 0 while measuring: 4, 17 in 10 % of the samples"),
    ({"gpu0_throttle": lambda t: np.where(t == 103.5, 64, 0)}, None), ({"gpu0_foreign": lambda t: np.where(t == 100.5, "17", "")}, None)],
    ids=["software", "hardware", "brake", "process", "slowdown between passes", "process between passes"])
def test_what_disturbs_a_gpu_while_measuring_is_said(columns, sentence):
    frame = samples()
    assert telemetry.disturbances(frame.assign(**{name: values(frame.time.to_numpy()) for name, values in columns.items()}), WINDOWS) == ([sentence] if sentence else [])


def test_a_gpu_that_nobody_watched_is_said():
    """Lost in mid-run, or never sampled; of passes too short for a sample nothing is said."""
    frame = samples()
    lost = frame.assign(**{c: frame[c].where(frame.time < 101).astype(object) for c in frame if c.startswith("gpu1_") and c != "gpu1_foreign"})
    known = {"cpu_busy_pct", "gpu0_busy_pct"}
    assert set(telemetry.busy(lost.assign(cpu_busy_pct=5.0, gpu0_busy_pct=90.0, gpu1_busy_pct=np.where(lost.time < 101, 90.0, np.nan)), WINDOWS)) == known
    long = [(101.0, 104.0), (104.0, 106.5)]
    said = "GPU 1 was not watched while measuring: whether anything disturbed it is not known"
    assert telemetry.disturbances(lost, long, [0, 1]) == [said] and telemetry.disturbances(lost, WINDOWS, [0, 1]) == []
    assert telemetry.disturbances(pd.DataFrame(), long, [1]) == [said] and telemetry.busy(pd.DataFrame(), long) == {}


def test_every_reason_has_the_bit_that_nvml_gives_it():
    names = {"idle": "GpuIdle", "clocks set by the user": "ApplicationsClocksSetting", "power cap": "SwPowerCap", "hardware slowdown": "HwSlowdown", "sync boost": "SyncBoost",
             "thermal slowdown (software)": "SwThermalSlowdown", "thermal slowdown (hardware)": "HwThermalSlowdown", "power brake (hardware)": "HwPowerBrakeSlowdown",
             "display clocks": "DisplayClockSetting"}
    assert {getattr(pynvml, f"nvmlClocksThrottleReason{names[reason]}"): reason for reason in telemetry.REASONS.values()} == telemetry.REASONS


def test_the_plot_has_power_and_clocks_where_there_is_a_gpu(tmp_path: Path):
    figure = plots.telemetry(samples(gpu0_busy_pct=99.0, gpu0_sm_mhz=1900), WINDOWS)
    assert [axes.get_ylabel() for axes in figure.axes] == ["busy, %", "power, W", "SM clock, MHz"]
    assert [axes.get_ylabel() for axes in plots.telemetry(samples()[["time", "cpu_busy_pct", "rss_gb"]], WINDOWS).axes] == ["busy, %"]
    figure.savefig(tmp_path / "x.png")
