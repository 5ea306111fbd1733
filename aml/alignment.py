"""The loss of a training step: what a strategy leaves out of it, and what trains the similarity map behind that.

    features -> PatchMax -> similarity map
                              | detached                      | with gradient, into the projection only
    logits, target -> `aml_kernels.masked_loss` by quantile   auxiliary loss on the map

Strategies: "none"; "loss" leaves out pixels of the loss; "image" fills blocks of the input with the mean colour;
"released" does as the released code does. Controls: "random" and "easiest" pixels, "random_blocks". docs/alignment.md
says how they compare.

Source: Chen et al., "AMLRIS: Alignment-aware Masked Learning for Referring Image Segmentation", ICLR 2026; to filter
the loss instead of the image is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aml import strategies
from aml.data.pixels import valid_cells
from aml.models.base import AlignmentInputs
from aml.patchmax import PatchMax
from aml.strategies import BLOCK_STRATEGIES, PIXEL_STRATEGIES, STRATEGIES, BlockFilter
from aml_kernels import aml_loss, masked_loss, sample_quantile

Record = dict[str, Tensor]


class AlignmentLoss(nn.Module):
    """BCE + Dice over what a strategy keeps, plus the auxiliary loss that trains the projection.

    strategy: one of STRATEGIES. "loss" leaves out of the loss, per sample, the pixels below the limit; "random" and
        "easiest" (lowest loss) are its controls: in every sample they leave out exactly as many. "image" drops blocks
        of the input that hold pixels below the limit, after a first pass of the encoders without gradient;
        "random_blocks" is its control. "released": two passes, half the loss each (`strategies.released_filter`).
    projection, dim, words, normalize, softmax, scale: of the similarity map, see `PatchMax`.
    quantile: the limit is this quantile of a sample's own map, in [0, 1); or threshold: the limit itself.
    protect_target: no pixel of the target is left out, no block that holds one is dropped ("released" never protects).
    warmup_steps: nothing is left out before this step, while the projection learns.
    drop_ratio, block_size, max_dropped, fill: of the blocks, see `BlockFilter`.
    bce_weight, dice_weight, class_weight: see `masked_loss`.
    aux_weight: weight of the loss that trains the projection, under every strategy.
    aux_into_encoders: let that loss train the encoders too. seed: of all that is random here.
    """

    def __init__(
        self,
        *,
        visual_dim: int,
        text_dim: int,
        strategy: str = "loss",
        projection: str = "trained",
        dim: int = 128,
        words: str = "words",
        normalize: bool = True,
        softmax: bool = False,
        scale: float = 1.0,
        quantile: float | None = None,
        threshold: float | None = None,
        protect_target: bool = True,
        warmup_steps: int = 100,
        drop_ratio: float = 0.25,
        block_size: int = 32,
        max_dropped: float = 0.5,
        fill: float = 0.0,
        bce_weight: float = 1.0,
        dice_weight: float = 1.0,
        class_weight: tuple[float, float] = (1.0, 1.0),
        aux_weight: float = 0.1,
        aux_into_encoders: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy={strategy!r}: expected one of {', '.join(STRATEGIES)}")
        if quantile is not None and threshold is not None:
            raise ValueError(f"quantile={quantile}, threshold={threshold}: expected one of them")
        if threshold is None and quantile is None:
            quantile = 0.25
        if quantile is not None and not 0 <= quantile < 1:
            raise ValueError(f"quantile={quantile}: expected a share of pixels to leave out, in [0, 1)")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps}: expected 0 or more")
        if aux_into_encoders and strategy in BLOCK_STRATEGIES:
            raise ValueError(f"aux_into_encoders=True: {strategy!r} computes its map without gradient; expected False")
        self.strategy, self.warmup_steps, self.seed = strategy, warmup_steps, seed
        self.quantile, self.threshold, self.protect_target = quantile, threshold, protect_target
        self.blocks = BlockFilter(drop_ratio, block_size, max_dropped, fill)
        self.aux_weight, self.aux_into_encoders = aux_weight, aux_into_encoders
        self.class_weight = class_weight
        self.loss_options: dict[str, Any] = {"bce_weight": bce_weight, "dice_weight": dice_weight}
        self.loss_options["class_weight"] = class_weight
        self.patchmax = PatchMax(
            visual_dim,
            text_dim,
            projection=projection,
            dim=dim,
            words=words,
            normalize=normalize,
            softmax=softmax,
            scale=scale,
            seed=seed,
        )

    @property
    def limit(self) -> dict[str, Any]:
        """The limit as `masked_loss` and `alignment_scores` take it."""
        return {"quantile": self.quantile} if self.threshold is None else {"threshold": self.threshold}

    def similarity(self, alignment: AlignmentInputs) -> Tensor:
        """The map [B, h, w], by default the cosine with the best word; its gradient ends at the projection."""
        return self.patchmax(alignment if self.aux_into_encoders else alignment.detach())

    # ------------------------------------------------------------------------------------------- one training step

    def training_step(
        self, model: nn.Module, batch: dict[str, Tensor], step: int, draw: int | None = None
    ) -> tuple[Tensor, Record]:
        """Run the model and return what `forward` returns, under every strategy.

        model: a `RISModel`, or a `FeatureTap`. batch: image, tokens, text_mask, target, and optionally valid. draw: as
        in `forward`.
        """
        draw = step if draw is None else draw
        inputs = batch["image"], batch["tokens"], batch["text_mask"]
        if self._is_active(step) and self.strategy in BLOCK_STRATEGIES:
            return self._step_on_filtered(model, inputs, batch["target"], draw, batch.get("valid"))
        logits, alignment = model(*inputs, return_alignment=True)
        if self._is_active(step) and self.strategy == "released":
            if "valid" in batch:
                raise ValueError("valid: strategy 'released' knows no padding; expected squashed images")
            return self._step_on_both(model, inputs, batch["target"], draw, logits, alignment)
        return self(logits, batch["target"], alignment, step, batch.get("valid"), draw)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        alignment: AlignmentInputs,
        step: int,
        valid: Tensor | None = None,
        draw: int | None = None,
    ) -> tuple[Tensor, Record]:
        """logits [B, h', w']; target [B, H, W] bool or uint8; step: of the optimizer, from 0.

        valid: bool [B, H, W], False for letterbox padding, which then counts for nothing. draw: with the seed it fixes
        what is random, so each batch needs its own, where a step has several or there are several ranks; default: step.
        Strategies that filter the image do so in `training_step`: here they keep every pixel.

        Returns the loss and a record of detached scalars: loss, bce, dice, iou (over the whole image); kept and
        target_left_out (shares of pixels and of target pixels); threshold, where something is left out; aux where the
        projection is trained.
        """
        draw = step if draw is None else draw
        map_valid = _valid_cells(alignment, valid)
        filtering: dict[str, Any] = {"valid": valid}
        threshold = similarity = None
        if self._is_active(step) and self.strategy in PIXEL_STRATEGIES:
            filtering |= {"map_valid": map_valid, "protect_target": self.protect_target, **self.limit}
            if self.strategy == "loss" and not self.patchmax.learns:
                options = filtering | self.patchmax.options | self.loss_options
                features = self.patchmax.project(alignment.detach())
                loss, stats = aml_loss(logits, target, *features, return_stats=True, **options)
                return self._finish(loss, _record(stats, target, valid, stats.threshold), None, target, map_valid)
            similarity = self.similarity(alignment)
            filtering["similarity"] = similarity.detach()
            if self.strategy != "loss":
                random = self.strategy == "random"
                worth = strategies.noise(target, self.seed, draw) if random else strategies.pixel_losses(logits, target)
                filtering, threshold = strategies.worst_ranked(logits, target, worth, filtering)
        elif self.patchmax.learns:
            similarity = self.similarity(alignment)
        loss, stats = masked_loss(logits, target, return_stats=True, **filtering, **self.loss_options)
        if self.strategy == "loss" and self._is_active(step):
            threshold = stats.threshold
        return self._finish(loss, _record(stats, target, valid, threshold), similarity, target, map_valid)

    def _step_on_filtered(
        self, model: nn.Module, inputs: tuple[Tensor, ...], target: Tensor, draw: int, valid: Tensor | None
    ) -> tuple[Tensor, Record]:
        """Encoders without gradient, then the model on what is left of the image."""
        with _as_in_evaluation(model), torch.no_grad():
            alignment = model.encode(*inputs)  # type: ignore[operator]
        # Autocast remembers weights in half precision, these without a gradient: the next pass must not take them.
        torch.clear_autocast_cache()
        map_valid = _valid_cells(alignment, valid)
        similarity = self.similarity(alignment)
        limit = self._limits(similarity.detach(), map_valid)
        protect = target > 0.5 if self.protect_target else None
        seed = self.seed * 2**32 + draw % 2**32
        filtered, dropped = self.blocks.weak(inputs[0], similarity.detach(), limit, seed, protect, map_valid)
        if self.strategy == "random_blocks":
            count = dropped.sum((1, 2))
            filtered, dropped = self.blocks.random(inputs[0], count, seed + 2**63, protect, valid)
        logits = model(filtered, *inputs[1:])
        loss, stats = masked_loss(logits, target, valid=valid, return_stats=True, **self.loss_options)
        record = _record(stats, target, valid, limit) | _dropped_shares(dropped, self.blocks.block_size, target, valid)
        return self._finish(loss, record, similarity, target, map_valid)

    def _step_on_both(
        self,
        model: nn.Module,
        inputs: tuple[Tensor, ...],
        target: Tensor,
        draw: int,
        logits: Tensor,
        alignment: AlignmentInputs,
    ) -> tuple[Tensor, Record]:
        """Half the loss of the clean image and half that of the filtered one, as the released code has it."""
        similarity = self.similarity(alignment)
        limit = self._limits(similarity.detach(), None)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + draw) % 2**32)
        filtered, dropped = strategies.released_filter(
            inputs[0], similarity.detach(), limit, lambda count: self._permutation(count, generator)
        )
        # A model whose words depend on the image has them from the clean one.
        second = getattr(model, "forward_filtered", None)
        masked_logits = model(filtered, *inputs[1:]) if second is None else second(filtered, *inputs)
        losses, records = [], []
        for each in (logits, masked_logits):
            loss, stats = masked_loss(each, target, reduction="none", return_stats=True, **self.loss_options)
            # The mean over the batch's pixels, as a cross entropy has it, not over samples.
            background, foreground = self.class_weight
            weight = background * (stats.kept - stats.kept_target) + foreground * stats.kept_target
            losses.append((loss * weight).sum() / weight.sum())
            records.append(_record(stats, target, None, limit))
        record = records[0] | _dropped_shares(dropped, strategies.RELEASED_BLOCK, target, None)
        record |= {"loss_clean": losses[0], "loss_filtered": losses[1]}
        return self._finish(0.5 * losses[0] + 0.5 * losses[1], record, similarity, target, None)

    # ---------------------------------------------------------------------------------------------------- its parts

    def _is_active(self, step: int) -> bool:
        return step >= self.warmup_steps

    def _limits(self, similarity: Tensor, map_valid: Tensor | None) -> Tensor:
        if self.threshold is not None:
            return similarity.new_full((len(similarity),), self.threshold)
        assert self.quantile is not None
        return sample_quantile(similarity, self.quantile, valid=map_valid)

    def _permutation(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randperm(count, generator=generator)

    def _finish(
        self, loss: Tensor, record: Record, similarity: Tensor | None, target: Tensor, map_valid: Tensor | None
    ) -> tuple[Tensor, Record]:
        if self.patchmax.learns:
            assert similarity is not None
            record["aux"] = self.patchmax.auxiliary_loss(similarity, target, map_valid)
            loss = loss + self.aux_weight * record["aux"]
        record["loss"] = loss
        return loss, {name: value.detach() for name, value in record.items()}


def _record(stats: Any, target: Tensor, valid: Tensor | None, threshold: Tensor | None) -> Record:
    targets = (target > 0.5 if valid is None else (target > 0.5) & valid).sum()
    record = {
        "bce": stats.bce.mean(),
        "dice": stats.dice.mean(),
        "iou": (stats.intersection / stats.union.clamp_min(1)).mean(),
        "kept": (stats.kept / strategies.existing_pixels(target, valid)).mean(),
        "target_left_out": (targets - stats.kept_target.sum()) / targets.clamp_min(1),
    }
    return record if threshold is None else record | {"threshold": threshold.mean()}


def _dropped_shares(dropped: Tensor, block_size: int, target: Tensor, valid: Tensor | None) -> Record:
    """kept and target_left_out, of the image and not of the loss."""
    gone = strategies.pixels_of_blocks(dropped, block_size, target.shape[1:])
    positive = target > 0.5
    if valid is not None:
        gone, positive = gone & valid, positive & valid
    return {
        "kept": 1 - (gone.sum((1, 2)) / strategies.existing_pixels(target, valid)).mean(),
        "target_left_out": (gone & positive).sum() / positive.sum().clamp_min(1),
    }


def _valid_cells(alignment: AlignmentInputs, valid: Tensor | None) -> Tensor | None:
    """As the model tells, or else the cells that are picture."""
    if alignment.visual_valid is not None or valid is None:
        return alignment.visual_valid
    return valid_cells(valid, (alignment.visual.shape[2], alignment.visual.shape[3]))


@contextmanager
def _as_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Without dropout and without new batch statistics; each module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
