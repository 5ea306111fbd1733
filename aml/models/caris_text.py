"""The language side of CARIS: BERT that also attends to prompts computed from the image."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn

from aml.models import pretrained as sources
from aml.models.checkpointing import recomputed

BERT = "bert-base-uncased"
PROMPT_GRIDS = (1, 2)  # one prompt for the whole image, four for its quarters
N_PROMPTS = sum(side * side for side in PROMPT_GRIDS)


class VisualPrompts(nn.Module):
    """Coarsest map [B, C, h, w] -> prompts [B, 5, D]: learned ones plus the means of the image and its quarters."""

    def __init__(self, visual_dim: int, text_dim: int):
        super().__init__()
        self.in_linears = nn.ModuleList(nn.Linear(visual_dim, text_dim) for _ in PROMPT_GRIDS)
        self.out_linears = nn.ModuleList(nn.Linear(text_dim, text_dim) for _ in PROMPT_GRIDS)
        self.lang_prompts = nn.Embedding(N_PROMPTS, text_dim)
        self.lang_prompts_norm = nn.LayerNorm(text_dim)
        for linear in (*self.in_linears, *self.out_linears):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, visual: Tensor) -> Tensor:
        prompts = []
        for side, first, second in zip(PROMPT_GRIDS, self.in_linears, self.out_linears, strict=True):
            means = F.adaptive_avg_pool2d(visual, side).flatten(2).transpose(1, 2)
            prompts.append(second(F.relu(first(means))))
        return self.lang_prompts_norm(self.lang_prompts.weight + torch.cat(prompts, dim=1))


def encode_words(bert: Any, tokens: Tensor, text_mask: Tensor, prompts: Tensor, checkpointing: bool = False) -> Tensor:
    """Last layer of BERT over words and prompts: [B, L + P, D], the words first.

    Prompts join behind the embeddings, so they have no position and no embedding norm. Padding is no key of the
    attention, but is computed as a query.
    """
    states = torch.cat([bert.embeddings(input_ids=tokens), prompts], dim=1)
    attended = F.pad(text_mask, (0, prompts.shape[1]), value=True)
    bias = torch.zeros_like(attended, dtype=states.dtype).masked_fill(~attended, -1e4)[:, None, None]
    for layer in bert.encoder.layer:
        states = recomputed(checkpointing, layer, states, bias)
    return states


def build_bert(name: str, pretrained: bool) -> tuple[Any, Tokenizer | None]:
    """BERT without pooler, and its tokenizer. `name`: "bert-base-uncased", another hub name, or a folder.

    Without `pretrained` the weights are random. The architecture of bert-base-uncased and, in the package of the
    embedded MiniLM, its vocabulary are at hand without a download; where that package is missing too, the tokenizer is
    None and comes from the checkpoint.
    """
    options: dict[str, Any] = {"attn_implementation": "eager"}  # of 25 tokens: nothing to gain from another
    try:
        if name == BERT and not pretrained:
            config = transformers.BertConfig(**options)
        else:
            config = transformers.AutoConfig.from_pretrained(name, **options)
        if not isinstance(config, transformers.BertConfig):
            raise ValueError(f"it is a {config.model_type}, expected a bert")
        if pretrained:
            with sources.no_progress_bar():
                bert = transformers.BertModel.from_pretrained(name, add_pooling_layer=False, **options)
        else:
            bert = transformers.BertModel(config, add_pooling_layer=False)
        return bert, _tokenizer(name, pretrained)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text_encoder={name!r} cannot be read: give {BERT!r} or a folder that transformers reads; random weights "
            f"of {BERT} need no file (model.pretrained=false). {error}"
        ) from error


def _tokenizer(name: str, pretrained: bool) -> Tokenizer | None:
    if name == BERT and importlib.util.find_spec(sources.MINILM_MODULE) is not None:
        return sources.tokenizer(str(sources.minilm_folder()))  # the same vocabulary and rules
    return sources.tokenizer(name) if pretrained or name != BERT else None
