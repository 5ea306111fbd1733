"""The benchmark's workloads: inputs, what each provider does with them, and the bytes that have to move.

A provider is a function of the workload's inputs that returns a tuple of tensors, the first of which is
differentiated. All providers of a workload do the same job, statistics of the loss included, with one exception in
the peer's favour: `torch` below gives the loss alone.

    eager    the definition in `aml_kernels.reference`
    torch    the same written with PyTorch's own functions (`interpolate`, `quantile`,
             `binary_cross_entropy_with_logits`, `normalize`), as one would without this package
    fused    the operator of this package
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

import aml_kernels
from aml_kernels import reference

Provider = Callable[..., tuple[Tensor, ...]]

FRACTION = 0.25  # of the map that is left out
WORDS = 20
BLOCK = 32
STATS = 3 * 4 + 4 * 8  # threshold, BCE, Dice in fp32 and four int64 counts, per sample
SMOOTH = 1e-5


@dataclass(frozen=True)
class Workload:
    op: str
    case: str
    inputs: tuple[Tensor, ...]
    eager: Provider
    fused: Callable[[str], Provider]  #: the operator, given the name of a back end
    torch: Provider | None
    forward_bytes: int  #: each input read once, each output written once
    backward_bytes: int = 0  #: what the gradient depends on read once, each gradient written once
    differentiable: tuple[int, ...] = ()  #: which inputs get a gradient; () = there is no backward
    grad_output: Tensor | None = None  #: of the first output; None = it is a scalar, as a loss
    pixels: int = 0
    compile: bool = True  #: also measure torch.compile of the definition
    sweep: bool = False
    goal: bool = False  #: one of those that `goal` lists

    @property
    def dtype(self) -> str:
        return str(self.inputs[0].dtype).removeprefix("torch.")

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward", "forward+backward") if self.differentiable else ("forward",)

    def bytes(self, name: str) -> int:
        return self.forward_bytes + (self.backward_bytes if name == "forward+backward" else 0)

    def call(self, provider: Provider, name: str, inputs: tuple | None = None) -> Callable[[], tuple[Tensor, ...]]:
        """One pass of `provider` over `inputs` (those of the workload): returns its outputs and gradients."""
        given = list(self.inputs if inputs is None else inputs)
        if name == "forward":
            return lambda: provider(*given)
        for i in self.differentiable:
            given[i] = given[i].detach().requires_grad_()
        leaves = [given[i] for i in self.differentiable]

        def forward_backward():
            outputs = provider(*given)
            gradients = torch.autograd.grad(outputs[0], leaves, self.grad_output)
            return (*(x.detach() if x.requires_grad else x for x in outputs), *gradients)

        return forward_backward


def size(*tensors: Tensor) -> int:
    """Bytes of the elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


def similarity(batch: int, rows: int, columns: int, width: int, dtype: torch.dtype, device: str) -> Workload:
    visual, text, text_mask = features(batch, rows, columns, width, dtype, device)
    output = 4 * batch * rows * columns
    grad = torch.randn(batch, rows, columns, device=device)

    return Workload(
        "pixel_text_similarity", f"{rows}x{columns}x{width}, {WORDS} words", (visual, text, text_mask),
        eager=lambda *inputs: (reference.pixel_text_similarity(*inputs),),
        fused=lambda name: lambda *inputs: (aml_kernels.pixel_text_similarity(*inputs, backend=name),),
        torch=similarity_by_hand,
        forward_bytes=size(visual, text, text_mask) + output,
        backward_bytes=output + size(visual, text, text_mask) + size(visual, text),  # grad and inputs; gradients
        differentiable=(0, 1), grad_output=grad, pixels=batch * rows * columns,
    )


def quantile(
    batch: int, rows: int, columns: int, dtype: torch.dtype, device: str, *, masked: bool = False,
) -> Workload:
    values = torch.rand(batch, rows, columns, device=device).to(dtype)
    valid = (torch.rand(batch, rows, columns, device=device) < 0.8,) if masked else ()

    def options(valid):
        return {"valid": valid[0] if valid else None}

    def by_hand(values, *valid):
        if not valid:
            return (torch.quantile(values.flatten(1).float(), FRACTION, dim=1),)
        return (torch.stack([torch.quantile(v[m].float(), FRACTION) for v, m in zip(values, *valid, strict=True)]),)

    return Workload(
        "sample_quantile", f"{rows}x{columns}" + (", valid" if masked else ""), (values, *valid),
        eager=lambda values, *valid: (reference.sample_quantile(values, FRACTION, **options(valid)),),
        fused=lambda name: lambda values, *valid: (
            aml_kernels.sample_quantile(values, FRACTION, **options(valid), backend=name),
        ),
        torch=by_hand,
        forward_bytes=size(values, *valid) + 4 * batch, pixels=batch * rows * columns,
    )


