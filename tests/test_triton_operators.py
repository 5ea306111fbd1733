"""The Triton operators called by themselves, without the checks of the public functions."""

import pytest
import torch
from helpers import coin, loss_inputs, normal

from aml_kernels import _backend, masked_loss
from aml_kernels.reference.quantile import RANK_IN_FP64

pytestmark = pytest.mark.usefixtures("interpreted")
OPERATORS = torch.ops.aml_kernels


def operator_calls():
    """For each operator the arguments of a call."""
    visual, text, mask = normal(1, 2, 9, 3, 4), normal(2, 2, 4, 9), coin(3, 2, 4) | (torch.arange(4) == 1)
    inputs = loss_inputs(batch=2, logits=(5, 6), target=(8, 9), map=(3, 4))
    z, y, s, valid, map_valid = (inputs[x] for x in ("logits", "target", "similarity", "valid", "map_valid"))
    rest = (1.0, 0.5, 0.9, 1.1, 1e-5)
    limits = (None, None, 0.3, RANK_IN_FP64, True, *rest)
    sums = torch.tensor([[0.0, 0.7, 0.5, 20.0, 20.0, 10.0, 9.0]]).expand(2, 7).contiguous()
    leaf, leaf_visual, leaf_text = (x.detach().requires_grad_() for x in (z, visual, text))
    return {
        "pixel_text_similarity": (leaf_visual, leaf_text, mask, True, 2.0, False),
        "pixel_text_similarity_backward": (normal(4, 2, 3, 4), visual, text, mask, True, 2.0, True),
        "sample_quantile": (s, 0.3, None, map_valid, 0, RANK_IN_FP64),
        "masked_loss": (leaf, y, s, valid, map_valid, *limits, 0),
        "masked_loss_backward": (torch.tensor(1.0), z, y, s, valid, sums, True, *rest, 0),
        "aml_loss": (leaf, y, visual, text, mask, valid, map_valid, True, 1.0, False, *limits, 0),
        "filter_regions": (normal(5, 2, 3, 8, 9), s, valid, None, None, 0.5, RANK_IN_FP64, 0.5, 4, [0.0, 1.0, 2.0], 7),
    }


def test_the_operator_has_the_schema_of_its_default():
    for name in operator_calls():
        default, forced = getattr(OPERATORS, name).default._schema, getattr(OPERATORS, f"{name}_triton").default._schema
        assert str(forced) == str(default).replace(f"::{name}(", f"::{name}_triton(")


def test_whole_numbers_arrive_as_floats(monkeypatch):
    """Triton would compile another program for a 1 in place of 1.0."""
    from aml_kernels.masked_loss import _forward

    inputs, given = loss_inputs(), []
    monkeypatch.setattr(_forward, "_load", lambda: lambda *arguments: given.extend(arguments) or (torch.zeros(()),) * 3)
    masked_loss(**inputs, threshold=0, bce_weight=1, dice_weight=2, class_weight=(1, 3), smooth=1, backend="triton")
    types = [str(argument.type) for argument in _forward.default._schema.arguments]
    numbers = [value for value, kind in zip(given, types, strict=True) if "float" in kind and value is not None]
    assert numbers == [0, 1, 2, 1, 3, 1] and all(type(value) is float for value in numbers)


def test_a_default_call_on_a_gpu_is_traced_as_such(monkeypatch):
    """Where Triton is what the default operator runs, a program keeps the operator that runs on any device."""
    from aml_kernels.masked_loss import _forward

    for cuda_missing, forced in (("built without CUDA", _forward.default), (None, _forward.triton)):
        monkeypatch.setattr(_backend, "CUDA_MISSING", cuda_missing)
        assert _forward.variant("triton", "cuda") is forced
        assert _forward.variant("triton", "cpu") is _forward.triton
        assert _forward.variant("cuda", "cuda") is _forward.variant("cpu", "cpu") is _forward.default


@pytest.mark.parametrize(
    ("name", "position", "wrong"),
    (
        ("masked_loss", 0, torch.zeros(3, 5, 6)), ("masked_loss", 0, torch.zeros(2, 5, 6, dtype=torch.int64)),
        ("masked_loss", 1, torch.zeros(2, 8, 9, dtype=torch.int64)), ("masked_loss", 1, torch.zeros(1, 8, 9)),
        ("masked_loss", 2, torch.zeros(1, 3, 4)), ("masked_loss", 2, None), ("masked_loss", 3, coin(0, 1, 8, 9)),
        ("masked_loss", 4, coin(0, 2, 2, 4)), ("masked_loss_backward", 5, torch.zeros(2, 6)),
        ("masked_loss_backward", 0, torch.zeros(2)), ("pixel_text_similarity", 0, torch.zeros(9, 3, 4)),
        ("pixel_text_similarity", 1, torch.zeros(2, 4, 8)), ("pixel_text_similarity", 2, coin(0, 2, 3)),
        ("pixel_text_similarity_backward", 0, torch.zeros(2, 3, 3)), ("sample_quantile", 0, torch.zeros(2, 3).long()),
        ("sample_quantile", 2, torch.zeros(3)), ("sample_quantile", 3, coin(0, 2, 3, 3)),
        ("aml_loss", 2, torch.zeros(3, 9, 3, 4)), ("aml_loss", 6, coin(0, 2, 4, 4)),
        ("filter_regions", 1, torch.zeros(1, 3, 4)), ("filter_regions", 2, coin(0, 2, 8, 8)), ("filter_regions", 8, 0),
        ("filter_regions", 9, [0.0]),
    ),
    ids=lambda x: str(x)[:20].replace("\n", ""),
)
def test_operators_called_without_the_public_functions(name, position, wrong):
    """Nothing is launched that would read or write outside a tensor."""
    arguments = list(operator_calls()[name])
    arguments[position] = wrong
    with pytest.raises(ValueError, match=r"^\w+: expected .*, got "), torch.no_grad():
        getattr(OPERATORS, f"{name}_triton")(*arguments)
