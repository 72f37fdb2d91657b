"""Progress bars on long work: in a terminal, in JupyterLab, and nowhere else."""
import os
from collections.abc import Callable

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
