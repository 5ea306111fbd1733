"""What the common tests do not show of the Triton kernels, in Triton's interpreter."""

import math
import struct

import pytest
import textbook
import torch
from helpers import coin, kept_pixels, loss_inputs, normal, same_bits, uniform

from aml_kernels import _backend, aml_loss, filter_regions, masked_loss, pixel_text_similarity, sample_quantile
from aml_kernels.reference.quantile import RANK_IN_FP64

MISSING = _backend.missing("triton", "cpu")
OPERATORS = torch.ops.aml_kernels
pytestmark = [pytest.mark.skipif(MISSING is not None, reason=str(MISSING)), pytest.mark.usefixtures("conditions")]

if MISSING is None:
    import interpreter
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    from aml_kernels.triton import arithmetic, features, masked_loss_backward, quantile, tensors

    @triton.jit
    def round_kernel(x, out, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(out + i, arithmetic.narrow(tl.load(x + i), tl.bfloat16))

    @triton.jit
    def widen_kernel(x, out, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(out + i, arithmetic.widen(tl.load(x + i)))

    @triton.jit
    def rank_kernel(
        q, count, below, above, weight, INTERPOLATION: tl.constexpr, IN_FP64: tl.constexpr, BLOCK: tl.constexpr,
    ):
        i = tl.arange(0, BLOCK)
        b, a, w = quantile.quantile_rank(tl.load(q + i), tl.load(count + i), INTERPOLATION, IN_FP64)
        tl.store(below + i, b)
        tl.store(above + i, a)
        tl.store(weight + i, w)


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


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched."""
    names = []
    run = InterpretedFunction.run
    monkeypatch.setattr(InterpretedFunction, "run", lambda kernel, *args, **options: (
        names.append(kernel.fn.__name__), run(kernel, *args, **options),
    )[1])
    return names


def test_launches(launched):
    """As few as promised, whatever the arguments; nothing else works on the GPU but what fills new memory."""
    inputs = loss_inputs(batch=2, layouts=("contiguous",))
    z = inputs.pop("logits").requires_grad_()
    visual, text = normal(1, 2, 16, 5, 7), normal(2, 2, 4, 16)
    similarity = inputs.pop("similarity")

    def count(call):
        launched.clear()
        result = call()
        return result, list(launched)

    for limit in ({"quantile": 0.3}, {"threshold": 0.1}, {"threshold": torch.tensor([0.1, 0.2])}, {}):
        loss, names = count(lambda: aml_loss(z, visual=visual, text=text, **inputs, **limit, backend="triton"))  # noqa: B023
        assert names == ["forward_kernel", "limits_kernel", "forward_kernel"]
        assert count(loss.backward)[1] == ["backward_kernel"]
        loss, names = count(lambda: masked_loss(z, similarity=similarity, **inputs, **limit, backend="triton"))  # noqa: B023
        assert names == ["limits_kernel", "forward_kernel"]
    small = normal(3, 2, 6, 9).requires_grad_()
    loss, names = count(lambda: masked_loss(small, similarity=similarity, **inputs, quantile=0.3, backend="triton"))
    assert len(names) == 2 and count(loss.backward)[1] == ["resized_backward_kernel"]
    assert len(count(lambda: sample_quantile(similarity, 0.5, backend="triton"))[1]) == 1
    result, names = count(lambda: pixel_text_similarity(visual.requires_grad_(), text, backend="triton"))
    assert len(names) == 1 and len(count(result.sum().backward)[1]) == 4
    image = normal(4, 2, 3, 20, 20)
    assert len(count(lambda: filter_regions(image, similarity, quantile=0.5, seed=1, backend="triton"))[1]) == 4


@pytest.mark.parametrize("interpolation", ("linear", "lower", "higher", "midpoint", "nearest"))
def test_long_samples(small_shares, interpolation):
    """Counted by many programs, digit by digit."""
    for values in (normal(1, 2, 501), (normal(2, 2, 300) * 2).round(), torch.full((2, 90), -0.5)):
        values[1, 7] = torch.inf
        for valid in (None, coin(3, *values.shape, share=0.7)):
            for q in (0.0, 0.37, 1.0):
                actual = sample_quantile(values, q, valid=valid, interpolation=interpolation, backend="triton")
                expected = textbook.quantile(values, q, valid, interpolation)
                assert ((actual == expected) | (actual.isnan() & expected.isnan())).all()
    values = normal(1, 3, 200)
    values[0, 5] = torch.nan
    q = torch.tensor([0.5, 1.5, 0.5])
    actual = sample_quantile(values, q, interpolation=interpolation, backend="triton")
    assert actual.isnan().tolist() == [True, True, False]
    assert sample_quantile(values, 0.5, valid=torch.zeros(3, 200, dtype=torch.bool), backend="triton").isnan().all()


def test_a_long_map(small_shares):
    inputs = loss_inputs(map=(9, 31))
    results = [masked_loss(**inputs, quantile=0.3, return_stats=True, backend=name) for name in ("triton", "reference")]
    for name in ("threshold", "kept", "kept_target", "intersection", "union"):
        assert torch.equal(*(getattr(stats, name) for _, stats in results)), name


def test_back_ends_agree_bit_for_bit():
    """On thresholds, kept pixels and counts, given the same map; on dropped blocks."""
    names = [name for name in ("reference", "cpu", "triton") if _backend.missing(name, "cpu") is None]
    for seed, (logits, step) in enumerate((((24, 33), 0), ((13, 9), 8), ((48, 40), 1), ((7, 50), 0))):
        inputs = loss_inputs(seed=seed, logits=logits, map=(6, 13), kind="soft")
        if step:  # many pixels on the threshold
            inputs["similarity"] = (inputs["similarity"] * step).round() / step
        for options in ({"quantile": 0.25}, {"quantile": 0.5, "protect_target": True}, {"threshold": 0.125}):
            stats, masks = [], []
            for name in names:
                leaf = inputs["logits"].detach().requires_grad_()
                loss, stat = masked_loss(
                    **(inputs | {"logits": leaf}), **options, dice_weight=0.0, return_stats=True, backend=name,
                )
                loss.backward()
                stats.append(stat)
                masks.append(leaf.grad != 0)
            for field in ("threshold", "kept", "kept_target", "intersection", "union"):
                for other in stats[1:]:  # zeros may have either sign
                    assert torch.equal(getattr(stats[0], field), getattr(other, field)), (seed, options, field)
            for other in masks[1:]:
                assert torch.equal(masks[0], other)
            if logits == (24, 33):
                assert torch.equal(masks[0], kept_pixels(**inputs, **options))
        image = normal(seed, 3, 2, 40, 61)
        blocks = [
            filter_regions(
                image, inputs["similarity"], quantile=0.5, drop_ratio=0.4, block_size=7, seed=seed, backend=name,
            ) for name in names
        ]
        for filtered, dropped in blocks[1:]:
            assert same_bits(filtered, blocks[0][0]) and torch.equal(dropped, blocks[0][1])


def test_equal_keys_are_dropped_in_their_order(monkeypatch):
    """Random keys are equal once in billions of blocks; here they are all alike."""
    from aml_kernels.triton import region_filter

    weak = coin(0, 2, 50, share=0.6).to(torch.uint8)
    keys = torch.full((2, 50), -5, dtype=torch.int32)
    keys[0, 30:] = 7  # as unsigned numbers, before the others
    dropped = torch.empty(2, 50, dtype=torch.uint8)
    region_filter.choose_kernel[(2,)](weak, keys, 50, 0.5, dropped, BLOCK=16)
    for sample in range(2):
        order = sorted((keys[sample, i].item() & 0xFFFFFFFF, i) for i in range(50) if weak[sample, i])
        chosen = sorted(i for _, i in order[: math.floor(0.5 * len(order) + 0.5)])
        assert dropped[sample].nonzero().flatten().tolist() == chosen


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


def place(q: float, count: int, interpolation: int, in_fp64: bool) -> tuple[int, int, float]:
    """By doubles, as PyTorch computes it."""
    rank = q * (count - 1) if in_fp64 else (torch.tensor(q) * torch.tensor(float(count - 1))).item()
    rank = {1: math.floor, 2: math.ceil, 4: round}.get(interpolation, float)(rank)
    weight = 0.5 if interpolation == 3 else struct.unpack("f", struct.pack("f", rank - math.floor(rank)))[0]
    return min(math.floor(rank), count - 1), min(math.ceil(rank), count - 1), weight


@pytest.mark.parametrize("in_fp64", (False, True))
@pytest.mark.parametrize("interpolation", range(5))
def test_ranks_are_those_of_doubles(interpolation, in_fp64):
    q = uniform(0, 2048)
    q[:9] = torch.tensor([0.0, 1.0, 0.5, 0.25, 1e-45, 1e-38, 3e-39, 1e-10, 1 - 2**-24])
    count = (2 ** (36 * uniform(1, 2048, dtype=torch.float64))).long().clamp_min(1)
    count[:300] = torch.arange(1, 301)
    q[300:600] = torch.arange(300) / 300
    q[600:700], count[600:700] = 0.5, torch.arange(100) + 2**30
    below, above, weight = torch.empty_like(count), torch.empty_like(count), torch.empty_like(q)
    rank_kernel[(1,)](q, count, below, above, weight, INTERPOLATION=interpolation, IN_FP64=in_fp64, BLOCK=2048)
    for i in range(2048):
        b, a, w = place(q[i].item(), count[i].item(), interpolation, in_fp64)
        assert (below[i], above[i]) == (b, a), (q[i].item(), count[i].item())
        if interpolation in (0, 3) and a > b:
            assert weight[i].item() == w, (q[i].item(), count[i].item())


def test_cells_of_a_program():
    """Every program of the gradient of resized logits has cells, and not too many pixels where there is a choice."""
    for source in (1, 2, 7, 15, 30, 120, 480):
        for destination in (1, 16, 120, 479, 480, 2000):
            n = masked_loss_backward.cells_per_program(source, destination, 16, 16)
            assert 1 <= n <= 16
            window = (n + 1) * (destination - 1) / max(source - 1, 1)
            assert n == 1 or window <= masked_loss_backward.LARGEST_WINDOW
    assert masked_loss_backward.cells_per_program(480, 480, 16, 16) == 15  # 16 rows of pixels for 15 of cells


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


@pytest.mark.parametrize("name", tuple(operator_calls()))
def test_opcheck(name):
    torch.library.opcheck(getattr(OPERATORS, f"{name}_triton").default, operator_calls()[name])


def test_the_operator_has_the_schema_of_its_default():
    for name in operator_calls():
        default, forced = getattr(OPERATORS, name).default._schema, getattr(OPERATORS, f"{name}_triton").default._schema
        assert str(forced) == str(default).replace(f"::{name}(", f"::{name}_triton(")


def test_a_forced_call_is_traced_as_such():
    inputs = loss_inputs(batch=2)
    z = inputs.pop("logits")
    graphs = []

    def compiler(graph, _):
        graphs.append(graph)
        return graph.forward

    function = torch.compile(
        lambda x: masked_loss(x, **inputs, quantile=0.3, backend="triton"), fullgraph=True, backend=compiler,
    )
    loss = function(z)
    assert same_bits(loss, masked_loss(z, **inputs, quantile=0.3, backend="triton"))
    assert "aml_kernels.masked_loss_triton" in graphs[0].code


def test_a_default_call_on_a_gpu_is_traced_as_such(monkeypatch):
    """Where Triton is what the default operator runs, a program keeps the operator that runs on any device."""
    from aml_kernels.masked_loss import _forward

    for cuda_missing, forced in (("built without CUDA", _forward.default), (None, _forward.triton)):
        monkeypatch.setattr(_backend, "CUDA_MISSING", cuda_missing)
        assert _forward.variant("triton", "cuda") is forced
        assert _forward.variant("triton", "cpu") is _forward.triton
        assert _forward.variant("cuda", "cuda") is _forward.variant("cpu", "cpu") is _forward.default


def test_a_second_derivative_is_an_error():
    inputs = loss_inputs(batch=2)
    leaf = inputs.pop("logits").detach().requires_grad_()
    arguments = operator_calls()["masked_loss"]
    for x, call in (
        (leaf, lambda: masked_loss(leaf, **inputs, quantile=0.3, backend="triton")),
        (arguments[0], lambda: OPERATORS.masked_loss_triton(*arguments)[0]),
    ):
        gradient, = torch.autograd.grad(call(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once only"):
            gradient.square().sum().backward()


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
