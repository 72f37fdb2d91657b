"""Files that are complete or absent: JSON and parquet written in one step."""
import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbook.errors import BadInput

if TYPE_CHECKING:
    import pandas

# Numbers, true, false, null, and texts of one short word: no text has a line's end in it, so nothing inside one is touched.
_FLAT_LIST = re.compile(r'\[\n(?:[-+.\w\s,]|"[-+.\w]{0,40}")*\]')


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and move it there, so that no reader sees half of it."""
    with _in_one_step(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_parquet(path: Path, frame: "pandas.DataFrame") -> None:
    """Write a table in the same way."""
    with _in_one_step(path) as scratch:
        frame.to_parquet(scratch)


@contextlib.contextmanager
def _in_one_step(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys (those of a sweep by the number of their point: who reads them back shows them in this
    order), a list of plain values on one line so that a diff reads well.

    NaN is refused with ValueError, since no other JSON reader takes it.
    """
    text = json.dumps(_in_order(value), indent=1, allow_nan=False, ensure_ascii=False)
    write_text(path, _FLAT_LIST.sub(lambda m: " ".join(m.group().split()).replace("[ ", "[").replace(" ]", "]"), text) + "\n")


def _in_order(value: Any) -> Any:
    """The same with all keys in order: alphabetical, and `output_tok_s@32` before `output_tok_s@2048`."""
    if isinstance(value, dict):
        return {key: _in_order(value[key]) for key in sorted(value, key=_place)}
    return [_in_order(item) for item in value] if isinstance(value, list | tuple) else value


def _place(key: str | int) -> tuple[str, int]:
    if isinstance(key, int):
        return "", key
    name, _, point = key.partition("@")
    return (name, int(point)) if point.isdecimal() else (key, 0)


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        BadInput: the file is missing, cut off or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error})") from None
