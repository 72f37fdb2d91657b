"""Progress bars on long work: in a terminal, in JupyterLab, and nowhere else."""
import os
from collections.abc import Callable
from functools import partial

TERMINAL = "GOLDBOOK_TERMINAL"
"""Variable by which the runner tells a kernel which terminal a person watches; empty: nobody does."""


def bar(description: str) -> Callable | bool:
    """A tqdm class for `description`, or False where a bar would only end up frozen in a saved page."""
    terminal = os.environ.get(TERMINAL)
    if terminal is None:
        from tqdm.auto import tqdm
        return partial(tqdm, leave=False, desc=description)
    if not terminal:
        return False
    from tqdm import tqdm
    # A kernel's own stderr is part of the notebook; the terminal is not.
    return partial(tqdm, leave=False, desc=description, file=open(terminal, "w"), dynamic_ncols=True)
