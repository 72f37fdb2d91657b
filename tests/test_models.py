"""Where a model's name leads, what its config forbids, and the hash of its weights."""
import hashlib
import json
import shutil
import struct

import pytest
from workbook import embedded, engines, hub, models, params, paths, platforms, tokens, weights
from workbook.engines import base
from workbook.errors import BadInput


def exam(**values):
    return params.check({"run": "x"} | values)


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
    one, two, three = (weights.sha256(tmp_path / n) for n in ("one", "two", "three"))
    assert one == two != three
    path = tmp_path / "one" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadInput, match="ends before tensor 'b' does"):
        weights.sha256(tmp_path / "one")


def test_the_embedded_model_is_the_expected_one():
    folder = models.resolve(exam())
    assert models.verified_sha256(exam(), folder) == embedded.WEIGHTS_SHA256
    assert embedded.prepare() == folder


def test_a_damaged_cache_is_said(tmp_path):
    (tmp_path / "m").mkdir()
    safetensors(tmp_path / "m" / "model.safetensors", {"a": b"1"})
    with pytest.raises(BadInput, match="the cache is damaged, delete this folder and it is made again"):
        models.verified_sha256(exam(), tmp_path / "m")


@pytest.mark.parametrize("files, message", [
    ([], "has no config; expected a file config.json in it"), (["config.json"], "has no tokenizer; expected a file tokenizer"),
    (["config.json", "tokenizer.json"], "has no weights; expected a file"),
])
def test_a_folder_that_is_no_model(tmp_path, files, message):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(BadInput, match=message):
        models.resolve(exam(model=str(tmp_path)))