def masked_loss(batch: int, image: int, logits: int, cells: int, dtype: torch.dtype, device: str) -> Workload:
    scores, target = predictions(batch, image, logits, dtype, device)
    alignment = torch.rand(batch, cells, cells, device=device)
    options = {"quantile": FRACTION, "protect_target": True, "smooth": SMOOTH}

    def flat(loss, stats):
        return (loss, *stats)

    return Workload(
        "masked_loss", f"{image}x{image}, logits {logits}x{logits}, map {cells}x{cells}", (scores, target, alignment),
        eager=lambda *inputs: flat(*reference.masked_loss(*inputs, **options)),
        fused=lambda name: lambda *inputs: flat(
            *aml_kernels.masked_loss(*inputs, **options, return_stats=True, backend=name)
        ),
        torch=loss_by_hand,
        forward_bytes=size(scores, target, alignment) + 4 + STATS * batch,
        backward_bytes=4 + size(scores, target, alignment) + size(scores),
        differentiable=(0,), pixels=batch * image * image,
    )


def aml_loss(
    batch: int, image: int, logits: int, cells: int, width: int, dtype: torch.dtype, device: str,
) -> Workload:
    scores, target = predictions(batch, image, logits, dtype, device)
    visual, text, text_mask = features(batch, cells, cells, width, dtype, device)
    alignment = 4 * batch * cells * cells  # an output of the forward, which the backward reads instead of `visual`
    options = {"quantile": FRACTION, "protect_target": True, "smooth": SMOOTH}

    def eager(*inputs):
        loss, stats, alignment = reference.aml_loss(*inputs, **options)
        return (loss, *stats, alignment)

    def fused(name):
        def run(*inputs):
            loss, stats = aml_kernels.aml_loss(*inputs, **options, return_stats=True, backend=name)
            return (loss, *stats)

        return run

    def by_hand(scores, target, *features):
        with torch.no_grad():
            (alignment,) = similarity_by_hand(*features)
        return loss_by_hand(scores, target, alignment)

    return Workload(
        "aml_loss", f"{image}x{image}, logits {logits}x{logits}, features {cells}x{cells}x{width}",
        (scores, target, visual, text, text_mask), eager, fused, by_hand,
        forward_bytes=size(scores, target, visual, text, text_mask) + 4 + STATS * batch + alignment,
        backward_bytes=4 + size(scores, target) + alignment + size(scores),
        differentiable=(0,), pixels=batch * image * image,
    )


