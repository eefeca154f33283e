"""Statistical tests, by their asymptotic formulas (scipy is no dependency)."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["chi_square_uniform_p", "kolmogorov_smirnov_p"]


def kolmogorov_smirnov_p(a: np.ndarray, b: np.ndarray) -> float:
    """p of the two-sample Kolmogorov-Smirnov test; too large, never too small, for values with ties.

    Stephens' correction for finite samples; Numerical Recipes, third edition, section 14.3.
    """
    a, b = np.sort(a), np.sort(b)
    values = np.concatenate([a, b])
    cdf_a = np.searchsorted(a, values, side="right") / len(a)
    cdf_b = np.searchsorted(b, values, side="right") / len(b)
    root = math.sqrt(len(a) * len(b) / (len(a) + len(b)))
    x = (root + 0.12 + 0.11 / root) * float(np.abs(cdf_a - cdf_b).max())
    if x < 0.2:  # the series below has not converged; p is 1 to 12 digits
        return 1.0
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101)))


def chi_square_uniform_p(counts: np.ndarray) -> float:
    """p of the chi-square test of equal frequencies, by the normal approximation of Wilson and Hilferty."""
    expected, degrees = counts.sum() / len(counts), len(counts) - 1
    statistic = float(((counts - expected) ** 2).sum() / expected)
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(z / math.sqrt(2))
