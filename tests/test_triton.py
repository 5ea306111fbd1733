"""What the common tests do not show of the Triton kernels: independence of order and of index types, 16-bit numbers."""

import pytest
import torch
from helpers import coin, loss_inputs, normal, same_bits

from aml_kernels import _backend, aml_loss, filter_regions, masked_loss, pixel_text_similarity, sample_quantile

pytestmark = pytest.mark.usefixtures("interpreted")

if _backend.missing("triton", "cpu") is None:
    import interpreter
    import triton
    import triton.language as tl

    from aml_kernels.triton import arithmetic, features, masked_loss_backward, quantile, tensors
    from aml_kernels.triton.masked_loss import PARTIALS, add_up, of

    @triton.jit
    def round_kernel(x, out, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(out + i, arithmetic.narrow(tl.load(x + i), tl.bfloat16))

    @triton.jit
    def widen_kernel(x, out, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(out + i, arithmetic.widen(tl.load(x + i)))

    @triton.jit
    def add_up_kernel(x, count, out, PARTIALS: tl.constexpr):
        total = add_up(x, count, 1, 2, PARTIALS)
        tl.store(out, of(total, 0))


def everything():
    """All operators and their gradients; every kernel with several programs to a sample."""
    results = []

    def differentiate(function, *leaves):
        leaves = [x.detach().requires_grad_() for x in leaves]
        output = function(*leaves)
        loss, stats = output if isinstance(output, tuple) else (output, ())
        loss.sum().backward()
        results.extend([loss.detach(), *stats, *(leaf.grad for leaf in leaves)])

    options = {"quantile": 0.3, "class_weight": (0.9, 1.1), "return_stats": True, "backend": "triton"}
    for size in ((130, 150), (40, 45)):
        inputs = loss_inputs(batch=2, logits=size, target=(130, 150), map=(9, 11), dtype=torch.bfloat16)
        z = inputs.pop("logits")
        differentiate(lambda x, inputs=inputs: masked_loss(x, **inputs, **options), z)
    visual, text, mask = normal(7, 2, 40, 17, 18), normal(8, 2, 35, 40), coin(9, 2, 35) | (torch.arange(35) == 3)
    differentiate(
        lambda v, u: pixel_text_similarity(v, u, mask, softmax=True, scale=5.0, backend="triton"), visual, text,
    )
    rest = {name: inputs[name] for name in ("target", "valid")}
    differentiate(lambda x: aml_loss(x, visual=visual, text=text, text_mask=mask, **rest, **options), z)
    results.append(sample_quantile(z, 0.3, backend="triton"))
    image = normal(3, 2, 3, 70, 140)
    results.extend(filter_regions(image, inputs["similarity"], quantile=0.5, block_size=8, seed=5, backend="triton"))
    return results


@pytest.fixture
def small_shares(monkeypatch):
    """Few values are a long sample, and few pixels many."""
    monkeypatch.setattr(quantile, "ONE_PROGRAM", 50)
    monkeypatch.setattr(quantile, "SHARE", 64)
    monkeypatch.setattr(quantile, "BLOCK", 32)


def test_results_do_not_depend_on_the_order_of_the_programs(small_shares):
    expected = everything()
    for seed in range(3):
        with interpreter.programs_in_any_order(seed):
            actual = everything()
        for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert same_bits(a, b), f"order {seed}: result {index} of everything() differs"


def test_the_order_is_another_one():
    """Otherwise the test above shows nothing."""
    seen = []
    builder = interpreter.interpreter.interpreter_builder
    with interpreter.programs_in_any_order(1):
        builder.set_grid_dim(8, 1, 1)
        for i in range(8):
            builder.set_grid_idx(i, 0, 0)
            seen.append(builder.grid_idx[0])
    assert sorted(seen) == list(range(8)) != seen


def test_no_whole_number_overflows():
    with interpreter.overflow_is_an_error():
        everything()


def test_offsets_of_64_bits(monkeypatch):
    expected = everything()
    for module in (tensors, features):
        monkeypatch.setattr(module, "index_type", lambda *_: tl.int64)
    for a, b in zip(everything(), expected, strict=True):
        assert same_bits(a, b)


def test_offsets_are_wide_where_they_have_to_be():
    def choose(*planes):
        return tensors.loss_index_type(*planes)

    small, many = torch.empty(9, 480, 480, device="meta"), torch.empty(20_000, 480, 480, device="meta")
    assert choose(small, None) == choose(many, small) == tl.int32  # samples have pointers of their own
    assert choose(small, torch.empty(1, 40_000, 40_000, device="meta")) == tl.int64
    assert choose(many.movedim(0, -1).contiguous().movedim(-1, 0)) == tl.int64  # 480 * 480 * 20000 elements apart
    assert choose(torch.empty(1, 1, 100_000, device="meta")) == tl.int64  # numerators of coordinates

    def choose_for(words):
        visual, text = torch.empty(1, 4, 4096, 4096, device="meta"), torch.empty(1, words, 4, device="meta")
        return features.features(visual, text, None, True)[-1]["INDEX"]

    assert choose_for(20) == tl.int32 and choose_for(100) == tl.int64  # a coefficient for each pixel and word


def test_bf16_is_rounded_to_nearest_even():
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64, generator=torch.Generator().manual_seed(0))
    bits[:1024] = (bits[:1024] & ~0xFFFF) | 0x8000  # ties
    x = bits.to(torch.int32).view(torch.float32)
    x[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38])
    out = torch.empty(4096, dtype=torch.bfloat16)
    round_kernel[(1,)](x, out, BLOCK=4096)
    assert ((out == x.bfloat16()) | (out.isnan() & x.isnan())).all()
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    wide = torch.empty(2**16)
    widen_kernel[(1,)](every, wide, BLOCK=2**16)
    assert same_bits(wide.nan_to_num(7.0), every.float().nan_to_num(7.0))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # inf - inf, which is selected away
