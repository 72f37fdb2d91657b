"""Scraps: the small values a notebook leaves in itself. The only module that knows scrapbook."""
import math
from pathlib import Path
from typing import Any

SENTINEL = "done"
"""Name of the scrap that a notebook glues last: without it the notebook did not get to its end, whatever
the saved file says."""


def glue(**values: Any) -> None:
    """Record values by name in the running notebook; None, which scrapbook refuses, is left out."""
    import scrapbook
    for name, value in values.items():
        value = plain(value)
        if value is not None:
            # scrapbook's "json" takes a text for JSON that is already encoded.
            scrapbook.glue(name, value, encoder="text" if isinstance(value, str) else "json")


def plain(value: Any) -> Any:
    """A copy made of what JSON has: numpy scalars and tuples converted, NaN and infinities as None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    elif hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(notebook: Path) -> dict[str, Any]:
    """All scraps of an executed notebook by name; empty if it has none."""
    import scrapbook
    return {name: scrap.data for name, scrap in scrapbook.read_notebook(str(notebook)).scraps.items()}
