"""Scores that weigh accuracy against the numbers trained: PPT of V-PETL Bench and PE of ELEVATER.

    M exp(-log10(P / C + 1))

M is a score in 0 to 1, P the numbers trained without the head. Sources: Xin et al., 2024, "V-PETL Bench: A Unified
Visual Parameter-Efficient Transfer Learning Benchmark", NeurIPS 2024 (C = 1e7); Li et al., 2022, "ELEVATER: A
Benchmark and Toolkit for Evaluating Language-Augmented Visual Models", arXiv 2204.08790 (C = 1e8).
"""
import math

from slimtune.errors import DataError


def ppt(score: float, parameters: float, scale: float = 1e7) -> float:
    """Performance-parameter trade-off. Errors: DataError for a score out of 0 to 1, or fewer than 0 parameters.

    Example:
        >>> round(ppt(0.717, 2.38e6), 2)
        0.65
    """
    if not 0 <= score <= 1 or parameters < 0:
        raise DataError(f"a score in 0 to 1 and 0 or more parameters are expected, not {score} and {parameters}.",
                        "Percents are divided by 100 first.")
    return score * math.exp(-math.log10(parameters / scale + 1))


def pe(score: float, parameters: float) -> float:
    """Performance efficiency: as `ppt`, at ELEVATER's scale of 1e8."""
    return ppt(score, parameters, 1e8)
