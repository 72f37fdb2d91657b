"""An exam's parameters: the schema, and the sentence a wrong one gets."""
import difflib
import hashlib
import json
import shlex
import types
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from workbook import paths
from workbook.errors import BadInput

WORK_KEYS = ("subject", "subject_args", "num_prompts", "prompt_suffix", "chat_template", "engine", "n",
             "temperature", "top_p", "top_k", "max_tokens", "ignore_eos", "seed", "load")
"""The keys that define the work. A golden is comparable only where all of them are equal; the model, the
engine's arguments and the environment are what is under test, and so are not among them."""


class Section(BaseModel):
    """Strict: no unknown keys, and no silent conversion of one type to another."""
    model_config = ConfigDict(extra="forbid", strict=True)


class Requires(Section):
    """What a machine must have for the exam to run there."""
    device: Literal["any", "cpu", "gpu"] = "any"
    gpus: Annotated[int, Field(ge=0)] = 0


class Gate(Section):
    """How much worse a metric may get; fractions, so 0.05 is 5 %."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 0.05
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.03


class Exam(Section):
    """One run's parameters; `description` is the help text shown for each key."""
    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]*$", description="name of the run: the params file's stem")]
    title: str = Field("", description="one line for the report")
    subject: Literal["chain_sum", "sharegpt"] = Field("chain_sum", description="where the prompts come from")
    subject_args: dict[str, Any] = Field({}, description="options of the subject")
    num_prompts: int = Field(32, ge=1, description="distinct prompts")
    prompt_suffix: str = Field("", description="text added to every prompt")
    chat_template: bool = Field(True, description="wrap prompts in the model's chat template")
    model: str = Field("smollm2-135m-instruct", min_length=1, description="the embedded model or a local folder")
    weights_sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$", description="expected hash of the weights; empty: not asserted")
    engine: Literal["offline"] = Field("offline", description="how vLLM is driven")
    engine_args: dict[str, Any] = Field({}, description="passed to vLLM's engine as they are")
    env: dict[str, str] = Field({}, description="environment variables of the engine")
    n: int = Field(1, ge=1, description="samples of each prompt, each a request of its own")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
    top_k: int = Field(0, ge=0, description="0: no limit")
    max_tokens: int = Field(64, ge=0, description="upper limit of an answer; 0: the subject's own lengths (sharegpt)")
    ignore_eos: bool = Field(False, description="generate to the limit: speed exams")
    seed: int = Field(0, ge=0, description="seed of the prompts and of the sampling")
    load: Literal["batch"] = Field("batch", description="how requests arrive")
    repetitions: int = Field(3, ge=1, description="measured repetitions of the load in a session")
    warmup: int = Field(1, ge=0, description="unmeasured repetitions first")
    scorers: list[Literal["numeric"]] = Field([], description="how answers are judged")
    gates: dict[str, Gate] = Field({}, description="metric: how much worse it may get")
    requires: Requires = Field(Requires(), description="what the machine must have")
    timeout_s: int = Field(1800, ge=1, description="limit of one notebook, seconds")

    @model_validator(mode="after")
    def _possible(self):
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"key 'n' is {self.n}: temperature 0 gives the same answer every time; expected n = 1 or a temperature above 0")
        if self.max_tokens == 0 and self.subject != "sharegpt":
            raise ValueError(f"key 'max_tokens' is 0: subject '{self.subject}' has no answer lengths of its own; expected 1 or more")
        # Imported here: the metrics bring pandas, which reading a params file must not wait for.
        from workbook.metrics import METRICS
        for name in self.gates:
            if name not in METRICS:
                raise ValueError(f"key 'gates' names the metric '{name}'; expected one that is measured{_nearest(name, list(METRICS))}")
        if self.requires.device == "cpu" and self.requires.gpus:
            raise ValueError(f"key 'requires.gpus' is {self.requires.gpus}: the exam requires the device 'cpu'; expected 0")
        return self

    def work_hash(self) -> str:
        """SHA-256 of the keys that define the work (`WORK_KEYS`)."""
        work = self.model_dump(include=set(WORK_KEYS))
        return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()


def check(values: dict[str, Any], source: str = "parameters") -> Exam:
    """Turn raw values into an `Exam`.

    Args:
        values: parameters by name; a notebook passes `globals()`, of which only plain values count.
        source: what to call the origin in a message, usually the file.

    Raises:
        BadInput: names the key, the value and what is expected.
    """
    given = {k: v for k, v in values.items() if _is_parameter(k, v)}
    try:
        return Exam(**{k: _as_float(k, v) for k, v in given.items()})
    except ValidationError as error:
        raise BadInput("; ".join(_sentence(source, e) for e in error.errors())) from None


def load(run: str, overrides: dict[str, Any] | None = None) -> Exam:
    """Read `params/<run>.yaml`, apply the overrides and check the result.

    Raises:
        BadInput: no such file, not YAML, not a mapping, `run` is not the stem, or as `check`.
    """
    path = paths.params() / f"{run}.yaml"
    if not path.is_file():
        raise BadInput(f"params/{run}.yaml: no such run; expected one of {', '.join(names()) or 'none'}{_nearest(run, names())}")
    source = f"params/{path.name}"
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise BadInput(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise BadInput(f"{source}: holds a {type(values).__name__}; expected 'key: value' lines")
    exam = check({str(k): v for k, v in (values | (overrides or {})).items()}, source)
    if exam.run != path.stem:
        raise BadInput(f"{source}: key 'run' is {exam.run!r}; expected the file's stem, {path.stem!r}")
    return exam


def names() -> list[str]:
    """The runs that have a params file, sorted."""
    return sorted(p.stem for p in Path(paths.params()).glob("*.yaml"))


def parse_set(text: str) -> dict[str, Any]:
    """Parse `SET="n=8 max_tokens=64"`: key=value words as in a shell, each value read as YAML.

    Raises:
        BadInput: a word without `=`, or a value that is not YAML (a value with spaces wants quotes).
    """
    overrides = {}
    try:
        for word in shlex.split(text):
            key, equals, value = word.partition("=")
            if not (key and equals):
                raise BadInput(f"SET: {word!r} is not an override; expected key=value")
            overrides[key] = yaml.safe_load(value) if value else ""
    except (yaml.YAMLError, ValueError) as error:
        raise BadInput(f"SET: {text!r} cannot be read ({' '.join(str(error).split())}); expected key=value words, values with spaces quoted") from None
    return overrides


def _is_parameter(name: str, value: Any) -> bool:
    """A notebook's namespace also holds modules, functions and IPython's own names."""
    return not (name.startswith("_") or name in ("In", "Out", "exit", "quit", "open", "get_ipython")
                or callable(value) or isinstance(value, types.ModuleType))


def _as_float(key: str, value: Any) -> Any:
    """An integer is a fine number of a fraction's key; a text or a bool is not."""
    field = Exam.model_fields.get(key)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if field is not None and field.annotation is float and whole else value


def _sentence(source: str, error: dict) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = list(Exam.model_fields) if len(error["loc"]) == 1 else []
        return f"{source}: unknown key '{key}' (value {error['input']!r}){_nearest(key, known)}"
    if error["type"] == "missing":
        return f"{source}: key '{key}' is missing; {Exam.model_fields[key].description}"
    if error["type"] == "value_error":
        return f"{source}: {error['ctx']['error']}"
    expected = error["msg"].replace("Input should be", "expected").replace("String should", "expected to")
    return f"{source}: key '{key}' is {error['input']!r} ({type(error['input']).__name__}); {expected}"


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
