"""Progress bars on long work: in a terminal, in JupyterLab, and nowhere else."""
import contextlib
import os
import time
from collections.abc import Callable, Iterator

TERMINAL = "GOLDBOOK_TERMINAL"
"""Variable by which the runner tells a kernel which terminal a person watches; empty: nobody does."""


def bar(description: str) -> Callable | bool:
    """A tqdm class for `description`, or False where a bar would only end up frozen in a saved page."""
    terminal = os.environ.get(TERMINAL)
    if terminal is None:
        from tqdm.auto import tqdm
        stream = None
    elif terminal:
        from tqdm import tqdm
        # A kernel's own stderr is part of the notebook; the terminal is not.
        stream = open(terminal, "w")
    else:
        return False

    def labelled(*args, **options):
        return tqdm(*args, **options | {"desc": description, "leave": False, "file": stream})
    return labelled


@contextlib.contextmanager
def counting(bar: Callable | bool, total: int) -> Iterator[Callable | None]:
    """A bar over `total` requests that are answered one by one: gives the function to call with each answer, or
    None where no bar is shown."""
    if not bar:
        yield None
        return
    shown, tokens, began = bar(total=total, unit="request"), 0, time.monotonic()

    def ended(answer) -> None:
        nonlocal tokens
        tokens += answer.output_tokens
        shown.set_postfix_str(f"{tokens / (time.monotonic() - began):,.0f} tok/s", refresh=False)
        shown.update()
    try:
        yield ended
    finally:
        shown.close()
