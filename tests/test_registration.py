"""The operators inside PyTorch: opcheck, compile, export, checkpoint, autocast, derivatives of them and no more."""

import functools

import pytest
import torch
import torch._dynamo.testing
import torch.fx.experimental._config
from helpers import coin, laid_out, loss_inputs, normal, same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from aml_kernels import _backend, aml_loss, filter_regions, masked_loss, pixel_text_similarity, sample_quantile

OPERATORS = torch.ops.aml_kernels
RANK = torch.__version__ >= (2, 14)


def features(dtype=torch.float32, batch=2, width=9):
    mask = coin(12, batch, 4) | (torch.arange(4) == 1)
    visual, text = normal(10, batch, width, 3, 4, dtype=dtype), normal(11, batch, 4, width, dtype=dtype)
    return laid_out(visual, "transposed"), text, mask


def small(dtype=torch.float32, size=(5, 6), batch=2, target=(8, 9)):
    inputs = loss_inputs(batch=batch, logits=size, target=target, map=(3, 4), dtype=dtype)
    return tuple(inputs[name] for name in ("logits", "target", "similarity", "valid", "map_valid"))


def samples():
    """For each operator calls that use each kind of argument. They mirror the schemas in `aml_kernels`."""
    visual, text, mask = features()
    logits, target, similarity, valid, map_valid = small()
    leaf, leaf_visual, leaf_text = (x.detach().requires_grad_() for x in (logits, visual, text))
    rest = (1.0, 0.5, 0.9, 1.1, 1e-5)
    limits = (None, None, 0.3, RANK, True, *rest)
    sums = torch.tensor([[0.0, 0.7, 0.5, 20.0, 20.0, 10.0, 9.0]]).expand(2, 7).contiguous()
    image, wide = normal(3, 2, 3, 8, 9), logits[:, None].bfloat16()
    return {
        "pixel_text_similarity": [
            (leaf_visual, leaf_text, mask, True, 2.0, False), (leaf_visual, text, None, False, 0.1, True),
            (visual.flatten(2).mT, leaf_text, mask, True, 1.0, True),
        ],
        "pixel_text_similarity_backward": [(normal(1, 2, 3, 4), visual, text, mask, True, 2.0, True)],
        "sample_quantile": [
            (similarity, 0.3, None, map_valid, 0, RANK), (similarity.bfloat16(), 0.0, torch.rand(2), None, 3, RANK),
        ],
        "masked_loss": [
            (leaf, target, similarity, valid, map_valid, *limits, 0),
            (leaf, target.bool(), None, None, None, None, None, None, RANK, False, *rest, 2),
            (wide, target.float(), similarity, None, None, torch.rand(2), None, None, RANK, True, *rest, 1),
        ],
        "masked_loss_backward": [(torch.tensor(1.0), logits, target, similarity, valid, sums, True, *rest, 0)],
        "aml_loss": [(leaf, target, visual, text, mask, valid, map_valid, True, 1.0, False, *limits, 0)],
        "filter_regions": [(image, similarity, valid, None, None, 0.5, RANK, 0.5, 4, [0.0, 1.0, 2.0], 7)],
    }


def operator(backend, name):
    """The registered operator that runs on `backend`."""
    if backend == "reference":
        pytest.skip("plain PyTorch is no operator")
    asked = backend == "triton" != _backend.default(torch.get_default_device().type)
    return getattr(OPERATORS, f"{name}_triton" if asked else name)


@pytest.mark.parametrize("name", tuple(samples()))
def test_opcheck(backend, name):
    for arguments in samples()[name]:
        torch.library.opcheck(operator(backend, name).default, arguments)


@pytest.mark.parametrize("name", tuple(samples()))
def test_fake_outputs_are_like_real_ones(backend, name):
    """Strides and types too: a compiled program is laid out by them."""
    for arguments in samples()[name]:
        real = operator(backend, name)(*arguments)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
            fake = operator(backend, name)(*fakes)
        for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (real, fake)), strict=True):
            assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


