"""Exams as files: params/*.yaml, their variants, and what overrides them."""
import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from workbook import files, params, paths
from workbook.errors import BadInput
from workbook.nested import KeyPath
from workbook.params import Exam, Place, nearest

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where PyYAML has it, as its wheels do: each variant of a file reads it once more, and all exams together take a third less time than with the parser in Python."""
VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
BARE_NUMBER = re.compile(r"[-+]?(\d[\d_]*)?\.?\d*[eE][-+]?\d+")
"""What a person means as a number and YAML 1.1 reads as text, where the dot or the exponent's sign is missing."""
BASE_8_OR_60 = re.compile(r"[-+]?(0[0-7_]+|\d[\d_]*(:\d+)+)")
"""What YAML 1.1 reads as a whole number to the base of 8 or 60."""


@dataclass(frozen=True)
class Written:
    """Values by key, and where each was written by its path of keys (the leaves of nested mappings too)."""
    values: dict[str, Any]
    places: dict[KeyPath, Place]

    def __str__(self) -> str:
        """As SET has it: `n=8 engine_args.max_num_seqs=64`."""
        def words(values: dict[str, Any], before: str = "") -> Iterator[str]:
            for key, value in values.items():
                if isinstance(value, dict) and value:
                    yield from words(value, f"{before}{key}.")
                else:
                    yield f"{before}{key}={'null' if value is None else value}"
        return " ".join(words(self.values))

    def over(self, other: "Written", keep: bool = False) -> "Written":
        """Both; where both have a key this one's value stands. Mappings are joined key by key, and null takes a key away, or
        (`keep`) stays to do so where both are laid over something else."""
        return Written(_joined(other.values, self.values, keep), other.places | self.places)


def load(run: str, overrides: Written | None = None) -> Exam:
    """The exam of a run: `params/<file>.yaml`, or `<file>@<variant>`, with the overrides.

    Raises:
        BadInput: no such run or variant, not YAML, not a mapping, `run` is not the stem, or as `params.check`.
    """
    written = resolve(run, overrides)
    # What is wrong with several keys together may be so by one that was overridden.
    also = " and ".join(dict.fromkeys(place.where for place in overrides.places.values())) if overrides else ""
    return params.check(written.values, f"params/{file_of(run).name}{f' with {also}' if also else ''}", written.places)


def require_folder() -> None:
    """Raise BadInput if there is no folder of params files."""
    if not paths.params().is_dir():
        raise BadInput(f"{paths.params()}: no such folder; expected the params files there, or GOLDBOOK_PARAMS to name another")


def resolve(run: str, overrides: Written | None = None) -> Written:
    """What a run's flat parameters are made of, and where each value comes from; not yet checked.

    Raises:
        BadInput: as `load`, short of what the schema finds.
    """
    path, variant = file_of(run), run.partition("@")[2]
    require_folder()
    if "/" in run:
        raise BadInput(f"RUN is {run!r}; expected a run's name and no path{nearest(path.stem, names())}")
    if not path.is_file():
        known = f"expected one of {', '.join(names()) or 'none'}"
        raise BadInput(f"params/{path.name}: no such run{nearest(run, names()) or f'; {known}'}" if run else f"RUN is missing; {known}")
    source = source_of(path)
    written = read(path)
    if written.values.get("run") != path.stem:
        stated = written.values.get("run")
        twin = f", which params/{stated}.yaml is" if isinstance(stated, str) and stated != path.stem and file_of(stated).is_file() else ""
        raise BadInput(f"{source}: key 'run' is {stated!r}{twin}; expected the file's stem, {path.stem!r}")
    variants = variants_of(written, source)
    if variants and not variant:
        raise BadInput(f"{source}: is several runs; expected one of {', '.join(f'{run}@{name}' for name in variants)}")
    if variant and variant not in variants:
        known = [f"{path.stem}@{name}" for name in variants] or [path.stem]
        raise BadInput(f"{source}: has no variant '{variant}'; expected one of {', '.join(known)}{nearest(run, known)}")
    values = {k: v for k, v in written.values.items() if k != "variants"} | {"run": run}
    base = Written(values, {path: place for path, place in written.places.items() if path[0] != "variants"})
    if variant:
        base = variants[variant].over(base)
    return overrides.over(base) if overrides else base


def names() -> list[str]:
    """Every run there is: the files of params/, those with variants as one run each. Sorted by file.

    A file that cannot be read counts as one run, so that it is reported when it is loaded.
    """
    return [run for path in sorted(paths.params().glob("*.yaml")) for run in _runs_of(path)]


