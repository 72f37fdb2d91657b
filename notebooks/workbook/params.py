"""An exam's parameters: the schema, and the sentence a wrong one gets."""
import difflib
import hashlib
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from workbook.errors import BadInput

WORK_KEYS = ("subject", "subject_args", "num_prompts", "repeat_prompts", "prompt_suffix", "chat_template", "input_len", "output_len",
             "weights", "engine", "replicas", "n", "temperature", "top_p", "top_k", "max_tokens", "ignore_eos", "seed", "load", "concurrency", "request_rate", "burstiness", "slo")
"""The keys that define the work. A golden is comparable only where all of them are equal; the model, the engine's arguments and the environment are under test."""
OWN_LENGTHS = NO_GOLD = ("sharegpt", "random")
"""Subjects that say how long each answer is, and those without right answers."""
FROM_FILE = ("gsm8k", "jsonl", "sharegpt")
"""Subjects that can be read from a file of the user's."""
REQUESTS_OF_P99 = 1000
"""A 99th percentile of fewer is one or two requests, and gates nothing."""
CEILINGS = {"empty": 0.1, "cut_off": 0.9, "loop": 0.5, "one_token": 0.1, "invalid_utf8": 0.1, "special_tokens": 0.1, "identical": 0.9}
"""Rates of `degeneration` above which a run is INVALID. Of 160 answers to `smoke` SmolLM2-135M cuts off 17 % and has none of the others; with random weights
or at temperature 5 it is 100 % cut off and 24 to 28 % broken bytes, random and greedy 63 % in a loop, and samples drawn greedily are identical in 100 % of the
questions (tests/bench/degenerate_rates.py). A greedy base model may loop in more than half of its long answers (73 % of GPT-2's, Holtzman et al. 2020): such an exam says so in `ceilings`."""


class Section(BaseModel):
    """Strict: no unknown keys, and no silent conversion of one type to another."""
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Requires(Section):
    """What a machine must have for the exam to run there."""
    device: Literal["any", "cpu", "gpu"] = "any"
    gpus: Annotated[int, Field(ge=0)] = 0


class Slo(Section):
    """Limits within which a request counts as good, milliseconds; 0: no limit."""
    ttft_ms: Annotated[float, Field(ge=0)] = 0.0
    tpot_ms: Annotated[float, Field(ge=0)] = 0.0
    e2e_ms: Annotated[float, Field(ge=0)] = 0.0


class Gate(Section):
    """How much worse a metric may get; fractions, so 0.05 is 5 %. `rule` interval: with `delta` and `margin`, by the
    samples' own noise; band: the median between `low` and `high` times the golden's, as Megatron-LM does it."""
    rule: Literal["interval", "band"] = "interval"
    delta: Annotated[float, Field(gt=0, lt=1)] = 0.05
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.03
    low: Annotated[float, Field(gt=0, le=1)] = 0.9
    high: Annotated[float, Field(gt=1)] = 1.2

    @model_validator(mode="after")
    def _of_the_rule(self):
        for name in {"low", "high"} if self.rule == "interval" else {"delta", "margin"}:
            if getattr(self, name) != type(self).model_fields[name].default:  # a run's record has them all
                other = "delta and margin, or rule: band" if self.rule == "interval" else "low and high, or rule: interval"
                raise ValueError(f"key 'gates' has {name}: {getattr(self, name)} with rule: {self.rule}; expected {other}")
        return self


