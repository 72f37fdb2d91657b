"""Distributions over the requests of a session: a golden keeps their quantiles, a report draws them beside its own.

No verdict comes from them: requests of one repetition are not independent of each other.
"""
import numpy as np
import pandas as pd

UNITS = {"E2E": "s", "TTFT": "s", "per-request tok/s": "tok/s"}
"""What is looked at, and its unit. Definitions are those of `metrics`."""
QUANTILES = np.linspace(0, 1, 21)


def of_requests(rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """The values of each request, by name; what the engine gave no times for is left out.

    Args:
        rows: of `load.requests_frame`. Of a sweep only the largest point counts.
    """
    rows = rows[rows.point == rows.point.max()]
    e2e = rows.last_token_s - rows.arrival_s
    values = {"E2E": e2e, "TTFT": rows.first_token_s - rows.arrival_s, "per-request tok/s": rows.output_tokens / e2e}
    finite = {name: each[np.isfinite(each)].to_numpy(dtype=float) for name, each in values.items()}
    return {name: each for name, each in finite.items() if len(each)}


def quantiles(rows: pd.DataFrame) -> dict[str, list[float]]:
    """The values at QUANTILES of all requests of one session, by name."""
    return {name: np.quantile(values, QUANTILES).tolist() for name, values in of_requests(rows).items()}
