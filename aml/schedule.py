"""The learning rate of CARIS and its kin: linear warm-up, then a polynomial fall to 0."""

from __future__ import annotations

POWER = 0.9
WARMUP_START = 1e-3  # share of the full rate at which the warm-up begins


def learning_rate_factor(
    step: int, total: int, warmup_steps: int, full_rate_first: bool = False, start: float = WARMUP_START
) -> float:
    """What the rate of every group is multiplied with at a step, counted from 0, of `total`.

    The fall is (1 - step / total) ** 0.9 from the first step on; the warm-up covers its beginning.
    full_rate_first: step 0 runs at the full rate, before the warm-up, as in the released program.
    """
    if step == 0 and full_rate_first:
        return 1.0
    if step <= warmup_steps and warmup_steps:
        return 1 - (1 - step / warmup_steps) * (1 - start)
    return (1 - step / total) ** POWER