def train_step(backend):
    def step(logits, target, similarity, valid, visual, text, mask):
        loss, stats = masked_loss(
            logits.squeeze(1) * 2, target, similarity, quantile=0.3, valid=valid, return_stats=True, backend=backend,
        )
        fused = aml_loss(logits, target, visual, text, mask, quantile=0.3, reduction="sum", backend=backend)
        auxiliary = pixel_text_similarity(visual, text, mask, softmax=True, backend=backend).square().sum()
        return loss + 0.5 * fused + auxiliary, stats.kept, sample_quantile(similarity, 0.5, backend=backend)
    return step


def arguments_of_step(size, batch):
    logits, target, similarity, valid, _ = small(size=size, batch=batch)
    return logits[:, None], target, similarity, valid, *features(batch=batch)


def result_of(step, arguments):
    leaves = [arguments[i].detach().requires_grad_() for i in (0, 4, 5)]
    full = list(arguments)
    full[0], full[4], full[5] = leaves
    loss, *rest = step(*full)
    loss.backward()
    return [loss.detach(), *rest, *(leaf.grad for leaf in leaves)]


@functools.cache
def quantile_is_traced() -> bool:
    """Older versions of torch.quantile look at the values of a tensor, which is not there while tracing."""
    try:
        torch.compile(lambda x: torch.quantile(x, 0.5), fullgraph=True, backend="eager")(torch.ones(3))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


@pytest.fixture
def traced(backend):
    """The back ends that can be traced: all, where plain PyTorch can."""
    if backend == "reference" and not quantile_is_traced():
        pytest.skip("this PyTorch cannot trace torch.quantile")
    return backend


# "inductor" generates code; "aot_eager" does all but that, and is quick.
@pytest.mark.parametrize(
    ("compiler", "dynamic"),
    (("inductor", False), ("aot_eager", False), pytest.param("aot_eager", True, marks=pytest.mark.large)),
)
# Sizes that happen to be equal in the first call need not be in the next.
@torch.fx.experimental._config.patch(use_duck_shape=False)
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compile(traced, compiler, dynamic):
    if traced == "reference" and (compiler == "inductor" or dynamic):
        pytest.skip("takes half a minute; that plain PyTorch can be traced is shown by the static case and by export")
    torch._dynamo.reset()
    recorder = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(train_step(traced), fullgraph=True, dynamic=dynamic, backend=recorder)
    for size, batch in (((5, 6), 2), ((7, 11), 3), ((10, 6), 5)) if dynamic else (((5, 6), 2),):
        arguments = arguments_of_step(size, batch)
        actual, expected = result_of(compiled, arguments), result_of(train_step(traced), arguments)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    if traced != "reference":
        used = [str(node.target) for graph in recorder.graphs for node in graph.graph.nodes]
        for name in ("masked_loss", "aml_loss", "sample_quantile"):
            assert any(target.startswith(f"aml_kernels.{name}") for target in used), name


def test_compiled_filter(traced):
    torch._dynamo.reset()
    function = torch.compile(
        lambda x, s: filter_regions(x, s, quantile=0.5, block_size=4, seed=3, backend=traced), fullgraph=True,
        backend="aot_eager",
    )
    image, similarity = normal(0, 2, 3, 17, 19), normal(1, 2, 4, 5)
    for actual, expected in zip(
        function(image, similarity),
        filter_regions(image, similarity, quantile=0.5, block_size=4, seed=3, backend=traced), strict=True,
    ):
        assert same_bits(actual, expected)


def test_no_filter_is_compiled_for_a_seed(traced):
    """One program for the first, one for all others that are below 2**63, and one for the rest."""
    if traced == "reference":
        pytest.skip("its keys are computed from the seed in Python")
    torch._dynamo.reset()
    recorder = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    image, similarity = normal(0, 2, 3, 17, 19), normal(1, 2, 4, 5)

    def call(seed):
        return filter_regions(image, similarity, quantile=0.5, block_size=4, seed=seed, backend=traced)

    compiled = torch.compile(call, fullgraph=True, backend=recorder)
    for seed in (3, 4, 5, 6, 2**40, 2**63 + 5, 2**64 - 1):
        for actual, expected in zip(compiled(seed), call(seed), strict=True):
            assert same_bits(actual, expected)
    assert recorder.frame_count == 3


