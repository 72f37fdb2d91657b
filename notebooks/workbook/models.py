"""Models: where a name leads (embedded, folder, hub, shape), and what its config allows."""
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from workbook import embedded, hub, paths, weights
from workbook.errors import BadInput
from workbook.params import Exam, nearest

SHAPES = Path(__file__).parent / "shapes"
"""Configs without weights, a JSON each: `model: <stem>` with `weights: dummy`."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
SYNTHETIC, UNKNOWN = "synthetic", "unknown"
"""What stands for the hash of weights that are random, and of those behind an endpoint."""
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
"""Keys of a config that say how many experts a mixture has (vLLM's `model_arch_config_convertor.py`)."""


@dataclass(frozen=True)
class Facts:
    """What a config says that an exam can contradict; 0 where it does not say."""
    heads: int
    kv_heads: int
    window: int
    experts: bool = False


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that every request asks for: its folder, its rank rounded up to one that vLLM has, and the
    layers it changes (empty: not said)."""
    name: str
    folder: Path
    rank: int
    targets: list[str]


def resolve(exam: Exam) -> Path:
    """Folder with the exam's model, downloaded or made if need be.

    Raises:
        BadInput: there is no such model, it lacks a config, weights or a tokenizer, or the exam asks of it
            what it cannot do.
    """
    folder = _folder(exam)
    wanted = [("config", "config.json"), ("tokenizer", "tokenizer*"), ("weights", "*.safetensors")]
    for what, pattern in wanted if exam.own_weights else wanted[:2]:
        if not any(folder.glob(pattern)):
            raise BadInput(f"key 'model' is {exam.model!r}: {folder} has no {what}; expected a file {pattern} in it")
    check(exam, facts(folder))
    if exam.own_weights:
        weights.check(folder)
    adapter(exam)
    return folder


def adapter(exam: Exam) -> Adapter | None:
    """The adapter of `engine_args.lora_modules`, or None.

    Raises:
        BadInput: not one name and folder, or the folder is no adapter.
    """
    if (given := exam.engine_args.get("lora_modules")) is None:
        return None
    if not (isinstance(given, dict) and len(given) == 1 and all(isinstance(v, str) for v in given.values())):
        raise BadInput(f"key 'engine_args.lora_modules' is {given!r}; expected one name and its folder, {{name: /path}}")
    ((name, place),) = given.items()
    folder = (paths.ROOT / Path(place).expanduser()).resolve()
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError):
        raise BadInput(f"key 'engine_args.lora_modules.{name}' is {place!r}: {folder} has no adapter_config.json that can be read; expected a LoRA adapter's folder") from None
    targets = config.get("target_modules")
    rank = int(config.get("r", 16))
    return Adapter(str(name), folder, next((size for size in VLLM_RANKS if size >= rank), rank), targets if isinstance(targets, list) else [])


def shapes() -> list[str]:
    """Names of the shapes there are."""
    return sorted(p.stem for p in SHAPES.glob("*.json"))


def facts(folder: Path) -> Facts:
    """Read a folder's config; raises BadInput if it is not JSON."""
    try:
        return facts_of((folder / "config.json").read_text())
    except ValueError as error:
        raise BadInput(f"{folder / 'config.json'}: no JSON object ({error}); expected a model's config") from None


def facts_of(text: str) -> Facts:
    """What a config says; a model of several parts (text and images) counts as its text part."""
    config = json.loads(text)
    if not isinstance(config, dict):
        raise ValueError(f"holds a {type(config).__name__}")
    config = config | (config.get("text_config") or {})
    heads = config.get("num_attention_heads") or config.get("n_head") or 0
    return Facts(heads, config.get("num_key_value_heads") or heads, config.get("max_position_embeddings") or config.get("n_positions") or 0,
                 any(isinstance(count := config.get(name), int) and count > 1 for name in EXPERTS))


def window(exam: Exam, folder: Path) -> int:
    """The most tokens a sequence may have, prompt and answer together; 0 where neither exam nor config says."""
    asked = exam.engine_args.get("max_model_len")
    # vLLM's -1 is as much as fits into memory: at most the model's own, and known once the engine is there.
    return asked if isinstance(asked, int) and asked != -1 else facts(folder).window


def check(exam: Exam, found: Facts) -> None:
    """Raise BadInput where the engine's arguments contradict the model."""
    parallel = exam.engine_args.get("tensor_parallel_size", 1)
    if isinstance(parallel, int) and parallel > 1 and (heads := undivided(found, parallel)):
        raise BadInput(f"key 'engine_args.tensor_parallel_size' is {parallel}: '{exam.model}' has {heads}; expected a size that divides them")
    longest = exam.engine_args.get("max_model_len")
    if isinstance(longest, int) and found.window and longest > found.window and "hf_overrides" not in exam.engine_args:
        raise BadInput(f"key 'engine_args.max_model_len' is {longest}: '{exam.model}' was made for {found.window} tokens; expected at most that")


def undivided(found: Facts, parallel: int) -> str:
    """The heads that tensor parallel of this size does not divide; empty if it divides them all."""
    if found.heads % parallel:
        return f"{found.heads} attention heads"
    # Fewer key-value heads than workers are copied to several of them.
    return f"{found.kv_heads} key-value heads" if found.kv_heads % parallel and parallel % found.kv_heads else ""


def verified_sha256(exam: Exam, folder: Path) -> str:
    """Hash of the exam's weights, with its adapter's where it has one; else `SYNTHETIC` or `UNKNOWN`.

    Raises:
        BadInput: they are the embedded model's, and not what was unpacked.
    """
    if not exam.own_weights:
        return SYNTHETIC if exam.weights == "dummy" else UNKNOWN
    found = weights.sha256(folder)
    if exam.model == embedded.NAME and found != embedded.WEIGHTS_SHA256:
        raise BadInput(f"{folder}: the embedded model's weights have SHA-256 {found[:12]}...; expected {embedded.WEIGHTS_SHA256[:12]}...: "
                       "the cache is damaged, delete this folder and it is made again")
    if added := adapter(exam):
        return hashlib.sha256(f"{found} {weights.sha256(added.folder)}".encode()).hexdigest()
    return found


def _folder(exam: Exam) -> Path:
    name = exam.model
    if name == embedded.NAME:
        return embedded.prepare()
    if name in shapes():
        if exam.weights != "dummy":
            raise BadInput(f"key 'model' is {name!r}: a shape has no weights; expected weights: dummy")
        return _shape_folder(name)
    local = (paths.ROOT / Path(name).expanduser()).resolve()
    if local.is_dir():
        return local
    if name.count("/") == 1 and not name.startswith((".", "~", "/")):
        return hub.model(name, "model")
    known = [embedded.NAME, *shapes()]
    raise BadInput(f"key 'model' is {name!r}: no such folder; expected '{embedded.NAME}', a local model folder, a hub id owner/name@revision, "
                   f"or one of the shapes {', '.join(shapes())}{nearest(name, known)}")


def _shape_folder(name: str) -> Path:
    """A shape as a folder that vLLM takes: its config with the embedded model's tokenizer.

    Text has to become tokens somehow, and which ids they are does not change the speed of random weights.
    """
    text = (SHAPES / f"{name}.json").read_text()
    folder = paths.cache() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        source = embedded.prepare()
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
        for path in source.iterdir():
            if path.name.startswith(("tokenizer", "chat_template", "special_tokens")):
                shutil.copy(path, scratch)
        (scratch / "config.json").write_text(text)
        scratch.chmod(0o755)
        try:
            os.rename(scratch, folder)
        except OSError:  # another process was faster
            shutil.rmtree(scratch)
    return folder
