"""Progress of long work: a bar in a terminal or in JupyterLab, a line a minute in a log, and nothing in a saved page."""
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TextIO

TERMINAL = "GOLDBOOK_TERMINAL"
"""Variable by which the runner tells a kernel which terminal a person watches; empty: nobody does."""
LOG = "GOLDBOOK_LOG"
"""Variable by which it tells, where nobody watches, which file its own lines go to."""
QUIET_S = 60.0
"""Seconds between two lines in a log. Some CI services end a job that has been silent for ten minutes."""


class _Lines:
    """The file of a bar in a log: of what the bar draws one line every `QUIET_S`, whichever bar it is."""
    spoke = time.monotonic()

    def __init__(self, log: TextIO) -> None:
        self.log = log

    def write(self, drawn: str) -> None:
        line = drawn.strip()
        if not line or time.monotonic() - _Lines.spoke < QUIET_S:
            return
        _Lines.spoke = time.monotonic()
        with contextlib.suppress(OSError):  # a reader that has left (`| head`) is no reason to end a load
            self.log.write(f"  {line}\n")
            self.log.flush()

    def flush(self) -> None:
        """Nothing is held back."""


def bar(description: str) -> Callable | bool:
    """A tqdm class for `description`, or False where a bar would only end up frozen in a saved page."""
    terminal, log = os.environ.get(TERMINAL), os.environ.get(LOG)
    options = {"desc": description, "unit": "request", "leave": False}
    if terminal is None:
        from tqdm.auto import tqdm
    else:
        from tqdm import tqdm
        try:
            # A kernel's own stderr is part of the notebook; these are not.
            if terminal:
                options["file"] = open(terminal, "w")
            elif log:
                options |= {"file": _Lines(open(log, "a")), "mininterval": 1, "bar_format": "{desc}: {n_fmt} of {total_fmt} {unit}s in {elapsed}{postfix}"}
            else:
                return False
        except OSError:  # a socket cannot be opened by its name
            return False

    def labelled(*args, **rest):
        return tqdm(*args, **rest | options)
    return labelled


@contextlib.contextmanager
def counting(bar: Callable | bool, total: int) -> Iterator[Callable | None]:
    """A bar over `total` requests that are answered one by one: gives the function to call with each answer, or
    None where no bar is shown."""
    if not bar:
        yield None
        return
    shown, tokens, began = bar(total=total), 0, time.monotonic()

    def ended(answer) -> None:
        nonlocal tokens
        tokens += answer.output_tokens
        shown.set_postfix_str(f"{tokens / (time.monotonic() - began):,.0f} tok/s", refresh=False)
        shown.update()
    try:
        yield ended
    finally:
        shown.close()
