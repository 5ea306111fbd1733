"""Attach alignment-aware masked learning to a model that was not written for it.

    tap = FeatureTap(net, visual="backbone.layer3", text="encoder")
    logits, features = tap(image, tokens, text_mask, return_alignment=True)
    loss, record = aligner(logits, target, features, step)          # aligner: aml.alignment.AlignmentLoss
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from aml.models.base import AlignmentInputs

Call = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
Pick = Callable[[Any], Tensor]


def _plain_call(model: Any, image: Tensor, tokens: Tensor, text_mask: Tensor) -> Tensor:
    return model(image, tokens, text_mask)


class FeatureTap(nn.Module):
    """A model with `forward(..., return_alignment=True)` and `encode`, as the strategies need them.

    model: any module. visual, text: names of the two submodules whose outputs are compared, as in
        `model.named_modules()`; each must run exactly once in a forward pass.
    call: from (model, image, tokens, text_mask) to logits [B, h, w]; default: `model(image, tokens, text_mask)`.
    pick_visual: from the output of `visual` to a map [B, C, h, w]. By default it may be such a map, tokens [B, N, C]
        of a square grid, with or without a class token in front, or an object with `last_hidden_state`.
    pick_text: from the output of `text` to one feature per token, [B, L, D]; by default that, or such an object.

    The weights stay those of the model: `tap.model`. `encode` costs a whole forward pass of it.
    """

    def __init__(
        self,
        model: nn.Module,
        visual: str,
        text: str,
        *,
        call: Call = _plain_call,
        pick_visual: Pick | None = None,
        pick_text: Pick | None = None,
    ):
        super().__init__()
        self.model, self.call = model, call
        self._picks = {"visual": pick_visual or _square_map, "text": pick_text or _tokens}
        self._names = {"visual": visual, "text": text}
        self._outputs: dict[str, list[Any]] | None = None  # of the running forward pass
        for role, name in self._names.items():
            self._submodule(role, name).register_forward_hook(self._hook(role))

    def forward(
        self, image: Tensor, tokens: Tensor, text_mask: Tensor, return_alignment: bool = False
    ) -> Tensor | tuple[Tensor, AlignmentInputs]:
        """text_mask: bool [B, L], True for the real words: it is handed to `call`, and to the alignment as it is."""
        if not return_alignment:
            return self.call(self.model, image, tokens, text_mask)
        # Only now do the hooks keep what they see: not in the second run of gradient checkpointing, in the backward.
        self._outputs = {"visual": [], "text": []}
        try:
            logits = self.call(self.model, image, tokens, text_mask)
            visual, text = self._feature("visual"), self._feature("text")
        finally:
            self._outputs = None
        if text.shape[1] != text_mask.shape[1]:
            raise ValueError(
                f"text={self._names['text']!r} gave {text.shape[1]} tokens, text_mask has {text_mask.shape[1]}: "
                "choose the matching ones with pick_text"
            )
        return logits, AlignmentInputs(visual, text, text_mask)

    def encode(self, image: Tensor, tokens: Tensor, text_mask: Tensor) -> AlignmentInputs:
        return self(image, tokens, text_mask, return_alignment=True)[1]

    def _submodule(self, role: str, name: str) -> nn.Module:
        known = dict(self.model.named_modules())
        if name in known:
            return known[name]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or [n for n in known if n and "." not in n]
        raise ValueError(f"{role}={name!r} is no submodule of {type(self.model).__name__}; near it: {', '.join(near)}")

    def _hook(self, role: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._outputs is not None:
                self._outputs[role].append(output)

        return keep

    def _feature(self, role: str) -> Tensor:
        assert self._outputs is not None
        outputs, name = self._outputs[role], self._names[role]
        if len(outputs) != 1:
            raise ValueError(f"{role}={name!r} ran {len(outputs)} times in a forward pass; expected once")
        feature = self._picks[role](outputs[0])
        wanted = ("[B, C, h, w]", 4) if role == "visual" else ("[B, L, D]", 3)
        if not isinstance(feature, Tensor) or feature.ndim != wanted[1]:
            given = list(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
            raise ValueError(f"{role}={name!r} gave {given}; expected {wanted[0]}: convert it with pick_{role}")
        return feature


def _tokens(output: Any) -> Any:
    return getattr(output, "last_hidden_state", output)


def _square_map(output: Any) -> Any:
    """[B, C, h, w] as it is; [B, N, C] or [B, 1 + N, C] as a square map if N is a square number."""
    feature = _tokens(output)
    if not isinstance(feature, Tensor) or feature.ndim != 3:
        return feature
    count = feature.shape[1]
    side = math.isqrt(count)
    if side * side == count - 1:  # a class token stands in front
        feature = feature[:, 1:]
    elif side * side != count:
        return feature
    return feature.transpose(1, 2).unflatten(2, (side, side))