class Exam(Section):
    """One run's parameters; `description` is the help text shown for each key."""
    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]*$", description="name of the run: the params file's stem, and `@variant` where it has variants")]
    title: str = Field("", description="one line for the report")
    subject: Literal["chain_sum", "gsm_symbolic", "gsm8k", "sharegpt", "random", "jsonl"] = Field("chain_sum", description="where the prompts come from")
    subject_path: str = Field("", description="file of prompts: jsonl, gsm8k or sharegpt from disk; relative to the checkout")
    subject_args: dict[str, Any] = Field({}, description="options of the subject")
    num_prompts: int = Field(32, ge=1, description="distinct prompts")
    repeat_prompts: bool = Field(False, description="where the subject has fewer, ask them again in the same order")
    prompt_suffix: str = Field("", description="text added to every prompt")
    chat_template: bool = Field(True, description="wrap prompts in the model's chat template; false: plain text")
    input_len: int = Field(0, ge=0, description="tokens of a prompt (subject random)")
    output_len: int = Field(0, ge=0, description="tokens of an answer (subject random, with max_tokens 0)")
    model: str = Field("smollm2-135m-instruct", min_length=1, description="the embedded model, a local folder, a hub id (owner/name@revision), or a shape of workbook/shapes")
    weights: Literal["auto", "dummy"] = Field("auto", description="dummy: random weights, speed only; every gate of quality is off")
    weights_sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$", description="expected hash of the weights; empty: not asserted")
    engine: Literal["offline", "async", "server", "endpoint"] = Field("offline", description="how vLLM is driven: vllm.LLM; AsyncLLM, which can run data parallel; servers started for the run; or any OpenAI-compatible server that runs already")
    endpoint: str = Field("", description="URL of the server (engine endpoint), without a user name, password or query; its API key comes from the environment variable OPENAI_API_KEY")
    replicas: int = Field(1, ge=1, description="servers side by side (engine server), on GPUs of their own where the exam requires enough (or there are enough, where it names no number), else on the same")
    engine_args: dict[str, Any] = Field({}, description="passed to vLLM's engine as they are; lora_modules: {name: folder} puts an adapter on every request")
    env: dict[str, str] = Field({}, description="environment variables of the engine")
    n: int = Field(1, ge=1, description="samples of each prompt, each a request of its own")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
    top_k: int = Field(0, ge=0, description="0: no limit")
    max_tokens: int = Field(64, ge=0, description="upper limit of an answer; 0: the subject's own lengths (sharegpt, random)")
    ignore_eos: bool = Field(False, description="generate to the limit: speed exams")
    seed: int = Field(0, ge=0, description="seed of the prompts and of the sampling")
    load: Literal["batch", "closed", "poisson", "gamma", "burst"] = Field("batch", description="how requests arrive: all at once; so many always under way; at a rate; or so many at a time (those of a batch, and the first of a closed loop, find their connections to a server open)")
    concurrency: list[Annotated[int, Field(ge=1)]] = Field([], description="one size or several, measured one after the other (a sweep). batch: sizes of the batches, the last with every request (empty: only that); closed: requests under way; burst: requests in a burst")
    request_rate: float = Field(0.0, ge=0, description="requests a second, on average (loads poisson, gamma, burst)")
    burstiness: float = Field(1.0, ge=0.05, description="shape of the gaps (load gamma): 1 is Poisson, less is burstier, more is more even")
    repetitions: int = Field(3, ge=1, description="measured repetitions of the load in a session")
    warmup: int | Literal["auto"] = Field("auto", description="unmeasured passes first: so many, or `auto`: until the output tok/s of two in a row agree within 2 %, at most 5")
    scorers: list[Literal["numeric", "verl_strict", "verl_flexible", "lm_eval_strict", "lm_eval_flexible"]] = Field([], description="how answers are judged; the first one counts, the others are shown beside it")
    ceilings: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field({}, description="share of the answers above which a run is INVALID, where it is not the default's: " + ", ".join(f"`{name}` {share:g}" for name, share in CEILINGS.items()))
    slo: Slo = Field(Slo(), description="limits of a good request, for goodput: `ttft_ms`, `tpot_ms`, `e2e_ms`; 0: none")
    gates: dict[str, Gate] = Field({}, description="metric (`metric@point` in a sweep): how much worse it may get")
    requires: Requires = Field(Requires(), description="what the machine must have; `device` any, cpu or gpu, `gpus` at least")
    timeout_s: int = Field(1800, ge=1, description="limit of one notebook, seconds")
    variants: dict[str, dict[str, Any]] = Field({}, description="name: keys that differ; makes one file into the runs `<run>@<name>`")

    @field_validator("concurrency", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("warmup", mode="before")
    @classmethod
    def _passes(cls, value: Any) -> Any:
        if value == "auto" or isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        raise ValueError(f"key 'warmup' is {value!r}; expected auto, or a whole number of at least 0")

    @model_validator(mode="after")
    def _possible(self):
        if self.variants:
            runs = ", ".join(f"{self.run}@{name}" for name in self.variants)
            raise ValueError(f"key 'variants' makes this file into several runs; expected the flat parameters of one of {runs} (python -m workbook params RUN prints them)")
        for problem in (*self._subject_problems(), *self._engine_problems(), *self._load_problems(), *self._gate_problems()):
            raise ValueError(problem)
        return self

    def _subject_problems(self):
        if self.subject == "random":
            for key in ("input_len", "output_len"):
                if not getattr(self, key):
                    yield f"key '{key}' is 0: subject 'random' is made to length; expected 1 or more"
            if self.max_tokens not in (0, self.output_len):
                yield f"key 'max_tokens' is {self.max_tokens} and key 'output_len' is {self.output_len}: subject 'random' is made to length; expected max_tokens: 0"
            if self.chat_template or self.prompt_suffix:
                key, value, expected = ("chat_template", "true", "false") if self.chat_template else ("prompt_suffix", repr(self.prompt_suffix), "''")
                yield f"key '{key}' is {value}: subject 'random' is token ids, not text; expected {expected}"
        elif self.input_len or self.output_len:
            key = "input_len" if self.input_len else "output_len"
            yield f"key '{key}' is {getattr(self, key)}: subject '{self.subject}' has lengths of its own; expected 0, or subject 'random'"
        if self.subject == "jsonl" and not self.subject_path:
            yield "key 'subject_path' is empty: subject 'jsonl' is read from a file; expected its path"
        if self.subject_path and self.subject not in FROM_FILE:
            yield f"key 'subject_path' is {self.subject_path!r}: subject '{self.subject}' is generated; expected '', or one of the subjects {', '.join(FROM_FILE)}"
        if self.max_tokens == 0 and self.subject not in OWN_LENGTHS:
            yield f"key 'max_tokens' is 0: subject '{self.subject}' has no answer lengths of its own; expected 1 or more"
        if self.scorers and self.subject in NO_GOLD:
            yield f"key 'scorers' is {self.scorers}: subject '{self.subject}' has no right answers; expected []"
        if self.temperature == 0 and self.n > 1:
            yield f"key 'n' is {self.n}: temperature 0 gives the same answer every time; expected n = 1 or a temperature above 0"
        if self.temperature == 0 and self.repeat_prompts and self.scorers:
            yield f"key 'repeat_prompts' is true: at temperature 0 repeated questions get repeated answers, which are no more evidence; expected false, or scorers: [] instead of {self.scorers}"

    def _engine_problems(self):
        parallel = self.engine_args.get("data_parallel_size", 1)
        if self.engine == "offline" and parallel != 1:
            yield f"key 'engine_args.data_parallel_size' is {parallel!r}: the offline engine is one replica; expected 1, or engine: async"
        if self.engine_args.get("load_format") == "dummy":
            yield "key 'engine_args.load_format' is 'dummy', behind the report's back; expected the key weights: dummy"
        if self.weights == "dummy" and self.weights_sha256:
            yield "key 'weights_sha256' is set: with weights: dummy there is nothing to assert; expected ''"
        if self.engine == "endpoint" and not self.endpoint:
            yield "key 'endpoint' is empty: engine 'endpoint' is a server that runs already; expected its URL"
        # Whatever is in it is kept in run.json and printed in the report, and so is what is wrong with it: the value is not repeated.
        if "@" in self.endpoint or "?" in self.endpoint:
            yield ("key 'endpoint' has a user name, a password or a query: the report shows it to everybody; "
                   "expected scheme, host, port and path alone, the key being in the environment variable OPENAI_API_KEY")
        elif self.endpoint and self.engine != "endpoint":
            yield f"key 'endpoint' is {self.endpoint!r}: engine '{self.engine}' is started for the run; expected '', or engine: endpoint"
        if self.engine == "endpoint" and self.weights_sha256:
            yield "key 'weights_sha256' is set: an endpoint does not show its weights; expected ''"
        if "CUDA_VISIBLE_DEVICES" in self.env:
            yield (f"key 'env' has CUDA_VISIBLE_DEVICES: {self.env['CUDA_VISIBLE_DEVICES']!r}, of which what watches the GPUs would not know; "
                   "expected it in the environment of make, or of Jupyter")
        if self.engine == "offline" and self.engine_args.get("disable_log_stats"):
            yield "key 'engine_args.disable_log_stats' is true: the offline engine then keeps no times of its requests; expected false"
        if isinstance(drafts := self.engine_args.get("speculative_config"), dict) and drafts.get("method") == "suffix" and drafts.get("suffix_decoding_max_cached_requests") != 0:
            yield "key 'engine_args.speculative_config.method' is 'suffix', which drafts from earlier answers: a pass would be fed by the one before; expected suffix_decoding_max_cached_requests: 0 beside it"
        if self.replicas > 1 and self.engine != "server":
            yield f"key 'replicas' is {self.replicas}: only servers run side by side; expected 1, or engine: server"
        if self.requires.device == "cpu" and self.requires.gpus:
            yield f"key 'requires.gpus' is {self.requires.gpus}: the exam requires the device 'cpu'; expected 0"

    def _load_problems(self):
        total, sizes = self.num_prompts * self.n, self.concurrency
        if self.load != "batch" and self.engine == "offline":
            yield f"key 'load' is '{self.load}': the offline engine takes all requests at once; expected batch, or engine: async, server or endpoint"
        if sizes != sorted(set(sizes)):
            yield f"key 'concurrency' is {sizes}; expected different sizes, ascending"
        if self.load == "batch" and sizes and sizes[-1] != total:
            yield f"key 'concurrency' ends with {sizes[-1]}: a batch asks that many of the {total} requests (num_prompts x n) at once; expected the last to be {total}"
        if self.load == "closed" and not sizes:
            yield "key 'concurrency' is empty: a closed loop keeps so many requests under way; expected one size or several"
        if self.load == "burst" and len(sizes) != 1:
            yield f"key 'concurrency' is {sizes}: a burst has one size; expected one"
        if self.load in ("poisson", "gamma") and sizes:
            yield f"key 'concurrency' is {sizes}: requests of load '{self.load}' come at a rate, however many are under way; expected []"
        if self.load in ("closed", "burst") and sizes and sizes[-1] > total:
            yield f"key 'concurrency' ends with {sizes[-1]}: there are {total} requests (num_prompts x n), so that many are never under way; expected at most {total}"
        window = self.engine_args.get("max_model_len")
        if isinstance(window, int) and 0 < window <= self.max_tokens and self.engine != "endpoint":  # -1: as much as fits
            yield f"key 'max_tokens' is {self.max_tokens}, and engine_args.max_model_len, which a prompt and its answer share, is {window}; expected max_tokens below it"
        if self.open_loop and not self.request_rate:
            yield f"key 'request_rate' is 0: load '{self.load}' sends by the clock; expected more than 0, requests a second"
        if self.request_rate and not self.open_loop:
            yield f"key 'request_rate' is {self.request_rate:g}: load '{self.load}' has no rate; expected 0, or load: poisson, gamma or burst"

    def _gate_problems(self):
        for name in self.ceilings:
            if name not in CEILINGS:
                yield f"key 'ceilings' names the rate '{name}'; expected one of {', '.join(CEILINGS)}{nearest(name, list(CEILINGS))}"
        if self.gates:
            from workbook import gates  # here: it brings pandas, which reading another params file must not wait for
            yield from gates.problems(self)

    @property
    def points(self) -> list[int]:
        """The points of a sweep; empty where the exam is none."""
        return self.concurrency if self.load in ("batch", "closed") else []

    @property
    def requests_a_repetition(self) -> int:
        """Requests of one repetition, over all points of a sweep."""
        if self.load == "closed":
            return len(self.points) * self.num_prompts * self.n
        return sum(self.points) or self.num_prompts * self.n

    @property
    def open_loop(self) -> bool:
        """Whether requests are sent by the clock, however many are under way."""
        return self.load in ("poisson", "gamma", "burst")

    @property
    def free_to_stop(self) -> bool:
        """Whether real weights end their answers where they like, so that what these look like says something."""
        return self.weights == "auto" and not self.ignore_eos

    @property
    def own_weights(self) -> bool:
        """Whether the weights are real and here to be read: not synthetic, nor behind somebody's endpoint."""
        return self.weights == "auto" and self.engine != "endpoint"

    @property
    def scored(self) -> bool:
        """Whether answers are judged: synthetic weights have none worth it."""
        return bool(self.scorers) and self.weights == "auto"

    @property
    def work(self) -> dict[str, Any]:
        """The keys that define the work (`WORK_KEYS`), those that are not at their default: one that is added later changes no hash where it is not used."""
        return self.model_dump(include=set(WORK_KEYS), exclude_defaults=True)

    def work_hash(self) -> str:
        """SHA-256 of the `work`."""
        return hashlib.sha256(json.dumps(self.work, sort_keys=True).encode()).hexdigest()


SECTIONS = {"requires": Requires, "slo": Slo, "gates": Gate}


@dataclass(frozen=True)
class Place:
    """Where a value was written, and how: `raw` is a YAML scalar as it stands in the file, without quotes."""
    where: str
    raw: str | None = None


def check(values: dict[str, Any], source: str = "parameters", places: Mapping[tuple[str, ...], Place] | None = None) -> Exam:
    """Turn raw values into an `Exam`.

    Args:
        values: parameters by name; a notebook passes `globals()`, of which only plain values count.
        source: what to call the origin in a message, usually the file.
        places: where each value was written, by its path of keys.

    Raises:
        BadInput: names the key, the value and what is expected.
    """
    given = {k: v for k, v in values.items() if _is_parameter(k, v)}
    try:
        return Exam(**given)
    except ValidationError as error:
        raise BadInput("; ".join(_sentence(source, e, places or {}) for e in error.errors())) from None


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def _is_parameter(name: str, value: Any) -> bool:
    """A notebook's namespace also holds modules, functions and IPython's own names."""
    return not (name.startswith("_") or name in ("In", "Out", "exit", "quit", "open", "get_ipython") or callable(value) or isinstance(value, types.ModuleType))


EXPECTED = {
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number", "finite_number": "a finite number", "bool_type": "true or false",
    "string_type": "text", "list_type": "a list", "dict_type": "a mapping of keys to values", "model_type": "a mapping of keys to values",
    "greater_than_equal": "at least {ge}", "greater_than": "more than {gt}", "less_than_equal": "at most {le}", "less_than": "less than {lt}",
    "string_too_short": "a text that is not empty", "string_pattern_mismatch": "a text of the form {pattern}", "literal_error": "{expected}",
}
"""What pydantic's kinds of error expect, in words."""
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a mapping", type(None): "nothing"}


def _sentence(source: str, error: dict, places: Mapping[tuple[str, ...], Place]) -> str:
    loc = tuple(str(part) for part in error["loc"])
    place = places.get(loc) or Place(next((p.where for path, p in places.items() if loc and path[:len(loc)] == loc), source))
    key, value = ".".join(loc), error["input"]
    if error["type"] == "extra_forbidden":
        known = list((SECTIONS.get(loc[0], Exam) if len(loc) > 1 else Exam).model_fields)
        return f"{place.where}: unknown key '{key}' (value {value!r}){nearest(loc[-1], known)}"
    if error["type"] == "missing":
        return f"{source}: key '{key}' is missing; expected the {Exam.model_fields[key].description}"
    if error["type"] == "value_error":
        return f"{place.where}: {error['ctx']['error']}"
    expected = EXPECTED.get(error["type"], error["msg"]).format(**error.get("ctx", {}))
    hint = nearest(str(value), [word.strip("'") for word in error["ctx"]["expected"].replace(" or ", ", ").split(", ")]) if error["type"] == "literal_error" else ""
    mistyped = error["type"].endswith("_type") or error["type"] == "int_from_float"
    if place.raw and mistyped and not isinstance(value, str):
        quoted = f': write "{place.raw}"' if expected == "text" else ""
        return f"{place.where}: key '{key}' is {place.raw}, which YAML reads as {_read_as(value)}; expected {expected}{quoted}{hint}"
    return f"{place.where}: key '{key}' is {value!r}{f' ({KINDS.get(type(value), type(value).__name__)})' if mistyped else ''}; expected {expected}{hint}"


def _read_as(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"the number {value}" if isinstance(value, int | float) else KINDS.get(type(value), f"a {type(value).__name__}")
