"""filter_regions: which blocks fall, which pixels change."""

from math import ceil

import pytest
import textbook
import torch
from helpers import LAYOUTS, coin, here, laid_out, normal, same_bits
from torch.nn import functional

from aml_kernels import filter_regions
from aml_kernels.reference.region_filter import philox_keys


def inputs_of(size=(70, 97), map=(5, 7), dtype=torch.float32, batch=3, seed=0, layouts=("transposed", "cut")):
    image = normal(seed, batch, 3, *size)
    image = (image * 40 + 128).clamp(0, 255).to(dtype) if dtype == torch.uint8 else image.to(dtype)
    return laid_out(image, layouts[0]), laid_out(normal(seed + 1, batch, *map), layouts[1])


def philox(counter, key):
    """Philox-4x32-10 with Python's whole numbers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_known_answers():
    """Those published with Random123, for the generator above; the keys of the blocks are its numbers."""
    assert philox((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert philox(*pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    for seed in (0, 1, 2**32 - 1, 2**32, 0xDEADBEEF12345678, 2**64 - 1):
        expected = [[philox((b, s, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))[0] for b in range(9)] for s in range(4)]
        assert philox_keys(seed, 4, 9).tolist() == expected


def expected_blocks(similarity, size, block, limit, ratio, seed, protect=None):
    """Pixel by pixel and block by block, on the CPU."""
    similarity, limit = similarity.cpu(), limit.cpu()
    protect = None if protect is None else protect.cpu()
    samples, (rows, columns) = len(similarity), size
    resized = functional.interpolate(similarity.double()[:, None], size, mode="bilinear")[:, 0]
    dropped = torch.zeros(samples, ceil(rows / block), ceil(columns / block), dtype=torch.bool, device="cpu")
    for s in range(samples):
        assert ((resized[s] - limit[s]).abs() > 1e-6).all(), "the test's numbers lie on the threshold"
        weak = []
        for index in range(dropped[0].numel()):
            y, x = index // dropped.shape[2] * block, index % dropped.shape[2] * block
            area = (s, slice(y, y + block), slice(x, x + block))
            if (resized[area] < limit[s]).any() and not (protect is not None and protect[area].any()):
                weak.append((philox((index, s, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))[0], index))
        for _, index in sorted(weak)[: int(ratio * len(weak) + 0.5)]:
            dropped[s].view(-1)[index] = True
    return here(dropped)


@pytest.mark.parametrize("seed", (0, 7, 2**63 + 5))
@pytest.mark.parametrize("map_size", [(5, 7), (80, 99), (1, 1)], ids=str)
@pytest.mark.parametrize("block", (1, 16, 32, 200))
def test_blocks(backend, block, map_size, seed):
    size = (11, 19) if block == 1 else (70, 97)  # with blocks cut off at the edge
    image, similarity = inputs_of(size, map_size)
    protect = coin(5, 3, *size, share=0.002)
    limits = torch.tensor([0.1234, -0.4321, 0.7531])
    for ratio in (0.25, 1.0, 0.0):
        for mask in (None, protect):
            filtered, dropped = filter_regions(
                image, similarity, threshold=limits, drop_ratio=ratio, block_size=block, protect=mask, seed=seed,
                backend=backend,
            )
            assert torch.equal(dropped, expected_blocks(similarity, size, block, limits, ratio, seed, mask))
            pixels = dropped.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, None, : size[0], : size[1]]
            assert same_bits(filtered, image.where(~pixels, torch.zeros(())))


@pytest.mark.timeout(60)
def test_a_block_that_is_larger_than_the_image_costs_no_more(backend):
    image, similarity = inputs_of((9, 11), (3, 4))
    options = {"threshold": 0.1234, "drop_ratio": 1.0, "seed": 1, "backend": backend}
    for protect in (None, coin(5, 3, 9, 11, share=0.01)):
        filtered, dropped = filter_regions(image, similarity, block_size=2**31 - 1, protect=protect, **options)
        expected = filter_regions(image, similarity, block_size=11, protect=protect, **options)
        assert same_bits(filtered, expected[0]) and torch.equal(dropped, expected[1]) and dropped.shape == (3, 1, 1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8), ids=str)
def test_fill_and_types(backend, dtype):
    image, similarity = inputs_of(dtype=dtype)
    for fill in (0.0, 7, (1, 2, 250)):
        filtered, dropped = filter_regions(
            image, similarity, quantile=0.5, drop_ratio=0.5, block_size=16, fill=fill, seed=3, backend=backend,
        )
        pixels = dropped.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None, :70, :97].expand_as(image)
        colour = torch.tensor([fill] * 3 if isinstance(fill, (int, float)) else fill).to(dtype).reshape(1, 3, 1, 1)
        assert dropped.any() and filtered.dtype == dtype
        assert same_bits(filtered, torch.where(pixels, colour, image))


@pytest.mark.parametrize("map_dtype", (torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("quantile", (0.0, 0.25, 1.0))
def test_quantile_is_that_of_the_map(backend, quantile, map_dtype):
    image, similarity = inputs_of()
    similarity = similarity.to(map_dtype)
    wide = similarity if map_dtype == torch.float64 else similarity.float()
    limits = textbook.quantile(wide, quantile)
    by_quantile, by_limit = (
        filter_regions(image, similarity, **limit, block_size=8, drop_ratio=1.0, seed=1, backend=backend)
        for limit in ({"quantile": quantile}, {"threshold": limits})
    )
    assert same_bits(by_quantile[0], by_limit[0]) and torch.equal(by_quantile[1], by_limit[1])
    assert by_quantile[1].any() == (quantile > 0)  # nothing lies below the smallest value


def test_the_same_on_every_back_end(backend):
    for seed, size in enumerate([(70, 97), (64, 64), (31, 200)]):
        image, similarity = inputs_of(size, (14, 14), seed=seed)
        similarity.copy_((similarity * 4).round() / 4)  # many pixels on the threshold
        for options in ({"quantile": 0.25}, {"quantile": 0.75}, {"threshold": 0.25}):
            options |= {"drop_ratio": 0.4, "block_size": 8, "seed": seed}
            filtered, dropped = filter_regions(image, similarity, **options, backend=backend)
            expected = filter_regions(image.cpu(), similarity.cpu(), **options, backend="reference")
            assert same_bits(filtered.cpu(), expected[0]) and torch.equal(dropped.cpu(), expected[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    options = {"quantile": 0.5, "block_size": 8, "seed": 2, "backend": backend}
    plain = filter_regions(*inputs_of(layouts=("contiguous",) * 2), **options)
    other = filter_regions(*inputs_of(layouts=(layout,) * 2), **options)
    assert same_bits(plain[0], other[0]) and torch.equal(plain[1], other[1])
    image, similarity = inputs_of(batch=1)
    protect = laid_out(coin(4, 2, 70, 97, share=0.001), layout)
    wide = filter_regions(
        image.expand(2, -1, -1, -1), similarity.expand(2, -1, -1), protect=protect, **options,
    )
    alone = filter_regions(image, similarity, protect=protect[:1], **options)
    assert same_bits(wide[0][:1], alone[0]) and torch.equal(wide[1][:1], alone[1])


@pytest.mark.large
def test_every_weak_block_is_as_likely(backend):
    """Over many seeds each of 16 weak blocks falls in a quarter of the cases; seeds and samples differ."""
    image, similarity = torch.zeros(4, 1, 16, 16), torch.zeros(4, 4, 4)
    dropped = torch.stack([
        filter_regions(image, similarity, threshold=1.0, block_size=4, seed=seed, backend=backend)[1]
        for seed in range(250)
    ])
    assert (dropped.sum((2, 3)) == 4).all()
    share = dropped.float().mean((0, 1))
    assert (share - 0.25).abs().max() < 0.06  # 4 standard deviations of 1000 draws: 0.055
    assert len(dropped.flatten(0, 1).flatten(1).unique(dim=0)) > 500


def test_inputs_are_not_written_to(backend):
    image, similarity = inputs_of()
    before = image.clone(), similarity.clone(), image._version, similarity._version
    filtered, _ = filter_regions(image, similarity, quantile=1.0, drop_ratio=1.0, block_size=8, seed=0, backend=backend)
    assert not same_bits(filtered, before[0])
    assert same_bits(image, before[0]) and same_bits(similarity, before[1])
    assert (image._version, similarity._version) == before[2:]


@pytest.mark.parametrize("drop_ratio", (0.0, 1.0))
def test_the_result_is_a_new_contiguous_tensor(backend, drop_ratio):
    for layout in LAYOUTS:
        image, similarity = inputs_of(layouts=(layout, "cut"))
        filtered, _ = filter_regions(image, similarity, quantile=0.5, drop_ratio=drop_ratio, seed=0, backend=backend)
        assert filtered.is_contiguous() and filtered.data_ptr() != image.data_ptr(), layout
