"""Temperature scaling of probabilities (Guo et al. 2017, On Calibration of Modern Neural Networks)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.counts import FloatArray, IntArray

LIMITS = (0.5, 5.0)  # of a head's temperature: few validation videos must not make probabilities meaningless
SMALLEST = float(np.finfo(np.float32).tiny)  # probabilities are clipped here before their logarithm is taken


def log_probabilities(probabilities: NDArray[np.floating]) -> FloatArray:
    """The finite logarithm, in float64."""
    found: FloatArray = np.log(np.maximum(probabilities, SMALLEST, dtype=np.float64))
    return found


def scaled(log_p: FloatArray, temperature: float) -> FloatArray:
    """The probabilities (..., C) of log-probabilities (or logits) (..., C) at a temperature: softmax(log_p / T)."""
    powers = np.exp((log_p - log_p.max(axis=-1, keepdims=True)) / temperature)
    found: FloatArray = powers / powers.sum(axis=-1, keepdims=True)
    return found


def fit_temperature(log_p: FloatArray, labels: IntArray, limits: tuple[float, float] = LIMITS) -> float:
    """The temperature in `limits` with the least mean negative log-likelihood of the labels (N,) under (N, C).

    1 without labels. The classes' order, and so the accuracy, does not depend on the temperature.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    if not len(labels):
        return 1.0
    own = log_p[np.arange(len(labels)), labels]

    def loss(log_temperature: float) -> float:
        temperature = np.exp(log_temperature)
        return float((logsumexp(log_p / temperature, axis=1) - own / temperature).mean())

    found = minimize_scalar(loss, bounds=np.log(limits), method="bounded", options={"xatol": 1e-4})
    return round(float(np.exp(found.x)), 4)
