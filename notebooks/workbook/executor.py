"""Executing one notebook: papermill with a time limit, live progress, and no process left behind."""
import contextlib
import ctypes
import fcntl
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from workbook import limits, paths, progress, scraps

logging.getLogger("papermill").setLevel(logging.ERROR)
PR_SET_CHILD_SUBREAPER = 36
# The kernel warns on our terminal that its loopback ports are not encrypted, and how its sockets went when it was interrupted.
KERNEL = ("--log-level=CRITICAL", "--IPKernelApp.exec_lines=from workbook import orphans as _orphans; _orphans.end_with_this_process()")
"""How a kernel is started: quiet, and so that nothing outlives it should this process be killed."""
ANNOUNCE = "announce"
"""Tag of a cell whose printed text the terminal gets too, as soon as the next cell starts."""


@dataclass(frozen=True)
class Execution:
    """How a notebook went.

    Attributes:
        problem: empty if it got to its end; else the cause in a sentence.
        seconds: wall time, from the start of papermill to the kernel's end.
        cell_seconds: the part of it that was spent in cells.
    """
    problem: str
    seconds: float
    cell_seconds: float


class _Engine(NBClientEngine):
    """papermill's own engine, with a limit on the whole notebook and a call as each cell starts."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, *, on_cell: Callable, deadline: float, **kwargs):
        started = nb_man.cell_start

        def cell_start(cell, cell_index=None, **rest):
            on_cell(nb_man.nb.cells, cell_index)
            return started(cell, cell_index, **rest)
        nb_man.cell_start = cell_start
        client = PapermillNotebookClient(nb_man, kernel_name=kernel_name, startup_timeout=60, extra_arguments=list(KERNEL),
                                         timeout_func=lambda cell: max(1, int(deadline - time.monotonic())))
        return client.execute()


papermill_engines.register("goldbook", _Engine)


def execute(source: Path, target: Path, parameters: dict[str, Any], *, timeout_s: float, label: str) -> Execution:
    """Run a notebook headlessly.

    Args:
        source, target: the notebook and where its executed copy goes (written whatever happens).
        parameters: as papermill's; only those the notebook declares.
        timeout_s: limit for the whole notebook.
        label: what to call it in the terminal.
    """
    began = time.monotonic()
    with _announced(label) as on_cell, limits.told(began + timeout_s):
        problem = _problem(source, target, parameters, on_cell, began + timeout_s, timeout_s)
    end_processes()
    if not problem and not scraps.read(target).get(scraps.SENTINEL):
        problem = "the notebook stopped before its last cell without saying why"
    return Execution(problem, time.monotonic() - began, _cell_seconds(target))


def _problem(source: Path, target: Path, parameters: dict, on_cell: Callable, deadline: float, timeout_s: float) -> str:
    try:
        papermill.execute_notebook(str(source), str(target), parameters, engine_name="goldbook", cwd=str(paths.NOTEBOOKS),
                                   progress_bar=False, on_cell=on_cell, deadline=deadline)
    except PapermillExecutionError as error:
        message = str(error.evalue).strip().splitlines() or [""]
        return message[0] if error.ename in ("BadInput", "Stopped") else f"{error.ename}: {message[0]}"
    except CellTimeoutError:
        return f"not finished after {timeout_s:.0f} s, the limit of key 'timeout_s'"
    except KeyboardInterrupt:
        # The cell's task ends with it and is asked by nobody, and asyncio would print its stack as the last word in the terminal.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise
    except DeadKernelError:
        return "the notebook's kernel died (killed, out of memory, or a crash in native code)"
    except Exception as error:  # no kernel, a full disk: whatever it is, the other runs go on
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return ""


def end_processes() -> None:
    """End whatever a notebook left running: kernels, engine cores, workers."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, stubborn = psutil.wait_procs(left, timeout=5)
    for process in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, timeout=5)


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose parent dies, so that `end_processes` finds them all.

    An engine core outlives a killed kernel; init would inherit it, with the memory it holds.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Treat SIGTERM (a cancelled CI job) and SIGHUP (a lost connection) like Ctrl-C, so that processes are
    ended and the result says what happened."""
    def stop(signum, frame):
        raise KeyboardInterrupt
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cell_seconds(target: Path) -> float:
    cells = nbformat.read(target, as_version=4).cells if target.exists() else []
    return sum(c.metadata.get("papermill", {}).get("duration") or 0.0 for c in cells)


@contextlib.contextmanager
def _announced(label: str) -> Iterator[Callable]:
    """Say in the terminal which section of which notebook is running; yields the callback for each cell."""
    os.environ[progress.TERMINAL] = terminal = _terminal()
    os.environ[progress.LOG] = "" if terminal else _log()
    began, shown = time.monotonic(), ""

    def on_cell(cells: list, index: int) -> None:
        nonlocal shown
        if text := _announcement(cells[index - 1]):
            print(f"  {label}  {time.monotonic() - began:6.1f} s  {text}", file=sys.stderr, flush=True)
        heading = _heading(cells[: index + 1])
        if heading and heading != shown:
            shown = heading
            print(f"  {label}  {time.monotonic() - began:6.1f} s  cell {index + 1}/{len(cells)}  {heading}", file=sys.stderr, flush=True)
    try:
        yield on_cell
    finally:
        os.environ.pop(progress.TERMINAL, None)
        os.environ.pop(progress.LOG, None)


def _terminal() -> str:
    """The path of the terminal that our stderr is; empty if it is none, or one without a path here, as in a container that was entered from outside."""
    try:
        return os.ttyname(2) if sys.stderr.isatty() and "CI" not in os.environ else ""
    except OSError:
        return ""


def _log() -> str:
    """The path by which another process writes to our stderr; empty if there is none."""
    try:
        number = sys.stderr.fileno()
        # Of two that write to one file without it each would overwrite the other.
        fcntl.fcntl(number, fcntl.F_SETFL, fcntl.fcntl(number, fcntl.F_GETFL) | os.O_APPEND)
    except (OSError, ValueError):
        return ""
    return f"/proc/{os.getpid()}/fd/{number}"


def _announcement(cell) -> str:
    """What a cell tagged ANNOUNCE has printed, on one line."""
    if ANNOUNCE not in cell.metadata.get("tags", []):
        return ""
    return " ".join("".join(o.text for o in cell.outputs if o.output_type == "stream").split())


def _heading(cells: list) -> str:
    """The last level-2 heading up to here; only once code below it starts."""
    if cells[-1].cell_type != "code":
        return ""
    found = (re.match(r"##\s+(.*)", c.source) for c in reversed(cells) if c.cell_type == "markdown")
    return next((m.group(1) for m in found if m), "")
