"""Runs every kernel of a back end once per kind of input, on small tensors: what compute-sanitizer watches.

`python tests/gpu/every_kernel.py cuda`. Inputs are made on the CPU, so that hardly a kernel runs that is not ours.
"""

import itertools
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from helpers import coin, laid_out, loss_inputs, normal  # noqa: E402

import aml_kernels  # noqa: E402

F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8


class Inputs(NamedTuple):
    """Of every kind of input one after the other: each of these with each."""

    types: tuple[torch.dtype, ...]
    losses: tuple[tuple[torch.dtype, str], ...]  #: type of logits and map, kind of target
    sizes: tuple[tuple, ...]  #: of logits, target and map
    most_cells: int  #: of a map that aml_loss computes: for one of 17030 racecheck takes four seconds
    strided: tuple[bool, ...]
    features: tuple[tuple, ...]  #: channels, rows and columns; words
    words: dict[torch.dtype, torch.dtype]  #: of another type, for features of these
    lengths: tuple[int, ...]  #: of samples to select from
    blocks: tuple[int, ...]  #: sides of regions


INPUTS = {
    "cuda": Inputs(
        types=(F32, BF16, F16),
        losses=tuple(itertools.product((F32, BF16, F16), ("uint8", "bool", "soft", "soft bf16"))),
        # Equal sizes in whole vectors and with a rest, logits to enlarge and to shrink, several blocks, and a map that
        # several blocks select from.
        sizes=(
            ((16, 64), (16, 64), (4, 4)), ((24, 33), (24, 33), (5, 7)), ((13, 9), (52, 36), (52, 36)),
            ((48, 40), (17, 23), (1, 1)), ((96, 100), (190, 200), (14, 14)), ((24, 32), (24, 32), (130, 131)),
        ),
        most_cells=4096,
        strided=(False, True),
        features=(((37, 5, 7), 6), ((64, 16, 16), 20), ((96, 9, 33), 77)),
        words={BF16: F32, F16: BF16},
        lengths=(1, 49, 5000, 70_001),
        blocks=(1, 16, 32),
    ),
    # Triton compiles a program for nearly each combination, which takes a second or two: few, each with a rest. The
    # longest samples are those that several programs select from. test_triton_compile.py counts the programs.
    "triton": Inputs(
        types=(F32, BF16),
        losses=((F32, "soft"), (BF16, "uint8")),
        sizes=(((24, 33), (24, 33), (5, 7)), ((96, 100), (190, 200), (130, 131))),
        most_cells=1 << 20,
        strided=(False,),
        features=(((37, 5, 7), 6), ((96, 9, 33), 77)),
        words={},
        lengths=(49, 70_001, 300_001),
        blocks=(1, 32),
    ),
}


def losses(backend: str, device: str) -> None:
    given, options = INPUTS[backend], {"class_weight": (0.9, 1.1), "return_stats": True, "backend": backend}
    for (dtype, kind), sizes, strided in itertools.product(given.losses, given.sizes, given.strided):
        logits, target, cells = sizes
        layouts = ("cut", "sliced", "batch_last", "transposed") if strided else ("contiguous",)
        inputs = loss_inputs(
            batch=2, logits=logits, target=target, map=cells, dtype=dtype, kind=kind, map_dtype=dtype, layouts=layouts,
        )
        inputs = {name: on(device, x) for name, x in inputs.items()}
        leaf = inputs.pop("logits").requires_grad_()
        aml_kernels.masked_loss(leaf, **inputs, quantile=0.3, protect_target=True, **options)[0].backward()
        aml_kernels.masked_loss(leaf, inputs["target"], reduction="sum", **options)[0].backward()
        if cells[0] * cells[1] > given.most_cells:
            continue
        visual, text, mask = features(dtype, (20, *cells), 6, layouts[0])
        visual, text, mask = (on(device, x) for x in (visual, text, mask))
        del inputs["similarity"]
        limits = torch.tensor([0.1, -0.1]).to(device)
        for limit in ({"quantile": 0.3}, {"threshold": limits}):
            loss, _ = aml_kernels.aml_loss(
                leaf, **inputs, visual=visual, text=text, text_mask=mask, reduction="none", **limit, **options,
            )
            loss.sum().backward()


def similarities(backend: str, device: str) -> None:
    given = INPUTS[backend]
    for dtype, softmax, (shape, words), strided in itertools.product(
        given.types, (False, True), given.features, given.strided,
    ):
        visual, text, mask = features(dtype, shape, words, "transposed" if strided else "contiguous")
        leaves = [on(device, x).requires_grad_() for x in (visual, text)]
        mask = None if strided else on(device, mask)
        aml_kernels.pixel_text_similarity(*leaves, mask, softmax=softmax, backend=backend).sum().backward()
        if dtype in given.words:
            others = leaves[0], leaves[1].to(given.words[dtype])
            aml_kernels.pixel_text_similarity(*others, mask, softmax=softmax, backend=backend).sum().backward()


def selections(backend: str, device: str) -> None:
    given = INPUTS[backend]
    for dtype, length, strided in itertools.product(given.types, given.lengths, given.strided):
        drawn = normal(0, 2, length, dtype=dtype), coin(1, 2, length)
        values, valid = (on(device, laid_out(x, "sliced" if strided else "contiguous")) for x in drawn)
        q = torch.tensor([0.25, 0.75]).to(device)
        aml_kernels.sample_quantile(values, 0.25, backend=backend)
        aml_kernels.sample_quantile(values, q, valid=valid, interpolation="nearest", backend=backend)


def regions(backend: str, device: str) -> None:
    given = INPUTS[backend]
    for dtype, block, strided in itertools.product((*given.types, U8), given.blocks, given.strided):
        layout = "transposed" if strided else "contiguous"
        image, similarity = laid_out(normal(0, 2, 3, 70, 97).to(dtype), layout), laid_out(normal(1, 2, 5, 7), layout)
        image, similarity, protect = (on(device, x) for x in (image, similarity, coin(2, 2, 70, 97, share=0.01)))
        for limit in ({"quantile": 0.3}, {"threshold": 0.0, "protect": protect}):
            aml_kernels.filter_regions(image, similarity, **limit, block_size=block, seed=7, backend=backend)


def features(dtype: torch.dtype, shape: tuple[int, int, int], words: int, layout: str):
    mask = coin(2, 2, words, share=0.7)
    mask[:, 0] = True
    visual, text = normal(0, 2, *shape, dtype=dtype), normal(1, 2, words, shape[0], dtype=dtype)
    return laid_out(visual, layout), laid_out(text, layout), mask


def on(device: str, tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides: `to` would close the gaps of a view."""
    if device == "cpu":
        return tensor
    memory = torch.empty(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=tensor.dtype, device="cpu")
    memory.untyped_storage().copy_(tensor.untyped_storage())
    return memory.to(device).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def run(backend: str, device: str = "cuda") -> None:
    for operators in (losses, similarities, selections, regions):
        operators(backend, device)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(name)
        torch.cuda.synchronize()
        print(f"every kernel of {name} ran")
