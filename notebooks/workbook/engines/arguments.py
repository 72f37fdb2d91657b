"""The engine arguments that the installed vLLM has, read from its source: its import takes seconds, and a misspelt
argument is to be said before that."""
import ast
import importlib.util
from functools import cache
from pathlib import Path

from workbook.errors import BadInput
from workbook.params import Exam, nearest

ENGINE = ("engine/arg_utils.py",)
SERVER = (*ENGINE, "entrypoints/**/cli_args.py", "entrypoints/cli/serve.py")
"""Where vLLM declares them: as fields of classes, and as words of its command line."""


def require(exam: Exam) -> None:
    """Raise BadInput for a key of `engine_args` that is no argument of vLLM: of its engine, and where that is behind a
    server of the server too. Says nothing where there is no vLLM, or none whose source can be read."""
    if exam.engine == "endpoint" or not (folder := _folder()):
        return
    server = exam.engine == "server"
    known = _declared(folder, SERVER if server else ENGINE)
    for name, value in exam.engine_args.items():
        if name == "model":
            raise BadInput(f"key 'engine_args' has 'model' (value {value!r}); use key 'model'")
        if known and name not in known and not (server and name.removeprefix("no_") in known):
            raise BadInput(f"key 'engine_args' has {name!r} (value {value!r}); expected an argument of vLLM's {'server' if server else 'engine'}{nearest(name, sorted(known))}")


def _folder() -> Path | None:
    found = importlib.util.find_spec("vllm")
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


@cache
def _declared(folder: Path, places: tuple[str, ...]) -> frozenset[str]:
    """The names declared in all of the files, with `lora_modules`, which is the exam's own; empty where a file is missing or is no Python."""
    names = {"lora_modules"}
    for place in places:
        if not (files := sorted(folder.glob(place))):
            return frozenset()
        for file in files:
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (OSError, SyntaxError, ValueError):
                return frozenset()
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    names |= {f.target.id for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)}
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--"):
                    names.add(node.value[2:].replace("-", "_"))
    return frozenset(names)