def test_what_has_no_gradient_has_none_compiled(traced):
    """PyTorch would let it require grad, and warn in the backward of an operator that may be incorrect."""
    torch._dynamo.reset()

    def call(visual, text, image):
        similarity = pixel_text_similarity(visual, text, backend=traced)
        limit = sample_quantile(similarity, 0.5, backend=traced)
        return limit, *filter_regions(image, similarity, threshold=limit, block_size=4, seed=3, backend=traced)

    (visual, text, _), image = features(), normal(0, 2, 3, 17, 19)
    results = torch.compile(call, fullgraph=True, backend="aot_eager")(visual.requires_grad_(), text, image)
    assert not any(x.requires_grad for x in results)


class Loss(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, logits, target, visual, text, mask):
        similarity = pixel_text_similarity(visual, text, mask, backend=self.backend)
        return masked_loss(logits, target, similarity, quantile=0.3, backend=self.backend)


def test_export(traced):
    def arguments(batch, height):
        return (normal(0, batch, height, 6), coin(1, batch, 2 * height, 12), *features(batch=batch))

    batch, height = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("height", min=2, max=512)
    shapes = ({0: batch, 1: height}, {0: batch, 1: 2 * height}, {0: batch}, {0: batch}, {0: batch})
    program = torch.export.export(Loss(traced), arguments(2, 5), dynamic_shapes=shapes)
    if traced != "reference":
        targets = [str(node.target) for node in program.graph.nodes]
        for name in ("masked_loss", "pixel_text_similarity"):
            assert any(target.startswith(f"aml_kernels.{name}") for target in targets), name
    for inputs in (arguments(2, 5), arguments(4, 9)):
        torch.testing.assert_close(program.module()(*inputs), Loss(traced)(*inputs), rtol=1e-6, atol=0)


def test_checkpoint(backend):
    visual, text, mask = features()
    logits, target, _, valid, _ = small()

    def step(z, v, u):
        similarity = pixel_text_similarity(v, u, mask, backend=backend)
        loss = masked_loss(z * 2, target, similarity, quantile=0.3, valid=valid, backend=backend)
        return loss + similarity.sum() + aml_loss(z, target, v, u, mask, quantile=0.3, backend=backend)

    gradients = []
    for checkpointed in (False, True):
        leaves = [x.detach().requires_grad_() for x in (logits, visual, text)]
        if checkpointed:
            loss = checkpoint(step, *leaves, use_reentrant=False)
        else:
            loss = step(*leaves)
        gradients.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*gradients, strict=True):
        assert same_bits(a, b)


def test_autocast(backend):
    """16-bit logits come in; loss and map leave in fp32, as without autocast."""
    visual, text, mask = features()
    head, (_, target, _, _, _) = torch.nn.Conv2d(9, 1, 1), small()
    with torch.autocast(visual.device.type, torch.bfloat16):
        logits = head(visual)
        assert logits.dtype == torch.bfloat16
        similarity = pixel_text_similarity(visual, text, mask, backend=backend)
        loss = masked_loss(logits, target, similarity, quantile=0.3, backend=backend)
        fused = aml_loss(logits, target, visual, text, mask, quantile=0.3, backend=backend)
    assert similarity.dtype == loss.dtype == fused.dtype == torch.float32
    assert same_bits(similarity, pixel_text_similarity(visual, text, mask, backend=backend))
    outside = masked_loss(logits, target, similarity, quantile=0.3, backend=backend)
    assert same_bits(loss, outside) and same_bits(fused, outside)
    loss.backward()
    assert head.weight.grad.dtype == torch.float32 and head.weight.grad.any()


@pytest.mark.fp64
@pytest.mark.parametrize("softmax", (False, True), ids=("scores", "softmax"))
@pytest.mark.parametrize("normalize", (False, True), ids=("dot", "cosine"))
def test_gradcheck_of_similarity(backend, normalize, softmax):
    visual, text, mask = features(torch.float64, width=3)
    for pixels in (visual, visual.flatten(2).mT):
        leaves = pixels.detach().requires_grad_(), text.detach().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda v, u: pixel_text_similarity(
                v, u, mask, normalize=normalize, softmax=softmax, scale=3.0, backend=backend,
            ), leaves,
        )