def test_partial_sums_of_a_large_image_add_up():
    """Added in fp32 one by one, 400 equal numbers to a lane are wrong by 1.7e-6, 1600 by 1.5e-5."""
    x, out = torch.full((400 * PARTIALS,), 2839.1309), torch.empty(())
    lane = torch.where(torch.arange(len(x)) % PARTIALS == 5, x, 0)  # of several, the interpreter rounds the last sum
    add_up_kernel[(1,)](lane, len(x), out, PARTIALS=PARTIALS)
    torch.testing.assert_close(out.double(), lane.double().sum(), rtol=1e-7, atol=0)
    x[PARTIALS] = torch.inf
    add_up_kernel[(1,)](x, 4 * PARTIALS, out, PARTIALS=PARTIALS)
    assert out == torch.inf
    counts, out = torch.full((3 * PARTIALS,), 2**30, dtype=torch.int32), torch.empty((), dtype=torch.int64)
    add_up_kernel[(1,)](counts, len(counts), out, PARTIALS=PARTIALS)
    assert out == 3 * PARTIALS * 2**30


def test_the_logits_of_a_program_were_blended_into_few_columns():
    """For each number of logits that a program may have, and whichever they are."""
    most = masked_loss_backward.COLUMNS
    for source in (1, 2, 3, 7, 15, 30, 119, 120, 480, 1000):
        for destination in (1, 16, 127, 128, 129, 479, 480, 2000):
            n = masked_loss_backward.cells_across(source, destination)
            # The first column at each logit or behind it; index i lies at i (source - 1) / (destination - 1).
            at = [-(-k * (destination - 1) // max(source - 1, 1)) for k in range(source)]
            ends = [0, *at, destination, destination] if destination > 1 else [0, 0, *[1] * (source + 1)]
            step = max(n, 1)
            windows = [ends[min(k + step, source) + 1] - ends[k] // 4 * 4 for k in range(0, source, step)]
            assert n == 0 or (n <= most and max(windows) <= most), (source, destination)
            assert n > 0 or max(windows) > most // 2, (source, destination)  # 0 only where one has many
    assert masked_loss_backward.cells_across(120, 480) == 30


# Logits that were blended into more columns than a program has at a time, into one pixel, and into none.
@pytest.mark.parametrize(
    "size, target", (((1, 1), (20, 300)), ((2, 3), (20, 500)), ((5, 300), (9, 150)), ((1, 7), (1, 1))),
)
def test_gradients_of_logits_of_any_other_size(size, target):
    inputs = loss_inputs(batch=2, logits=size, target=target, map=(3, 5))
    z = inputs.pop("logits").requires_grad_()
    expected, actual = (
        torch.autograd.grad(masked_loss(x, **inputs, quantile=0.3, backend=backend), z)[0]
        for x, backend in ((z.double(), "reference"), (z, "triton"))
    )
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-5, atol=1e-6 * float(expected.abs().max()))
