"""sample_quantile: a quantile of each sample, without sorting."""

from torch import Tensor

from . import _checks, reference
from ._backend import choose
from ._library import Operator
from .reference.quantile import RANK_IN_FP64, working_type

INTERPOLATIONS = ("linear", "lower", "higher", "midpoint", "nearest")


def sample_quantile(
    values: Tensor, q: float | Tensor, *, valid: Tensor | None = None, interpolation: str = "linear",
    backend: str | None = None,
) -> Tensor:
    """The `q`-quantile of each sample's valid values: `torch.quantile(values[b][valid[b]].float(), q)` for each b.

    Bit-equal to it, for rows of any length, by selection on the bits of the numbers instead of sorting. (Where +0.0
    and -0.0 are both in a sample, -0.0 comes first; `torch.quantile` leaves their order open.)

    Args:
        values: `[B, ...]`, fp32, bf16, fp16 or fp64; any strides.
        q: in [0, 1]; a number, or a float tensor `[B]` with one for each sample. Values of a tensor outside [0, 1]
            give NaN.
        valid: bool, the shape of `values`; false = not there.
        interpolation: "linear", "lower", "higher", "midpoint" or "nearest", as in `torch.quantile`.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses.

    Returns:
        `[B]` in fp32 (fp64 for fp64 `values`), without gradient. NaN for a sample with no valid value or with a NaN
        among its valid values.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or device.
    """
    _checks.tensor("values", values, tuple(range(1, 9)), _checks.FLOAT_TYPES, "[B, ...]")
    if isinstance(q, Tensor):
        _checks.tensor("q", q, (1,), _checks.FLOAT_TYPES, "[B]")
        _checks.shape("q", q, values.shape[:1], "one per sample")
        for_all, per_sample = 0.0, q
    else:
        q = _checks.number("q", q, 0.0, 1.0)
        for_all, per_sample = q, None
    if valid is not None:
        _checks.tensor("valid", valid, (values.dim(),), _checks.MASK_TYPES, "[B, ...]")
        _checks.shape("valid", valid, values.shape, "that of values")
    _checks.same_device(values=values, q=per_sample, valid=valid)
    _checks.one_of("interpolation", interpolation, INTERPOLATIONS)
    chosen = choose(backend, values.device, values=values)
    if chosen == "reference":
        return reference.sample_quantile(values, q, valid=valid, interpolation=interpolation)
    return _quantile(
        chosen, values, for_all, None if per_sample is None else per_sample.to(working_type(values)), valid,
        INTERPOLATIONS.index(interpolation), RANK_IN_FP64,
    )


def _fake(values, q, q_per_sample, valid, interpolation, rank_in_fp64):
    return values.new_empty(values.shape[:1], dtype=working_type(values))


_quantile = Operator(
    "sample_quantile(Tensor values, float q, Tensor? q_per_sample, Tensor? valid, int interpolation, "
    "bool rank_in_fp64) -> Tensor",
    _fake,
)