def misnamed() -> list[str]:
    """Files of params/ that look like exams and are not read, for their ending."""
    return sorted(p.name for p in paths.params().glob("*.yml"))


def select(name: str) -> list[str]:
    """The runs that a name stands for: itself, or all variants of the file of that name."""
    path = file_of(name)
    return _runs_of(path) if "@" not in name and path.is_file() else [name]


def parse_set(text: str, model: str = "", source: str = "SET") -> Written:
    """Parse `SET="n=8 engine_args.max_num_seqs=64"` and `MODEL=`: key=value words as in a shell, each value
    read as YAML; a dot goes into a mapping, and a mapping is joined with the file's. `source` is what messages
    call the text.

    Raises:
        BadInput: a word without `=`, a key that is given twice, or a value that is not YAML (a value with spaces wants quotes).
    """
    written, given = Written({}, {}), set[KeyPath]()
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise _unreadable(source, text, error) from None
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise BadInput(f"{source}: {word!r} is not an override; expected key=value")
        path = tuple(key.split("."))
        if key == "run":
            raise BadInput(f"{source}: key 'run' is {value!r}; it is the params file's name, and is not overridden: expected RUN={value}")
        try:
            part = _parse(value or "''", source, path)
        except (yaml.YAMLError, ValueError) as error:
            raise _unreadable(source, text, error) from None
        nested: Any = part.values
        if path[0] == "env" and isinstance(nested, int | float):
            nested = value  # OMP_NUM_THREADS=1 is text, as it would be in a shell
        for name in reversed(path):
            nested = {name: nested}
        if path in given:
            raise BadInput(f"{source}: key {key!r} is given twice; expected it once")
        given.add(path)
        written = Written(nested, part.places).over(written, keep=True)
    return Written({"model": model}, {("model",): Place("MODEL")}).over(written, keep=True) if model else written


def of_notebook(values: dict[str, Any]) -> Exam:
    """The exam of generate.ipynb's parameters, which papermill may have laid over the cell's own ones, those of another exam.

    Args:
        values: the notebook's `globals()`.

    Raises:
        BadInput: papermill did so with a run's file that does not state every key, or as `params.check`.
    """
    run, cell = values["run"], _notebooks_own()
    if run != cell["run"] and isinstance(run, str) and file_of(run).is_file():
        written, own = resolve(run).values, params.check(cell, "generate.ipynb")
        other = [key for key, field in Exam.model_fields.items() if key not in written and getattr(own, key) != field.get_default(call_default_factory=True)]
        if other and all(values[key] == cell[key] for key in other):
            raise BadInput(f"params/{file_of(run).name}: {', '.join(other)} are not stated, and would be those of the notebook's own exam ({own.run}); "
                           f"expected a file that states every key: python -m workbook params {run} prints it")
    return params.check(values)


def _notebooks_own() -> dict[str, Any]:
    """What the parameters cell of generate.ipynb holds."""
    cells = files.read_json(paths.NOTEBOOKS / "generate.ipynb")["cells"]
    (source,) = ("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", ()))
    return {node.target.id: ast.literal_eval(node.value) for node in ast.parse(source).body}


def apart(work: dict[str, Any] | None, other: dict[str, Any] | None, whose: str) -> str:
    """The keys in which two works (`Exam.work`) differ, with both values, as the end of a sentence; empty of one that is not known."""
    if work is None or other is None:
        return ""
    defaults = Exam(run="any").model_dump(include=set(params.WORK_KEYS))
    one, two = defaults | work, defaults | other
    return "".join(f"; key '{key}' is {one[key]!r}, and {two[key]!r} {whose}" for key in defaults if one[key] != two[key])


def flat(exam: Exam) -> str:
    """An exam's parameters as YAML: what `papermill -f` takes, one file a run."""
    return yaml.safe_dump(exam.model_dump(mode="json", exclude={"variants"}), sort_keys=False, allow_unicode=True, width=1000)


def _unreadable(source: str, text: str, error: Exception) -> BadInput:
    return BadInput(f"{source}: {text!r} cannot be read ({' '.join(str(error).split())}); expected key=value words, values with spaces quoted")


def file_of(run: str) -> Path:
    """Where a run's parameters are written, of whichever variant."""
    return paths.params() / f"{run.partition('@')[0]}.yaml"


def _runs_of(path: Path) -> list[str]:
    try:
        variants = read(path).values.get("variants")
    except BadInput:
        variants = None
    return [f"{path.stem}@{name}" for name in variants] if variants and isinstance(variants, dict) else [path.stem]


