"""What PyTorch does with calls beside running them: derivatives in forward mode, tensors without data, compiling."""

import pytest
import torch
from helpers import coin, normal
from test_bad_input import CALLS
from torch.autograd import forward_ad

import aml_kernels
from aml_kernels import aml_loss, masked_loss, pixel_text_similarity

LOGITS, TARGET, SIMILARITY = normal(0, 2, 4, 5), coin(1, 2, 8, 10), normal(2, 2, 3, 3)
VISUAL, TEXT = normal(3, 2, 6, 3, 3), normal(4, 2, 4, 6)
DIFFERENTIABLE = {
    "masked_loss": (lambda x: masked_loss(x, TARGET), LOGITS),
    "aml_loss": (lambda x: aml_loss(x, TARGET, VISUAL, TEXT, quantile=0.3), LOGITS),
    "similarity of pixels": (lambda x: pixel_text_similarity(x, TEXT), VISUAL),
    "similarity of words": (lambda x: pixel_text_similarity(VISUAL, x), TEXT),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_derivative_in_forward_mode_is_refused(name, cpu):
    """PyTorch takes that of an operator that has none for 0."""
    function, x = DIFFERENTIABLE[name]
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="forward mode"):
            function(forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.equal(function(x), function(x.clone()))  # a constant beside tangents


@pytest.mark.parametrize("name", CALLS)
def test_tensors_without_data_tell_shapes(name):
    function, arguments = getattr(aml_kernels, name), CALLS[name]
    expected = function(**arguments, backend="reference")
    found = function(**{key: x.to("meta") if isinstance(x, torch.Tensor) else x for key, x in arguments.items()})
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        assert a.is_meta and (a.shape, a.dtype) == (b.shape, b.dtype)


def test_compiled_as_eager_no_gradient_flows_through_the_map(cpu):
    similarity = SIMILARITY.clone().requires_grad_()
    limits = torch.zeros(2, requires_grad=True)
    for options in ({"quantile": 0.3}, {"threshold": limits}):

        def loss(map_, options=options):
            return masked_loss(LOGITS, TARGET, map_, **options)

        assert not loss(similarity).requires_grad
        assert not torch.compile(loss, fullgraph=True, backend="aot_eager")(similarity).requires_grad


@pytest.mark.parametrize("name", ("logits", "target", "similarity"))
def test_tensors_of_other_layouts_are_refused(name):
    given = {"logits": LOGITS, "target": TARGET, "similarity": SIMILARITY}
    with pytest.raises(TypeError, match=f"{name}: expected a dense tensor .* got .*sparse"):
        aml_kernels.masked_loss(**given | {name: given[name].to_sparse()}, quantile=0.3)