def test_a_name_that_leads_nowhere():
    with pytest.raises(BadInput) as caught:
        models.resolve(exam(model="smollm2-135m"))
    assert str(caught.value) == ("key 'model' is 'smollm2-135m': no such folder; expected 'smollm2-135m-instruct', a local model folder, a hub id "
                                 "owner/name@revision, or one of the shapes megatron-583m, megatron-583m-18x64, qwen2.5-0.5b; "
                                 "did you mean 'smollm2-135m-instruct'?")


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    """Quickly, and with the way out; the address is one where nobody listens."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BadInput) as caught:
        models.resolve(exam(model="nobody/nothing@0123456"))
    assert str(caught.value) == ("key 'model' is 'nobody/nothing@0123456': the hub cannot be reached (ConnectError: [Errno 111] Connection refused); expected a "
                                 "network that reaches huggingface.co, a cache that has it (HF_HOME, HF_HUB_OFFLINE=1), or a local folder: MODEL=/path/to/it")
    with pytest.raises(BadInput, match="data set 'a/b' at 0123: the hub cannot be reached .* or key 'subject_path' with a JSONL on disk"):
        hub.dataset_file("a/b", "0123", "x.parquet")
    with pytest.raises(BadInput, match="expected owner/name@revision"):
        hub.model("a/b/c", "model")


def test_a_download_that_was_cut_off_is_finished(monkeypatch, tmp_path):
    """The hub is asked although the cache has a folder, until it said of a commit that it is whole; where it does not answer, what there is of a
    commit is taken, and of a branch nothing."""
    monkeypatch.setenv("GOLDBOOK_CACHE", str(tmp_path))
    import httpx
    import huggingface_hub
    from huggingface_hub import constants
    asked, commit = [], 40 * "a"

    def download(local_files_only=False, **words):
        asked.append((words["revision"], local_files_only))
        if broken and not local_files_only:
            raise broken
        return str(tmp_path) if not local_files_only else "/half"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with monkeypatch.context() as reached:
        reached.setattr(httpx, "head", lambda *_, **__: None)
        for broken in (ValueError("the server left"), None):
            assert str(hub.model(f"a/b@{commit}", "model")) == ("/half" if broken else str(tmp_path))
        assert str(hub.model(f"a/b@{commit}", "model")) == str(hub.model("a/b@nightly", "model")) == str(tmp_path)
    assert asked == [(commit, False), (commit, True), (commit, False), ("nightly", False)], "once whole, a commit is not asked for again"
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert str(hub.model(f"a/b@{40 * 'b'}", "model")) == "/half"
    with pytest.raises(BadInput, match="the hub cannot be reached"):
        hub.model("a/b@nightly", "model")


def shape_parameters(name):
    """Parameters of a decoder with gated FFN, counted from its config."""
    c = json.loads((models.SHAPES / f"{name}.json").read_text())
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    size = c.get("head_dim", hidden // heads)
    attention = hidden * size * heads * 2 + hidden * size * c["num_key_value_heads"] * 2
    layer = attention + 3 * hidden * c["intermediate_size"] + 2 * hidden
    return c["num_hidden_layers"] * layer + hidden + c["vocab_size"] * hidden * (1 if c["tie_word_embeddings"] else 2)


@pytest.mark.parametrize("name, millions", [("megatron-583m", 583), ("megatron-583m-18x64", 583), ("qwen2.5-0.5b", 494)])
def test_shapes_have_the_size_they_claim(name, millions):
    """Qwen2.5-0.5B is published as 0.49 B; its biases, which are 0.03 M, are not counted here."""
    assert shape_parameters(name) / 1e6 == pytest.approx(millions, abs=1)


def test_a_shape_is_a_folder_with_a_tokenizer_and_no_weights(tmp_path, monkeypatch):
    source = embedded.prepare()
    monkeypatch.setenv("GOLDBOOK_CACHE", str(tmp_path))
    shutil.copytree(source, tmp_path / source.name)
    dummy = exam(model="megatron-583m", weights="dummy")
    folder = models.resolve(dummy)
    assert folder == models.resolve(dummy) and (folder / "tokenizer.json").exists() and not list(folder.glob("*.safetensors"))
    assert models.facts(folder) == models.Facts(heads=16, kv_heads=8, window=4096)
    assert models.verified_sha256(dummy, folder) == "synthetic" and models.window(dummy, folder) == 4096
    assert models.window(exam(engine_args={"max_model_len": 512}), folder) == 512
    assert models.window(exam(engine_args={"max_model_len": -1}), folder) == 4096, "vLLM's own word for as much as fits"
    assert [p.name for p in paths.cache().iterdir() if p.name.startswith(".")] == []
    with pytest.raises(BadInput, match="key 'model' is 'megatron-583m': a shape has no weights; expected weights: dummy"):
        models.resolve(exam(model="megatron-583m"))


@pytest.mark.parametrize("config, args, gpus, read_with", [
    ({"num_local_experts": 8}, {"data_parallel_size": 4}, 4, 4),
    ({"num_local_experts": 8}, {"data_parallel_size": 2, "tensor_parallel_size": 2}, 8, 4),
    ({}, {"data_parallel_size": 4}, 4, None),                          # each replica holds all of a dense model
    ({"num_local_experts": 8}, {"data_parallel_size": 3}, 4, None),    # which does not divide the heads
    ({"num_local_experts": 8}, {"data_parallel_size": 4}, 0, None),    # in the host's memory there is one copy
    ({"num_local_experts": 8}, {"data_parallel_size": 4}, 2, None),    # replicas on other hosts
])
def test_experts_that_replicas_share_are_read_by_their_gpus_together(tmp_path, monkeypatch, config, args, gpus, read_with):
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 16, "num_key_value_heads": 2} | config))
    monkeypatch.setattr(platforms, "gpus", lambda: (platforms.Gpu(0, "G", 1),) * gpus)
    args = args | {"enable_expert_parallel": True, "speculative_config": {"method": "ngram"}}
    found = engines.reader_args(exam(engine="async", engine_args=args), tmp_path)
    assert found == {"enable_expert_parallel": True} | ({"tensor_parallel_size": read_with} if read_with else {})


@pytest.mark.parametrize("args, message", [
    ({"tensor_parallel_size": 2}, "key 'engine_args.tensor_parallel_size' is 2: 'smollm2-135m-instruct' has 9 attention heads; expected a size that divides them"),
    ({"tensor_parallel_size": 9}, None),
    ({"max_model_len": 100_000}, "key 'engine_args.max_model_len' is 100000: 'smollm2-135m-instruct' was made for 8192 tokens; expected at most that"),
    ({"max_model_len": 100_000, "hf_overrides": {}}, None),
    ({"max_model_len": -1}, None),
])
def test_what_the_config_forbids(args, message):
    """The embedded model has 9 heads and 3 key-value heads."""
    asked, found = exam(engine_args=args), models.facts(embedded.prepare())
    if message is None:
        return models.check(asked, found)
    with pytest.raises(BadInput) as caught:
        models.check(asked, found)
    assert str(caught.value) == message


def adapter(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "target_modules": ["q_proj"]} | config))
    safetensors(folder / "adapter_model.safetensors", {"a": b"1"})
    return folder


def test_an_adapter_is_read_from_its_folder(tmp_path):
    asked = exam(engine_args={"lora_modules": {"mine": str(adapter(tmp_path / "mine"))}})
    assert models.adapter(asked) == models.Adapter("mine", tmp_path / "mine", 8, ["q_proj"])
    assert models.adapter(exam()) is None
    folder = embedded.prepare()
    assert models.verified_sha256(asked, folder) != models.verified_sha256(exam(), folder), "the adapter is part of what is under test"
    found = base.engine_args(asked)
    assert (found["enable_lora"], found["max_lora_rank"], found["lora_target_modules"]) == (True, 8, ["q_proj"]) and "lora_modules" not in found


@pytest.mark.parametrize("given, message", [
    ("x", "key 'engine_args.lora_modules' is 'x'; expected one name and its folder, {name: /path}"),
    ({"a": "/no", "b": "/no"}, "key 'engine_args.lora_modules' is {'a': '/no', 'b': '/no'}; expected one name and its folder, {name: /path}"),
    ({"a": "/no"}, "key 'engine_args.lora_modules.a' is '/no': /no has no adapter_config.json that can be read; expected a LoRA adapter's folder"),
])
def test_an_adapter_that_is_none(given, message):
    with pytest.raises(BadInput) as caught:
        models.resolve(exam(engine_args={"lora_modules": given}))
    assert str(caught.value) == message


def test_a_damaged_package_is_refused(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    monkeypatch.setenv("GOLDBOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_packaged_gguf", lambda: tmp_path / "x.gguf")
    with pytest.raises(BadInput, match="damaged or of another version"):
        embedded.prepare()
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(b"not a model").hexdigest())
    with pytest.raises(BadInput, match="cannot be converted"):
        embedded.prepare()
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")] == []


def test_an_unwritable_cache_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GOLDBOOK_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BadInput, match="cannot hold the embedded model .* GOLDBOOK_CACHE names another"):
        embedded.prepare()


@pytest.mark.parametrize("content, said", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", r"model.safetensors: has no header of safetensors, but the pointer of Git LFS to one \(git lfs pull fetches it\)"),
    (b"", "has no header of safetensors in its 0 bytes"), (b"\x04\0\0\0\0\0\0\0oops", "the header is not JSON")])
def test_weights_that_are_none_are_named_before_an_engine_starts(tmp_path, content, said):
    (tmp_path / "model.safetensors").write_bytes(content)
    for read in (weights.check, weights.sha256):
        with pytest.raises(BadInput, match=said):
            read(tmp_path)


def test_a_broken_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BadInput, match="tokenizer.json: is no tokenizer"):
        tokens.Tokenizer(tmp_path)
