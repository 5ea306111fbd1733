"""More than 2^31 elements: offsets of 32 bits would wrap around. Results are known in advance; no oracle has room."""

import pytest
import torch

from aml_kernels import filter_regions, masked_loss, pixel_text_similarity, sample_quantile

SIDE = 46_400  # SIDE * SIDE is 2^31 and 5 million


@pytest.mark.parametrize("shape", ((1, SIDE, SIDE), (3, 26_768, 26_768)), ids=("one sample", "three samples"))
def test_masked_loss(backend, room, shape):
    """Logits 0 and target 0 but for the last rows of the last sample, where both are large or 1."""
    room(14)
    assert torch.Size(shape).numel() > 2**31
    logits = torch.zeros(shape, dtype=torch.bfloat16)
    target = torch.zeros(shape, dtype=torch.uint8)
    logits[-1, -10:], target[-1, -10:] = 4.0, 1
    leaf = logits.requires_grad_()
    loss, stats = masked_loss(leaf, target, dice_weight=0.0, reduction="none", return_stats=True, backend=backend)
    pixels, marked = shape[1] * shape[2], 10 * shape[2]
    assert stats.kept.tolist() == [pixels] * shape[0]
    assert stats.kept_target.tolist() == [*[0] * (shape[0] - 1), marked] == stats.intersection.tolist()
    at_zero, at_four = torch.tensor([0.0, -4.0], dtype=torch.float64, device="cpu").exp().log1p().tolist()
    expected = torch.full_like(loss, at_zero)
    expected[-1] = ((pixels - marked) * at_zero + marked * at_four) / pixels
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.sum().backward()
    slope = leaf.grad[-1, -12:, -1].float() * pixels
    torch.testing.assert_close(slope[:2], torch.full_like(slope[:2], 0.5), rtol=1e-2, atol=0)
    torch.testing.assert_close(slope[2:], torch.full_like(slope[2:], -0.0179862), rtol=1e-2, atol=0)


def test_sample_quantile(backend, room):
    room(6)
    values = torch.zeros(1, SIDE * SIDE, dtype=torch.bfloat16)
    values[0, -1], values[0, -2] = 2.0, -1.0
    assert [sample_quantile(values, q, backend=backend).item() for q in (0.0, 0.5, 1.0)] == [-1.0, 0.0, 2.0]


def test_similarity(backend, room):
    """The last row of a map equals that row alone."""
    room(7)
    visual = torch.randn(1, 64, 5800, 5800, dtype=torch.bfloat16)
    text = torch.randn(1, 5, 64, dtype=torch.bfloat16)
    assert visual.numel() > 2**31
    whole = pixel_text_similarity(visual, text, backend=backend)[:, -1:]
    alone = pixel_text_similarity(visual[:, :, -1:], text, backend=backend)
    torch.testing.assert_close(whole, alone, rtol=1e-6, atol=1e-6)


def test_filter_regions(backend, room):
    room(7)
    image, similarity = torch.zeros(1, 3, 26_768, 26_768, dtype=torch.uint8), torch.zeros(1, 4, 4)
    filtered, blocks = filter_regions(
        image, similarity, threshold=1.0, drop_ratio=1.0, block_size=512, fill=1, seed=0, backend=backend,
    )
    assert blocks.all() and filtered.sum(dtype=torch.int64).item() == image.numel() > 2**31
