"""How often the Triton operators launch a kernel, and how many bytes their kernels move: counted in the interpreter."""

import pytest
import torch
from helpers import coin, loss_inputs, normal

from aml_kernels import _backend, aml_loss, filter_regions, masked_loss, pixel_text_similarity, sample_quantile

pytestmark = pytest.mark.usefixtures("interpreted")

if _backend.missing("triton", "cpu") is None:
    import triton
    import triton.language as tl
    import triton_traffic

    from aml_kernels.triton import quantile

    @triton.jit
    def copy_kernel(x, out, count, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + i, tl.load(x + i, mask=i < count) + tl.load(x), mask=i < count)


def launches(call):
    """What `call` returns, and the names of what it launched."""
    with triton_traffic.counted() as counted:
        result = call()
    return result, [launch.kernel for launch in counted]


def features(cells, channels=3, batch=2):
    return {"visual": normal(1, batch, channels, *cells), "text": normal(2, batch, 4, channels)}


LIMITS = {
    "quantile": {"quantile": 0.3}, "threshold": {"threshold": 0.1},
    "thresholds": {"threshold": torch.tensor([0.1, 0.2])}, "all": {},
}
FORWARD = ["similarity_kernel", "limits_kernel", "forward_kernel"]


@pytest.mark.parametrize("logits", ((12, 17), (6, 9), (16, 20)), ids=("same", "smaller", "larger"))
@pytest.mark.parametrize("limit", LIMITS)
def test_aml_loss_is_three_launches_forward_and_one_backward(limit, logits):
    """No other work for the GPU either, such as filling or copying memory."""
    inputs = loss_inputs(batch=2, logits=logits, target=(12, 17), layouts=("contiguous",))
    z, similarity = inputs.pop("logits").requires_grad_(), inputs.pop("similarity")
    words = features((5, 7))
    for reduction in ("mean", "none"):
        options = {**inputs, **LIMITS[limit], "reduction": reduction, "backend": "triton"}
        loss, names = launches(lambda: aml_loss(z, **words, **options))  # noqa: B023
        assert names == FORWARD
        _, names = launches(lambda: torch.autograd.grad(loss, z, torch.ones_like(loss)))  # noqa: B023
        assert names[-1] in ("backward_kernel", "gather_kernel") and names[:-1] == ["aten.ones_like.default"]
        _, names = launches(lambda: masked_loss(z, similarity=similarity, **options))  # noqa: B023
        assert names == FORWARD[1:]


# More cells than a program counts directly, one size with many columns; sizes that are no multiple of anything.
@pytest.mark.parametrize("cells", ((14, 14), (97, 101), (200, 200), (2, 20_000)), ids=str)
def test_aml_loss_is_three_launches_for_maps_of_any_size(cells):
    inputs = loss_inputs(batch=1, map=cells, layouts=("contiguous",))
    del inputs["similarity"]
    words = features(cells, 2, 1)
    _, names = launches(lambda: aml_loss(**inputs, **words, quantile=0.25, backend="triton"))
    assert names == FORWARD


def test_strided_inputs_are_copied_at_most_once_each():
    """Those whose pixels have no single stride: `visual`, and what the quantile is taken of."""
    inputs = loss_inputs(batch=2, layouts=("cut",))
    del inputs["similarity"]
    words = features((5, 7))
    words["visual"] = words["visual"].repeat(1, 1, 2, 2)[:, :, 1:6, 2:9]
    _, names = launches(lambda: aml_loss(**inputs, **words, quantile=0.3, backend="triton"))
    assert [name for name in names if name.startswith("aten.")] == ["aten.contiguous.default", "aten.reshape.default"]
    assert [name for name in names if not name.startswith("aten.")] == FORWARD


def test_other_operators(monkeypatch):
    values, image = normal(0, 2, 400), normal(4, 2, 3, 20, 20)
    assert launches(lambda: sample_quantile(values, 0.5, backend="triton"))[1] == ["quantile_kernel"]
    monkeypatch.setattr(quantile, "ONE_PROGRAM", 300)
    assert launches(lambda: sample_quantile(values, 0.5, backend="triton"))[1] == [
        "aten.new_zeros.default", *["digits_kernel"] * 4, "finish_kernel",
    ]
    leaves = [x.requires_grad_() for x in features((5, 7)).values()]
    mask, grad, similarity = coin(3, 2, 4) | True, torch.zeros(2, 5, 7), normal(5, 2, 3, 4)
    result, names = launches(lambda: pixel_text_similarity(*leaves, mask, backend="triton"))
    assert names == ["similarity_kernel"]
    _, names = launches(lambda: torch.autograd.grad(result, leaves, grad))
    assert names == ["coefficients_kernel", "visual_kernel", "words_kernel", "text_kernel"]
    _, names = launches(
        lambda: filter_regions(image, similarity, quantile=0.5, block_size=4, seed=1, backend="triton")
    )
    assert names == ["limits_kernel", "weak_kernel", "choose_kernel", "copy_kernel"]


def test_bytes_are_counted_as_they_are_moved():
    """Otherwise the tests below show nothing: three programs, one of them half empty, each reading one number more."""
    x, out = torch.arange(40.0).half(), torch.empty(40, dtype=torch.float16)
    with triton_traffic.counted() as counted:
        copy_kernel[(3,)](x, out, 40, BLOCK=16)
        torch.zeros(3)
    launch, fill = counted
    assert (launch.kernel, launch.read, launch.written, launch.requested) == ("copy_kernel", 80, 80, 2 * (40 + 3 + 40))
    assert (fill.kernel, fill.read, fill.written) == ("aten.zeros.default", 0, 0)
    assert torch.equal(out, x + x[0])


@pytest.fixture(scope="module")
def rows(interpreted):
    """The table of docs/verification.md."""
    torch.manual_seed(0)
    return [row for workload in triton_traffic.workloads() for row in triton_traffic.rows(workload)]


def test_moved_bytes_are_close_to_the_least(rows):
    """Each input read once and each output written once, but for words that are none. What is beyond: see the docs."""
    beyond = {
        ("masked_loss", "forward"): 1.25, ("sample_quantile", "forward"): 1.25,
        ("pixel_text_similarity", "backward"): 2.5,
    }
    for row in rows:
        ratio, most = row.moved / row.least, beyond.get((row.operator, row.passed), 1.02)
        assert 0.98 <= ratio <= most, f"{row.operator} {row.case} {row.passed}: {ratio}"


def test_the_table_in_the_docs_is_this_one(rows):
    table = triton_traffic.table(rows)
    text = (triton_traffic.ROOT / "docs" / "verification.md").read_text()
    assert table in text, f"docs/verification.md has another table than\n{table}"