def filter_regions(batch: int, image: int, cells: int, dtype: torch.dtype, device: str) -> Workload:
    picture = torch.randn(batch, 3, image, image, device=device).to(dtype)
    alignment = torch.rand(batch, cells, cells, device=device)
    options = {"quantile": FRACTION, "block_size": BLOCK, "seed": 1}
    blocks = batch * (-(-image // BLOCK)) ** 2
    return Workload(
        "filter_regions", f"{image}x{image}x3, map {cells}x{cells}", (picture, alignment),
        eager=lambda *inputs: reference.filter_regions(*inputs, **options),
        fused=lambda name: lambda *inputs: aml_kernels.filter_regions(*inputs, **options, backend=name),
        torch=None,
        forward_bytes=size(picture, alignment) + size(picture) + blocks, pixels=batch * image * image,
    )


def similarity_by_hand(visual: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor]:
    pixels = functional.normalize(visual.flatten(2).transpose(1, 2).float(), dim=-1)
    score = pixels @ functional.normalize(text.float(), dim=-1).transpose(1, 2)
    score = score.masked_fill(~text_mask[:, None], -torch.inf).amax(-1)
    return (score.reshape(visual.shape[0], *visual.shape[2:]),)


def loss_by_hand(scores: Tensor, target: Tensor, alignment: Tensor) -> tuple[Tensor]:
    """The masked loss in PyTorch's own functions, without statistics."""
    if scores.shape != target.shape:
        scores = functional.interpolate(
            scores[:, None].float(), target.shape[1:], mode="bilinear", align_corners=True,
        )[:, 0]
    limit = torch.quantile(alignment.flatten(1), FRACTION, dim=1)[:, None, None]
    alignment = functional.interpolate(alignment[:, None], target.shape[1:], mode="bilinear")[:, 0]
    kept = (alignment >= limit) | (target > 0)
    label = target.float().masked_fill(~kept, 0)
    scores = scores.float().masked_fill(~kept, 0)
    entropy = functional.binary_cross_entropy_with_logits(scores, label, reduction="none")
    bce = entropy.masked_fill(~kept, 0).sum((1, 2)) / kept.sum((1, 2))
    share = scores.sigmoid().masked_fill(~kept, 0)
    overlap = 2 * (share * label).sum((1, 2)) + SMOOTH
    dice = 1 - overlap / (share.sum((1, 2)) + label.sum((1, 2)) + SMOOTH)
    return ((bce + dice).mean(),)


def features(batch: int, rows: int, columns: int, width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """visual `[B, C, h, w]`, text `[B, L, C]`, and which of the L words are real: a quarter of them up to all."""
    visual = torch.randn(batch, width, rows, columns, device=device).to(dtype)
    text = torch.randn(batch, WORDS, width, device=device).to(dtype)
    length = torch.randint(WORDS // 4, WORDS + 1, (batch, 1), device=device)
    return visual, text, torch.arange(WORDS, device=device) < length


def predictions(batch: int, image: int, logits: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Logits and a target in which nothing can be predicted: the worst case for a branch."""
    scores = 2 * torch.randn(batch, logits, logits, device=device)
    return scores.to(dtype), (torch.rand(batch, image, image, device=device) < 0.3).to(torch.uint8)


def standard(device: str) -> list[Callable[[], Workload]]:
    """Batch 8 at 448 x 448: the table. Each is built when it is due, so that one at a time is in memory."""
    builders = []
    for dtype in (torch.float32, torch.bfloat16):
        at = {"dtype": dtype, "device": device}
        builders += [
            *(lambda s=s, at=at: masked_loss(8, 448, *s, **at) for s in ((448, 14), (448, 112), (112, 14), (112, 112))),
            *(
                lambda s=s, at=at: aml_loss(8, 448, *s, **at)
                for s in ((448, 14, 1024), (448, 112, 256), (112, 14, 1024), (112, 112, 256))
            ),
            *(lambda s=s, at=at: similarity(8, *s, **at) for s in ((14, 14, 1024), (112, 112, 256))),
            *(lambda s=s, at=at: quantile(8, s, s, **at) for s in (14, 112, 448)),
            lambda at=at: quantile(8, 448, 448, **at, masked=True),
            *(lambda s=s, at=at: filter_regions(8, 448, s, **at) for s in (14, 112)),
        ]
    return builders


def quick(device: str) -> list[Callable[[], Workload]]:
    """One workload per operator that trains or thresholds, enough to see whether something went wrong.

    `torch.compile` takes 10-20 s per graph, so that it is left to one of them.
    """
    at = {"dtype": torch.float32, "device": device}
    return [
        lambda: masked_loss(8, 448, 448, 14, **at),
        lambda: replace(aml_loss(8, 448, 112, 14, 1024, **at), compile=False),
        lambda: replace(similarity(8, 14, 14, 1024, **at), compile=False),
        lambda: replace(quantile(8, 448, 448, **at), compile=False),
    ]


def goal(device: str) -> list[Callable[[], Workload]]:
    """Batch 32 at 480 x 480, as RIS models are trained: what the fused losses are to reach on a GPU (tables.GOAL)."""
    full, half = ({"dtype": dtype, "device": device} for dtype in (torch.float32, torch.bfloat16))
    builders = [
        *(lambda at=at: masked_loss(32, 480, 480, 15, **at) for at in (full, half)),
        *(lambda at=at: aml_loss(32, 480, 480, 15, 1024, **at) for at in (full, half)),
    ]
    return [lambda build=build: replace(with_batch(build()), goal=True) for build in builders]


def others(device: str) -> list[Callable[[], Workload]]:
    """The rest of what is measured on a GPU, of the same size.

    `torch.compile` takes 10-20 s per graph, so that it is left to one workload of each of the other operators.
    """
    full, half = ({"dtype": dtype, "device": device} for dtype in (torch.float32, torch.bfloat16))
    compiled = [lambda: similarity(32, 120, 120, 256, **half), lambda: quantile(32, 480, 480, **full)]
    rest = [
        lambda: masked_loss(32, 480, 120, 120, **full), lambda: aml_loss(32, 480, 120, 120, 256, **half),
        lambda: similarity(32, 15, 15, 1024, **half), lambda: similarity(32, 120, 120, 256, **full),
        lambda: quantile(32, 15, 15, **full), lambda: filter_regions(32, 480, 15, **full),
    ]
    builders = [*compiled, *(lambda build=build: replace(build(), compile=False) for build in rest)]
    return [lambda build=build: with_batch(build()) for build in builders]


def on_gpu(device: str) -> list[Callable[[], Workload]]:
    return [*goal(device), *others(device)]


def with_batch(workload: Workload) -> Workload:
    return replace(workload, case=f"batch {len(workload.inputs[0])}, {workload.case}")


def sweep(device: str) -> list[Callable[[], Workload]]:
    """Batch 1-64 at 448 x 448, then 224-1024 pixels at batch 8. Stride 32 to the features, as in a backbone."""
    at = {"dtype": torch.float32, "device": device}
    shapes = [(batch, 448) for batch in (1, 2, 4, 8, 16, 32, 64)] + [(8, image) for image in (224, 320, 640, 800, 1024)]
    builders = []
    for batch, image in shapes:
        cells = image // 32
        builders += [
            lambda b=batch, i=image, c=cells: masked_loss(b, i, i, c, **at),
            lambda b=batch, i=image, c=cells: aml_loss(b, i, i // 4, c, 1024, **at),
            lambda b=batch, i=image: quantile(b, i, i, **at),
        ]
    return [lambda build=build: replace(with_batch(build()), sweep=True) for build in builders]