@pytest.mark.fp64
@pytest.mark.parametrize("size", [(4, 5), (2, 3), (7, 4), (1, 1)], ids=str)
def test_gradcheck_of_losses(backend, size):
    logits, target, similarity, valid, _ = small(torch.float64, size, target=(4, 5))
    visual, text, mask = features(torch.float64)
    leaf = logits.detach().requires_grad_()
    options = {"quantile": 0.3, "valid": valid, "class_weight": (0.9, 1.1), "protect_target": True, "backend": backend}
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda z: masked_loss(z, target, similarity, reduction=reduction, **options), leaf,  # noqa: B023
        )
    soft = target.double() * 0.8 + 0.1
    assert torch.autograd.gradcheck(lambda z: aml_loss(z, soft, visual, text, mask, **options), leaf)


def test_a_second_derivative_is_an_error(backend):
    """Eagerly and through the operator; a penalty on the gradient must not silently count for nothing."""
    visual, text, mask = features()
    logits, target, similarity, _, _ = small()
    leaf, leaf_visual = logits.detach().requires_grad_(), visual.detach().requires_grad_()
    through, at = samples()["masked_loss"][0], {"backend": backend}
    loss_operator, similarity_operator = (operator(backend, x) for x in ("masked_loss", "pixel_text_similarity"))
    calls = {
        "masked_loss": (lambda: masked_loss(leaf, target, similarity, quantile=0.3, **at), leaf),
        "aml_loss": (lambda: aml_loss(leaf, target, visual, text, mask, quantile=0.3, **at), leaf),
        "similarity": (lambda: pixel_text_similarity(leaf_visual, text, mask, **at).sum(), leaf_visual),
        "square": (lambda: pixel_text_similarity(leaf_visual, text, mask, **at).square().sum(), leaf_visual),
        "operator masked_loss": (lambda: loss_operator(leaf, *through[1:])[0], leaf),
        "operator similarity": (
            lambda: similarity_operator(leaf_visual, text, None, True, 1.0, False).sum(), leaf_visual,
        ),
    }
    silent = []
    for name, (function, x) in calls.items():
        gradient, = torch.autograd.grad(function(), x, create_graph=True)
        try:
            (gradient.square().sum() + x.sum()).backward()
            silent.append(name)
        except RuntimeError as error:
            assert "once" in str(error)
    assert not silent


def test_the_eager_path_is_the_operator(backend):
    """What runs eagerly beside the dispatcher equals what a compiled program runs, bit for bit."""
    (leaf, *rest), (visual, text, *options) = samples()["masked_loss"][0], samples()["pixel_text_similarity"][0]
    target, similarity, valid, map_valid = rest[:4]
    loss = masked_loss(
        leaf, target, similarity, quantile=0.3, valid=valid, map_valid=map_valid, protect_target=True, dice_weight=0.5,
        class_weight=(0.9, 1.1), backend=backend,
    )
    through = operator(backend, "masked_loss")(leaf, *rest)[0]
    assert same_bits(loss, through)
    assert same_bits(*(torch.autograd.grad(x, leaf)[0] for x in (loss, through)))
    eager = pixel_text_similarity(visual, text, options[0], scale=2.0, backend=backend)
    through = operator(backend, "pixel_text_similarity")(visual, text, *options)
    assert same_bits(eager, through)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (visual, text)) for x in (eager, through)), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode), ids=("no_grad", "inference_mode"))
def test_without_recording(backend, mode):
    logits, target, similarity, valid, _ = small()
    expected = masked_loss(logits, target, similarity, quantile=0.3, valid=valid, backend=backend)
    with mode():
        leaf = torch.nn.Parameter(logits)
        loss = masked_loss(leaf, target, similarity, quantile=0.3, valid=valid, backend=backend)
        assert not loss.requires_grad and same_bits(loss, expected)
        assert pixel_text_similarity(*features(), backend=backend).shape == (2, 3, 4)
        assert filter_regions(normal(0, 2, 3, 8, 8), similarity, quantile=0.5, seed=0, backend=backend)[0].shape[1] == 3
