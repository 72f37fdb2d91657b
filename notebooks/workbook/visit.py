"""One visit of an A/B: generate.ipynb in a fresh kernel, in the environment of one interpreter.

It is a process of its own, `PYTHON -m workbook.visit FOLDER`: papermill, the kernel and the engine all come from
the environment of the interpreter that starts it, whichever started the A/B. GOLDBOOK_REPORTS is the folder of the
visit, which holds `params.yaml`; the rest is as in any run.
"""
import sys
from pathlib import Path

import yaml

from workbook import executor, files, pages, paired, params, runner, runs


def main(folder: Path) -> None:
    """Take the exam of `folder/params.yaml`, as far as its generate.ipynb."""
    exam = params.check(yaml.safe_load((folder / "params.yaml").read_text()), "params.yaml")
    place = runs.start(exam.run)
    problem = runner.run_stage(exam, "generate", place)
    files.write_json(folder / paired.OUTCOME, {"problem": problem})
    pages.write(place / "generate.ipynb", place / "generate.html", f"{exam.run} · {folder.name}",
                [("← A/B", "../../../../index.html"), (folder.name, "")])


if __name__ == "__main__":
    executor.adopt_orphans()
    try:
        with executor.interruptible():
            main(Path(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        executor.end_processes()
