"""PatchMax: how well each pixel matches its best word, after a projection into a space where that means something.

    visual [B, C, h, w], text [B, L, D] -> projection -> `aml_kernels.pixel_text_similarity` -> map [B, h, w]

What the projections are worth is measured by `aml alignment-report` and told in docs/alignment.md: untrained ones know
nothing of the sentence.

Source: Chen et al., "AMLRIS: Alignment-aware Masked Learning for Referring Image Segmentation", ICLR 2026. Theirs are
the idea and the Gaussian projection; learning the projection through the map is ours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aml.models.base import AlignmentInputs
from aml_kernels import pixel_text_similarity

PROJECTIONS = ("trained", "gaussian", "shared", "linear", "model", "none")
WORDS = ("words", "attended", "all")
RANDOM_DIM = 2048  # the paper's D_a


class TrainedProjection(nn.Module):
    """Two linear maps into a common width, learned by `PatchMax.auxiliary_loss`."""

    def __init__(self, visual_dim: int, text_dim: int, dim: int):
        super().__init__()
        self.visual = nn.Conv2d(visual_dim, dim, 1, bias=False)
        self.text = nn.Linear(text_dim, dim, bias=False)

    def forward(self, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.visual(visual), self.text(text)


class RandomProjection(nn.Module):
    """The paper's random matrices W_v [2048, C] and W_t [2048, D], entries N(0, 1/2048), never trained.

    <W_v v, W_t t> = <v, W_v^T W_t t>: the two are folded into one C x D matrix that words are multiplied with, so
    neither is anything 2048 wide formed, nor are pixels multiplied at all. `normalize` therefore acts in front of the
    projection; lengths behind it differ by 1 / sqrt(2 * 2048) = 1.6 % from pixel to pixel, and no more.

    shared: one matrix for both, whose first C and D columns are used. It then keeps inner products approximately
    (Johnson and Lindenstrauss, 1984), which two independent ones do not.
    """

    matrix: Tensor

    def __init__(self, visual_dim: int, text_dim: int, seed: int, *, shared: bool, normalize: bool):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        columns = max(visual_dim, text_dim) if shared else visual_dim + text_dim
        wide = torch.randn(RANDOM_DIM, columns, generator=generator, dtype=torch.float64) / math.sqrt(RANDOM_DIM)
        visual, text = wide[:, :visual_dim], wide[:, :text_dim] if shared else wide[:, visual_dim:]
        self.register_buffer("matrix", (visual.T @ text).float())
        self.normalize = normalize

    def forward(self, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        if self.normalize:
            visual, text = F.normalize(visual, dim=1), F.normalize(text, dim=2)
        return visual, F.linear(text, self.matrix)


class LinearProjection(nn.Module):
    """The released code's: an affine map of the words alone, as PyTorch starts it, which no gradient reaches."""

    weight: Tensor
    bias: Tensor

    def __init__(self, visual_dim: int, text_dim: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(text_dim)
        for name, shape in (("weight", (visual_dim, text_dim)), ("bias", (visual_dim,))):
            self.register_buffer(name, torch.empty(shape).uniform_(-bound, bound, generator=generator))

    def forward(self, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return visual, F.linear(text, self.weight, self.bias)


class NoProjection(nn.Module):
    def forward(self, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return visual, text


class PatchMax(nn.Module):
    """The similarity map of a batch.

    projection: "trained", two linear maps to `dim` dimensions; "gaussian", the paper's two random matrices; "shared",
        one random matrix for both; "linear", the released code's, of the words alone; "model", the model's own space
        (CLIP's), or "none": features are compared as they are, which takes equal widths.
    words: what a pixel may match: "words"; "attended", [CLS] and [SEP] too; "all", padding too (the released code).
    normalize: compare directions. softmax: over the words, before the maximum; it costs signal (docs/alignment.md).
    scale: factor on the similarities, which matters to softmax and to a fixed threshold. seed: of what is random.
    """

    def __init__(
        self,
        visual_dim: int,
        text_dim: int,
        *,
        projection: str = "trained",
        dim: int = 128,
        words: str = "words",
        normalize: bool = True,
        softmax: bool = False,
        scale: float = 1.0,
        seed: int = 0,
    ):
        super().__init__()
        if projection not in PROJECTIONS:
            raise ValueError(f"projection={projection!r}: expected one of {', '.join(PROJECTIONS)}")
        if words not in WORDS:
            raise ValueError(f"words={words!r}: expected one of {', '.join(WORDS)}")
        self.words = words
        self.learns = projection == "trained"
        folded = projection in ("gaussian", "shared")
        # Of `pixel_text_similarity`, and of `aml_loss`.
        self.options: dict[str, Any] = {"normalize": normalize and not folded, "scale": scale, "softmax": softmax}
        if self.learns:
            self.projection: nn.Module = TrainedProjection(visual_dim, text_dim, dim)
            self.log_scale = nn.Parameter(torch.tensor([math.log(10.0)]))  # not 0-d: FSDP divides along a dimension
            self.bias = nn.Parameter(torch.tensor([-4.0]))
        elif folded:
            shared = projection == "shared"
            self.projection = RandomProjection(visual_dim, text_dim, seed, shared=shared, normalize=normalize)
        elif projection == "linear":
            self.projection = LinearProjection(visual_dim, text_dim, seed)
        elif visual_dim != text_dim:
            raise ValueError(
                f"projection={projection!r}: features are compared as they are, but pixels have {visual_dim} channels "
                f"and words {text_dim}; expected trained, gaussian, shared or linear"
            )
        else:
            self.projection = NoProjection()

    def project(self, alignment: AlignmentInputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """(visual, text, text_mask) for the operators, which take `options` besides."""
        return *self.projection(alignment.visual, alignment.text), self._matched(alignment)

    def forward(self, alignment: AlignmentInputs) -> Tensor:
        """The map [B, h, w]: per pixel the similarity to its best word."""
        return pixel_text_similarity(*self.project(alignment), **self.options)

    def auxiliary_loss(self, similarity: Tensor, target: Tensor, map_valid: Tensor | None = None) -> Tensor:
        """Trains the projection: cross entropy of scale * similarity + bias with the target's share of each cell."""
        share = F.adaptive_avg_pool2d(target.float(), (similarity.shape[-2], similarity.shape[-1]))
        logits = similarity * self.log_scale.exp() + self.bias
        loss = F.binary_cross_entropy_with_logits(logits, share, reduction="none")
        if map_valid is None:
            return loss.mean()
        return torch.where(map_valid, loss, 0).sum() / map_valid.sum().clamp_min(1)

    def _matched(self, alignment: AlignmentInputs) -> Tensor | None:
        if self.words == "words":
            return alignment.text_mask
        if self.words == "all":
            return None
        if alignment.attended is None:
            raise ValueError(
                "words='attended': the model does not tell AlignmentInputs.attended; expected words or all"
            )
        return alignment.attended
