"""Exponents with their confidence intervals, and the one table of claims."""

from typing import NamedTuple

import numpy as np
from scipy import stats


class Fit(NamedTuple):
    """A mean over seeds and the ends of its 95 % interval (Student's t)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.low):  # a single figure, such as a count of bytes
            return f"{self.value:9.4g}"
        return f"{self.value:9.4g}  [{self.low:.4g}, {self.high:.4g}]"


class Claim(NamedTuple):
    """One line of the table."""

    claim: str
    expected: str  # of the fitted quantity
    fit: Fit
    holds: bool


def over_seeds(values: np.ndarray) -> Fit:
    """Mean and interval of one figure per seed."""
    values = np.asarray(values, float)
    mean = float(values.mean())
    if values.size < 2:
        return Fit(mean, float("nan"), float("nan"))
    spread = float(values.std(ddof=1)) / values.size**0.5
    half = float(stats.t.ppf(0.975, values.size - 1)) * spread
    return Fit(mean, mean - half, mean + half)


def slope(x: np.ndarray, y: np.ndarray) -> Fit:
    """The exponent p of y ∝ x^p, fitted for each seed: x [points], y [seeds, points]."""
    logs = np.log(np.asarray(y, float))
    return over_seeds(np.array([np.polyfit(np.log(x), row, 1)[0] for row in logs]))


def geometric(x: np.ndarray, y: np.ndarray, low: float, high: float) -> np.ndarray:
    """−log of the factor per step, for each row of y, where y / y[0] is between two values."""
    found = []
    for row in np.asarray(y, float):
        level = row / row[0]
        part = (level < high) & (level > low)
        found.append(-np.polyfit(x[part], np.log(row[part]), 1)[0])
    return np.array(found)


def table(claims: list[Claim]) -> str:
    """The claims as text."""
    width = max(len(claim.claim) for claim in claims)
    expected = max(len(claim.expected) for claim in claims)
    lines = [f"{'claim':{width}}  {'expected':{expected}}  measured  [95 % interval]"]
    for claim in claims:
        verdict = "holds" if claim.holds else "DOES NOT HOLD"
        lines.append(f"{claim.claim:{width}}  {claim.expected:{expected}}  {claim.fit}  {verdict}")
    return "\n".join(lines)
