"""How much a metric would change with other photographs, and with other seeds.

The sentences of a photograph are not independent: an easy photograph is easy for all of them. So whole photographs are
drawn, with replacement, all of a draw with all their sentences and for all runs alike: runs are compared on the same
sentences (paired). The seeds of a training are few, often three: their effect is estimated from the spread between
runs, with Student's t, and not by drawing from three numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from aml.metrics import Record, terms

RESAMPLES = 4000
LEVEL = (0.025, 0.975)  # of the 95 % intervals
_CHUNK = 200


def photograph_sums(
    records: Sequence[Record], photographs: Sequence[str], metrics: Sequence[str], prefix: str = ""
) -> np.ndarray:
    """Numerator and denominator of each metric, summed over each photograph: float64 [metrics, 2, photographs].

    photographs: for each record, in its order, what tells its photograph from others.
    """
    row = {name: i for i, name in enumerate(sorted(set(photographs)))}
    sums = np.zeros((len(metrics), 2, len(row)))
    for record, photograph in zip(records, photographs, strict=True):
        found = terms(record, prefix)
        sums[:, :, row[photograph]] += [found[name] for name in metrics]
    return sums


def ratios(sums: np.ndarray) -> np.ndarray:
    """Metrics of sums [..., 2]; 0 where nothing counts."""
    above, below = sums[..., 0], sums[..., 1]
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)


def resampled(sums: np.ndarray) -> np.ndarray:
    """The metrics of sums [..., 2, photographs], in RESAMPLES draws of as many photographs: [RESAMPLES, ...].

    The draws depend on the number of photographs alone.
    """
    count = sums.shape[-1]
    rng = np.random.default_rng(0)
    found = []
    for first in range(0, RESAMPLES, _CHUNK):
        drawn = rng.integers(count, size=(min(_CHUNK, RESAMPLES - first), count))
        times = np.stack([np.bincount(each, minlength=count) for each in drawn]).astype(np.float64)
        found.append(ratios(np.moveaxis(sums @ times.T, -1, 0)))
    return np.concatenate(found)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of draws."""
    low, high = np.quantile(values, LEVEL)
    return float(low), float(high)


def seed_error(ours: Sequence[float], theirs: Sequence[float], paired: bool) -> tuple[float, float] | None:
    """(standard error of the difference in means between two settings over seeds, degrees of freedom).

    ours, theirs: a number per run. paired: they are of the same seeds, in the same order. Else Welch's. None where
    either has only one run.
    """
    if min(len(ours), len(theirs)) < 2:
        return None
    if paired:
        differences = np.subtract(ours, theirs)
        return float(differences.std(ddof=1) / math.sqrt(len(ours))), len(ours) - 1
    parts = [np.var(values, ddof=1) / len(values) for values in (ours, theirs)]
    total = float(sum(parts))
    spread = sum(part**2 / (len(v) - 1) for part, v in zip(parts, (ours, theirs), strict=True))
    return math.sqrt(total), total**2 / float(spread) if spread else math.inf


def with_seeds(draws: np.ndarray, error: float, freedom: float) -> np.ndarray:
    """Draws [RESAMPLES] over photographs, each with an effect of the seeds besides."""
    rng = np.random.default_rng(1)
    effect = rng.standard_normal(len(draws)) if math.isinf(freedom) else rng.standard_t(freedom, len(draws))
    return draws + error * effect
