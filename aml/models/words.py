"""From sentences to tokens, for models whose tokenizer is one of the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from aml.models.base import RISModel
from aml.models.pretrained import INSTALL


class TokenizedModel(RISModel):
    """A model that tokenizes by itself; the tokenizer travels in its state dict. Call `set_tokenizer` in __init__.

    keep_end: whether a sentence that is too long keeps its end token ([SEP]). The released programs cut it off.
    """

    special_tokens: Tensor
    keep_end = True

    def require_positions(self, text_config: Any, text_encoder: str) -> None:
        """Raise ValueError where `max_tokens` are more than the encoder of this configuration of transformers takes."""
        longest = getattr(text_config, "max_position_embeddings", None)  # some encoders take any number
        if longest is not None and self.max_tokens > longest:
            raise ValueError(
                f"max_tokens={self.max_tokens}: the text encoder of {text_encoder!r} has {longest} positions; give "
                f"{longest} or fewer"
            )

    def set_tokenizer(self, tokenizer: Tokenizer | None) -> None:
        """None: there is no tokenizer yet; it comes with a checkpoint."""
        self.tokenizer = tokenizer
        if tokenizer is None:
            self.register_buffer("special_tokens", None, persistent=False)
            return
        if self.keep_end:
            tokenizer.enable_truncation(self.max_tokens)
        else:
            tokenizer.no_truncation()
        tokenizer.enable_padding(**{**(tokenizer.padding or {}), "length": self.max_tokens})
        # What an empty sentence is encoded to: start, end and padding.
        special = sorted(set(tokenizer.encode("").ids))
        device = next(self.parameters()).device
        self.register_buffer("special_tokens", torch.tensor(special, device=device), persistent=False)

    def tokenize(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        if self.tokenizer is None:
            raise RuntimeError(f"this model has no tokenizer yet: load a checkpoint, or  {INSTALL}")
        encoded = self.tokenizer.encode_batch(list(sentences))
        length = self.max_tokens
        tokens = torch.tensor([item.ids[:length] for item in encoded], dtype=torch.int64)
        attended = torch.tensor([item.attention_mask[:length] for item in encoded], dtype=torch.bool)
        return tokens.view(-1, length), attended.view(-1, length)

    def real_words(self, tokens: Tensor, text_mask: Tensor) -> Tensor:
        """bool [B, L]: attended tokens that are words. In an empty sentence its special tokens stand for them."""
        special = (tokens.unsqueeze(-1) == self.special_tokens).any(-1)
        real = text_mask & ~special
        return real | (text_mask & ~real.any(1, keepdim=True))

    # The tokenizer's state is bytes, so that safetensors takes it: no other file is needed.

    def get_extra_state(self) -> Tensor:
        if self.tokenizer is None:
            raise RuntimeError("this model has no tokenizer, so its state is not complete; load a checkpoint first")
        return torch.frombuffer(bytearray(self.tokenizer.to_str().encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self.set_tokenizer(Tokenizer.from_str(bytes(state.cpu().numpy()).decode()))