def variants_of(written: Written, source: str) -> dict[str, Written]:
    """The variants of a file as what each changes.

    Raises:
        BadInput: not a mapping of names to mappings, or a name or key that cannot be.
    """
    variants = written.values.get("variants") or {}
    found = {}
    for name, values in variants.items() if isinstance(variants, dict) else [("", None)]:
        where = written.places.get(("variants", str(name)), Place(source)).where
        if not (isinstance(values, dict) and VARIANT_NAME.fullmatch(str(name))):
            raise BadInput(f"{where}: key 'variants' has {name!r}: {values!r}; expected a name (letters, digits, . _ -) and the keys that differ")
        for key in ("run", "variants"):
            if key in values:
                raise BadInput(f"{where}: variant '{name}' sets '{key}'; expected other keys, the run is named after file and variant")
        places = {path[2:]: Place(f"{place.where}, variant {name}", place.raw) for path, place in written.places.items()
                  if path[:2] == ("variants", str(name)) and len(path) > 2}
        found[str(name)] = Written({str(k): v for k, v in values.items()}, places)
    return found


def source_of(path: Path) -> str:
    """What messages call a file of the folder of params."""
    return f"params/{path.relative_to(paths.params()).as_posix()}"


def read(path: Path) -> Written:
    """A params file as it is written; not yet checked.

    Raises:
        BadInput: it cannot be read, is not YAML, or is no mapping.
    """
    source = source_of(path)
    try:
        written = _parse(path.read_text(), source)
    except yaml.MarkedYAMLError as error:
        mark = error.context_mark or error.problem_mark  # where what is wrong begins: a bracket that is not closed is missed at the end
        raise BadInput(f"{source}{f' line {mark.line + 1}' if mark else ''}: not YAML: {', '.join(filter(None, (error.context, error.problem)))}") from None
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise BadInput(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise BadInput(f"{source}: an alias stands for something that it is in itself; expected none that does") from None
    if not isinstance(written.values, dict):
        what = "is empty" if written.values is None else f"holds a {type(written.values).__name__}"
        raise BadInput(f"{source}: {what}; expected 'key: value' lines")
    return written


def _parse(text: str, source: str, prefix: KeyPath = ()) -> Written:
    """Read YAML with the place of every value; `prefix` is the path of keys that leads to it."""
    loader = LOADER(text)
    try:
        node = loader.get_single_node()
        values = loader.construct_document(node) if node else None
    finally:
        loader.dispose()
    places: dict[KeyPath, Place] = {}
    if node:
        _walk(node, prefix, source, places)
    return Written(values if not isinstance(values, dict) else {str(k): v for k, v in values.items()}, places)


def _walk(node: yaml.Node, path: KeyPath, source: str, places: dict[KeyPath, Place]) -> None:
    """Collect places, and refuse what YAML would silently read as something else than was meant."""
    where = f"{source} line {node.start_mark.line + 1}" if source.startswith("params/") else source
    if path:
        plain = isinstance(node, yaml.ScalarNode) and not node.style
        places[path] = Place(where, node.value if plain else None)
        if plain and node.tag == "tag:yaml.org,2002:str" and BARE_NUMBER.fullmatch(node.value):
            raise BadInput(f"{where}: key '{'.'.join(path)}' is {node.value}, which YAML reads as text (a number needs a dot and a signed exponent); "
                           f"expected {_with_dot(node.value)}, or quotes if text is meant")
        if plain and node.tag == "tag:yaml.org,2002:int" and BASE_8_OR_60.fullmatch(node.value):
            number = yaml.safe_load(node.value)
            raise BadInput(f"{where}: key '{'.'.join(path)}' is {node.value}, which YAML reads as the number {number}; expected {number}, or quotes if text is meant")
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise BadInput(f"{source} line {line}: key '{'.'.join((*path, key.value))}' is given twice; expected once (it is also on line {seen[key.value]})")
            seen[key.value] = line
            _walk(value, (*path, key.value), source, places)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _walk(value, (*path, str(index)), source, places)


def _with_dot(number: str) -> str:
    digits, exponent = re.split("[eE]", number)
    return f"{digits if '.' in digits else digits + '.0'}e{exponent if exponent[0] in '+-' else '+' + exponent}"


def _joined(base: dict[str, Any], over: dict[str, Any], keep: bool = False) -> dict[str, Any]:
    """`over` on top of `base`; a null takes the key away, so that its default stands, unless it is kept."""
    joined = base | {k: _joined(base[k], v, keep) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in over.items()}
    return {k: v for k, v in joined.items() if keep or v is not None or k not in over}
