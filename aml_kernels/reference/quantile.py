"""sample_quantile, defined."""

import torch
from torch import Tensor

# Where in the order the quantile lies, q * (n - 1), is computed by torch.quantile in fp32 up to PyTorch 2.13 (and so
# is off by several places in long rows) and in fp64 since; its equal has to do the same. (TorchVersion compares with
# tuples by methods made at run time, which its type does not show.)
RANK_IN_FP64 = torch.__version__ >= (2, 14)  # type: ignore[operator]
LONGEST_ROW = 2**24  # of torch.quantile, up to PyTorch 2.13


def working_type(tensor: Tensor) -> torch.dtype:
    """What is computed in for inputs of this type: fp64 for fp64, else fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@torch.no_grad()
def sample_quantile(
    values: Tensor, q: float | Tensor, *, valid: Tensor | None = None, interpolation: str = "linear",
) -> Tensor:
    dtype = working_type(values)
    rows = values.reshape(values.shape[0], -1).to(dtype)
    if valid is None and not isinstance(q, Tensor) and (RANK_IN_FP64 or rows.shape[1] < LONGEST_ROW):
        return torch.quantile(rows, q, dim=1, interpolation=interpolation)

    # The same per row with rows of different lengths: left-out values sort behind all others (as does NaN, which
    # makes the result NaN, as torch.quantile does).
    exists = torch.ones_like(rows, dtype=torch.bool) if valid is None else valid.reshape(valid.shape[0], -1)
    count = exists.sum(1)
    ordered = rows.where(exists, torch.full_like(rows, torch.inf)).sort(1).values
    q = torch.as_tensor(q, dtype=dtype, device=rows.device)
    rank = (q.double() if RANK_IN_FP64 else q).nan_to_num().clamp(0, 1) * (count - 1).clamp_min(0)
    if interpolation in ("lower", "higher", "nearest"):
        rank = {"lower": torch.floor, "higher": torch.ceil, "nearest": torch.round}[interpolation](rank)
    below = rank.long().clamp_max(rows.shape[1] - 1)
    low = ordered.gather(1, below[:, None]).squeeze(1)
    high = ordered.gather(1, rank.ceil().long().clamp_max(rows.shape[1] - 1)[:, None]).squeeze(1)
    if interpolation == "linear":
        low = torch.lerp(low, high, (rank - below).to(dtype))
    elif interpolation == "midpoint":
        low = torch.lerp(low, high, torch.full_like(low, 0.5))
    undefined = (count == 0) | (rows.isnan() & exists).any(1) | ~((q >= 0) & (q <= 1))
    return low.masked_fill(undefined, torch.nan)
