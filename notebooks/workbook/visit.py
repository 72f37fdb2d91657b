"""One visit of an A/B or of a tuning: generate.ipynb in a fresh kernel, in the environment of one interpreter.

It is a process of its own, `PYTHON -m workbook.visit FOLDER`: papermill, the kernel and the engine all come from
the environment of the interpreter that starts it, whichever started the experiment. GOLDBOOK_REPORTS is the folder
of the visit, which holds `params.yaml`; the rest is as in any run.
"""
import subprocess
import sys
from pathlib import Path

import pandas as pd
import yaml

from workbook import degeneration, exams, executor, files, models, orphans, pages, paired, params, paths, runner, runs, tokens
from workbook.params import Exam

INTERRUPTED = "interrupted"
"""The outcome of a visit that somebody interrupted."""


def make(folder: Path, exam: Exam, python: str = sys.executable) -> None:
    """Make a visit, and leave its outcome in `folder`, whatever becomes of its process.

    An interruption is an outcome too, and is raised again. Where this process is killed the visit ends as if interrupted:
    it would write into the folder of the one that is made in its place.
    """
    files.write_text(folder / "params.yaml", exams.flat(exam))
    try:
        done = subprocess.run([python, "-m", "workbook.visit", str(folder)], env=paths.child_environment() | {"GOLDBOOK_REPORTS": str(folder)},
                              preexec_fn=orphans.stop_with_parent)
    except KeyboardInterrupt:
        files.write_json(folder / paired.OUTCOME, {"problem": INTERRUPTED})
        raise
    executor.end_processes()
    if not (folder / paired.OUTCOME).exists():
        files.write_json(folder / paired.OUTCOME, {"problem": f"its process ended with code {done.returncode}"})


def main(folder: Path) -> None:
    """Take the exam of `folder/params.yaml`, as far as its generate.ipynb."""
    exam = params.check(yaml.safe_load((folder / "params.yaml").read_text()), "params.yaml")
    place = runs.start(exam.run)
    problem = runner.run_stage(exam, "generate", place)
    files.write_json(folder / paired.OUTCOME, {"problem": problem, "worthless": [] if problem else worthless(exam, place)})
    pages.write(place / "generate.ipynb", place / "generate.html", f"{exam.run} · {folder.name}",
                [("← all visits", "../../../../index.html"), (folder.name, "")])


def worthless(exam: Exam, place: Path) -> list[str]:
    """Why the visit's answers are worth nothing, whatever their speed, a sentence each (`degeneration.problems`)."""
    tokenizer, generations = tokens.Tokenizer(models.resolve(exam)), pd.read_parquet(place / "generations.parquet")
    signs = degeneration.signs(exam, generations, tokenizer.special(), tokenizer.ends())
    return degeneration.problems(exam, degeneration.tally(exam, generations[["prompt_id"]].join(signs)))


if __name__ == "__main__":
    executor.adopt_orphans()
    try:
        with executor.interruptible():
            main(Path(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        executor.end_processes()
