"""Statuses of metrics and runs: which one decides over the others, and what a program exits with."""
import os

ORDER = ("INVALID", "REGRESSED", "INCONCLUSIVE", "NO_GOLDEN", "IMPROVED", "PASSED", "SKIPPED", "NOT_RUN")
"""From the status that decides over all others to the one that decides over none."""
IN_DOUBT = ("REGRESSED", "INCONCLUSIVE")
"""Statuses of a first look that ask for one more session."""
EXIT_CODES = {"INVALID": 2, "REGRESSED": 1}
STRICT_EXIT_CODES = EXIT_CODES | {"NO_GOLDEN": 2, "INCONCLUSIVE": 3}


def overall(statuses: list[str]) -> str:
    """The status of a run, or of several, from those of its parts; PASSED for none."""
    return min(statuses, key=ORDER.index, default="PASSED")


def strict() -> bool:
    """Whether STRICT=1 is in the environment: a run that nothing was held against, or in doubt, fails too."""
    return os.environ.get("STRICT", "") not in ("", "0")


def exit_code(statuses: list[str], strict: bool = False) -> int:
    """0 nothing regressed, 1 regressed, 2 invalid; strict: also 2 without a golden, 3 inconclusive.
    2 wins over 1, over 3, over 0."""
    codes = STRICT_EXIT_CODES if strict else EXIT_CODES
    found = {codes.get(s, 0) for s in statuses}
    return next((c for c in (2, 1, 3) if c in found), 0)
