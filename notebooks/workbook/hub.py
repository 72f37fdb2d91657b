"""The Hugging Face hub: models and data sets at a pinned revision, into its own cache."""
import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workbook import files, paths
from workbook.errors import BadInput

MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
TIMEOUT_S = 10
COMMIT = re.compile(r"[0-9a-f]{40}")
"""A revision that is one for ever; a branch or tag is what the hub says today."""


def model(name: str, key: str) -> Path:
    """Folder of a model of the hub, downloaded unless it is there. A download that was cut off leaves a folder that looks like a whole one: a
    commit whose download came to its end here is known by a note in the cache, and any other is asked for again.

    Args:
        name: `owner/name@revision`; without a revision, `main` as it is today.
        key: the parameter that asks for it, for messages.

    Raises:
        BadInput: the hub cannot be reached, or has no such model or revision.
    """
    from huggingface_hub import snapshot_download
    repo, _, revision = name.partition("@")
    note = paths.cache() / "hub" / f"{repo.replace('/', '--')}@{revision}.txt" if COMMIT.fullmatch(revision) else None
    if note and note.exists() and (folder := Path(note.read_text().strip())).is_dir():
        return folder
    folder, whole = _fetch(snapshot_download, f"key '{key}' is {name!r}", "a model's", f'a local folder: {key.upper()}=/path/to/it',
                           repo_id=repo, revision=revision or None, allow_patterns=MODEL_FILES, etag_timeout=TIMEOUT_S)
    if note and whole:
        files.write_text(note, folder)
    return Path(folder)


def dataset_file(repo: str, revision: str, name: str) -> Path:
    """One file of a data set of the hub, downloaded unless it is there (a file is whole or not there); raises as `model`."""
    from huggingface_hub import errors, hf_hub_download
    if COMMIT.fullmatch(revision):
        with contextlib.suppress(errors.LocalEntryNotFoundError):
            return Path(hf_hub_download(repo, name, repo_type="dataset", revision=revision, local_files_only=True))
    found, _ = _fetch(hf_hub_download, f"data set '{repo}' at {revision[:12]}", "a data set's", "key 'subject_path' with a JSONL on disk",
                      repo_id=repo, revision=revision, filename=name, repo_type="dataset", etag_timeout=TIMEOUT_S)
    return Path(found)


def _fetch(download: Callable, what: str, whose: str, way_out: str, **words: Any) -> tuple[str, bool]:
    """Call a download; where the hub does not give it, what is in the cache under a commit is used. Returns the place, and whether the
    hub said that it is whole."""
    import httpx
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import validate_repo_id
    try:
        validate_repo_id(words["repo_id"])
        if not constants.HF_HUB_OFFLINE:
            # One question without the library's retries: where there is no network they take half a minute.
            httpx.head(constants.ENDPOINT, timeout=TIMEOUT_S)
        return download(**words), not constants.HF_HUB_OFFLINE
    except errors.HFValidationError as error:
        raise BadInput(f"{what}: {error}; expected owner/name@revision") from None
    except Exception as error:  # of its client's library, which is not the same in all its versions
        if COMMIT.fullmatch(words["revision"] or ""):
            with contextlib.suppress(errors.LocalEntryNotFoundError):
                return download(local_files_only=True, **words), False
        if isinstance(error, errors.RepositoryNotFoundError):
            raise BadInput(f"{what}: the hub has no such repository, or wants a token for it (HF_TOKEN); expected {whose} name there, or {way_out}") from None
        if isinstance(error, errors.RevisionNotFoundError):
            raise BadInput(f"{what}: the hub has no such revision; expected a commit, tag or branch of it") from None
        cause = error.__cause__ or error
        raise BadInput(f"{what}: the hub cannot be reached ({type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else 'no reason given'}); "
                       f"expected a network that reaches huggingface.co, a cache that has it (HF_HOME, HF_HUB_OFFLINE=1), or {way_out}") from None
