"""On a GPU the definitions run as they are: the same results as on the CPU, on the GPU's own tensors."""

import pytest
import torch

import aml_kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def inputs(device):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "logits": torch.randn(2, 28, 28, generator=generator),
        "target": torch.rand(2, 56, 56, generator=generator) > 0.7,
        "visual": torch.randn(2, 32, 7, 7, generator=generator),
        "text": torch.randn(2, 5, 32, generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def test_loss_and_gradient():
    results = []
    for device in ("cpu", "cuda"):
        tensors = inputs(device)
        tensors["logits"].requires_grad_()
        loss, stats = aml_kernels.aml_loss(**tensors, quantile=0.25, return_stats=True, backend="reference")
        loss.backward()
        assert loss.device.type == stats.kept.device.type == device
        results.append((loss.detach().cpu(), tensors["logits"].grad.cpu()))
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_a_sample_without_a_word_has_similarity_zero():
    tensors = inputs("cuda")
    mask = torch.ones(2, 5, dtype=torch.bool, device="cuda")
    mask[1] = False
    similarity = aml_kernels.pixel_text_similarity(tensors["visual"], tensors["text"], mask)
    assert similarity[0].any() and not similarity[1].any()
