"""Where things lie: the checkout, its params, goldens and reports, and the cache outside it."""
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"


def _folder(variable: str, default: Path) -> Path:
    """A relative one counts from the checkout, wherever make, a notebook or a test runs."""
    return (ROOT / Path(os.environ.get(variable) or default).expanduser()).resolve()


def params() -> Path:
    """Folder of the params files; `GOLDBOOK_PARAMS` moves it."""
    return _folder("GOLDBOOK_PARAMS", ROOT / "params")


def goldens() -> Path:
    """Folder of the goldens, one folder a platform; `GOLDBOOK_GOLDENS` moves it."""
    return _folder("GOLDBOOK_GOLDENS", ROOT / "goldens")


def reports() -> Path:
    """Folder of everything generated; `GOLDBOOK_REPORTS` moves it."""
    return _folder("GOLDBOOK_REPORTS", ROOT / "reports")


def cache() -> Path:
    """Folder of converted models, outside the checkout so that `make clean` spares it."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return _folder("GOLDBOOK_CACHE", base / "goldbook")


def run_folder(run: str) -> Path:
    """Folder of a run's latest results."""
    return reports() / "runs" / run


def ab_folder(run: str) -> Path:
    """Folder of the latest A/B of a run."""
    return reports() / "ab" / run


def tune_folder(run: str) -> Path:
    """Folder of the latest tuning of a run."""
    return reports() / "tune" / run


def child_environment() -> dict[str, str]:
    """The environment in which `python -m workbook...` works from any folder, and CUDA numbers GPUs as NVML does: by
    itself it puts the fastest first, which beside a display's card is another."""
    return os.environ | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "PYTHONPATH": os.pathsep.join(filter(None, [str(NOTEBOOKS), os.environ.get("PYTHONPATH")]))}
