"""What every referring segmentation model offers: data, alignment, training and evaluation need only this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

ENCODER_LR_SCALE = 0.1  # the usual choice in the field (LAVT, CARIS): pretrained parts move ten times slower


@dataclass
class AlignmentInputs:
    """Encoder features that the pixel-word alignment is computed from, before any fusion of the two.

    visual: [B, C, h, w], any grid. text: [B, L, D], one feature per token.
    text_mask: bool [B, L], True = a real word; [CLS], [SEP] and padding are False. No row is all False.
    visual_valid: bool [B, h, w], False where the image holds letterbox padding; None = all of it is image.
    attended: bool [B, L], what the text encoder attends to: the words, [CLS] and [SEP]; None = the model does not tell.
    """

    visual: Tensor
    text: Tensor
    text_mask: Tensor
    visual_valid: Tensor | None = None
    attended: Tensor | None = None

    def detach(self) -> AlignmentInputs:
        return replace(self, visual=self.visual.detach(), text=self.text.detach())


class RISModel(nn.Module):
    """Base class. A model gives `tokenize`, `encode`, `forward`, `encoders`, and sets these attributes."""

    image_size: int  # side of the square that images are resized to
    resize: str = "squash"  # or "letterbox": how they are; `aml.predict` follows it
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    max_tokens: int
    visual_dim: int  # channels of AlignmentInputs.visual
    text_dim: int  # channels of AlignmentInputs.text
    shares_space = False  # whether pixels and words of AlignmentInputs were trained to be compared as they are

    def tokenize(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Sentences -> tokens int64 [N, max_tokens], text_mask bool [N, max_tokens].

        True = a token that is attended to: the words, and [CLS] and [SEP] too.
        """
        raise NotImplementedError

    def encode(self, image: Tensor, tokens: Tensor, text_mask: Tensor) -> AlignmentInputs:
        """The encoders alone, for strategies that need an alignment before the forward pass.

        image: float [B, 3, S, S], normalised with `image_mean` and `image_std`;
        tokens, text_mask: as `tokenize` gives them.
        """
        raise NotImplementedError

    def forward(
        self, image: Tensor, tokens: Tensor, text_mask: Tensor, return_alignment: bool = False
    ) -> Tensor | tuple[Tensor, AlignmentInputs]:
        """Logits [B, h', w'] (> 0 = the referent), of any resolution.

        With `return_alignment` also what `encode` would give, from the same single pass.
        """
        raise NotImplementedError

    def forward_filtered(self, filtered: Tensor, image: Tensor, tokens: Tensor, text_mask: Tensor) -> Tensor:
        """Logits of an image with blocks filled, for the words as they are encoded beside the whole one.

        A model whose words depend on the image gives its own.
        """
        return self(filtered, tokens, text_mask)

    def encoders(self) -> list[nn.Module]:
        """The pretrained parts, which `parameter_groups` trains at a tenth of the learning rate."""
        raise NotImplementedError

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict]:
        """Optimizer groups: encoders at `lr / 10`, no decay for norms and biases, nothing that is frozen.

        Each group has a `name`, so that logs and resumed optimizers can be read.
        """
        encoder_ids = {id(parameter) for encoder in self.encoders() for parameter in encoder.parameters()}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for parameter in self.parameters():
            if parameter.requires_grad:
                key = (id(parameter) in encoder_ids, parameter.ndim > 1)
                groups.setdefault(key, []).append(parameter)
        return [
            {
                "name": f"{'encoder' if encoder else 'decoder'}/{'decay' if decay else 'no_decay'}",
                "params": parameters,
                "lr": lr * (ENCODER_LR_SCALE if encoder else 1.0),
                "weight_decay": weight_decay if decay else 0.0,
            }
            for (encoder, decay), parameters in sorted(groups.items())
        ]
