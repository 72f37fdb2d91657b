"""The exams for people: what there is, what a run's parameters are and where they come from, what each key means."""
import types
import typing
from collections.abc import Callable
from typing import Any

import yaml

from workbook import exams, platforms
from workbook.errors import BadInput
from workbook.exams import Written
from workbook.params import WORK_KEYS, Exam, Gate, Requires, Slo
from workbook.sweeps import TUNED


def flat_with_origins(run: str, overrides: Written | None = None) -> str:
    """A run's checked parameters as flat YAML that `papermill -f` takes, each with its origin as a comment."""
    exam = exams.load(run, overrides)
    places = exams.resolve(run, overrides).places
    return annotated(exam, lambda *path: _origin(places, *path))


def annotated(exam: Exam, comment: Callable[..., str]) -> str:
    """An exam's parameters as flat YAML with a comment behind each line; `comment` is asked for it with the line's path
    of keys, one or two of them, and may have none."""
    lines: list[tuple[str, str]] = []
    for key, value in exam.model_dump(mode="json", exclude={"variants"}).items():
        if isinstance(value, dict) and value:
            lines.append((f"{key}:", ""))
            lines += [(f"  {name}: {_scalar(inner)}", comment(key, name)) for name, inner in value.items()]
        else:
            lines.append((f"{key}: {_scalar(value)}", comment(key)))
    width = min(60, max(len(text) for text, _ in lines))
    return "".join(f"{text:{width}}  # {said}\n" if said else f"{text}\n" for text, said in lines)


def listing() -> str:
    """A line for every run: name, what it needs, whether this machine can take it, title."""
    exams.require_folder()
    rows = []
    for run in exams.names():
        try:
            exam = exams.load(run)
            rows.append((run, needs(exam), platforms.unmet(exam) or "yes", exam.title))
        except BadInput as error:
            rows.append((run, "?", f"no: {error}", ""))
    heads = ("run", "needs", "this machine", "title")
    widths = [min(60, max(len(row[i]) for row in [heads, *rows])) for i in range(3)]
    lines = ["  ".join([*(f"{cell:{w}}" for cell, w in zip(row[:3], widths, strict=True)), row[3]]).rstrip() for row in [heads, *rows]]
    lines += [f"params/{name}: not read; expected the ending .yaml" for name in exams.misnamed()]
    return "\n".join(lines) + "\n"


def needs(exam: Exam) -> str:
    """What an exam requires, in a few words."""
    if exam.requires.gpus:
        return f"{exam.requires.gpus} GPU{'s' if exam.requires.gpus > 1 else ''}"
    return {"any": "any machine", "cpu": "a CPU, no GPU", "gpu": "a GPU"}[exam.requires.device]


def reference() -> str:
    """The page `docs/params.md`: every key of the schema with type, default and meaning."""
    lines = [
        "# Parameters", "",
        "One YAML file in `params/` is one exam; its keys are these. The table is made from the schema (`make docs`), and a test keeps it true.", "",
        "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in Exam.model_fields.items():
        mark = "" if name not in WORK_KEYS else " ◆"
        lines.append(f"| `{name}`{mark} | {_type(field.annotation)}{_limits(field)} | {_default(field)} | {_cell(field.description)} |")
    lines += ["", "◆ defines the work: a golden is comparable only where all of these are equal (and the prompts, by their hash, and the platform). "
              "Everything else is what an exam puts to the test, or how it is judged.", ""]
    for key, section in (("requires", Requires), ("slo", Slo), ("gates.<metric>", Gate)):
        inner = "; ".join(f"`{n}` {_type(f.annotation)}{_limits(f)}, default {_default(f)}" for n, f in section.model_fields.items())
        lines.append(f"- `{key}`: {inner}{'. A pass rules out a loss of `delta`; `margin` is the smallest that is called one; `low` and `high` are of `rule: band`' if section is Gate else ''}")
    lines += ["", f"`params/tune/<run>.yaml`, the sweep that `make tune` takes, has the same keys: `run` is the run that it tunes, other keys change it for every setting, "
              f"and `variants` are the settings, which may differ in {', '.join(f'`{key}`' for key in TUNED)}."]
    return "\n".join(lines) + "\n"


def _origin(places: dict, *path: str) -> str:
    """Where a value was written: each of what is in it, else the nearest that encloses it."""
    if inner := dict.fromkeys(place.where for key, place in places.items() if len(key) > len(path) and key[:len(path)] == path):
        return "; ".join(inner)
    for end in range(len(path), 0, -1):
        if place := places.get(path[:end]):
            return place.where
    return "default"


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).removesuffix("\n").removesuffix("\n...")


def _type(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in args)
    if origin is typing.Annotated:
        return _type(args[0])
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_type, args))
    if origin is list:
        return f"list of {_type(args[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, Requires | Slo | Gate):
        return "mapping"
    return {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything"}.get(annotation, str(annotation))


def _limits(field: Any) -> str:
    words = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}
    found = [words[n].format(f"{v:g}") for m in field.metadata for n in words if (v := getattr(m, n, None)) is not None]
    return f", {', '.join(found)}" if found else ""


def _default(field: Any) -> str:
    if field.is_required():
        return "must be given"
    value = field.default.model_dump() if isinstance(field.default, Requires | Slo) else field.default
    return "empty" if value in ("", {}, []) else f"`{_scalar(value)}`"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")
