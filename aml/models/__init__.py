"""Referring segmentation models, by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from aml.models.base import AlignmentInputs, RISModel
from aml.models.caris import CARIS
from aml.models.clipseg import CLIPSegRIS
from aml.models.compact import CompactRIS
from aml.models.tap import FeatureTap

MODELS: dict[str, type[RISModel]] = {"compact": CompactRIS, "caris": CARIS, "clipseg": CLIPSegRIS}

__all__ = ["MODELS", "AlignmentInputs", "FeatureTap", "RISModel", "build_model"]


def build_model(name: str, **options: Any) -> RISModel:
    """The model `name`, one of `MODELS`, built with its own options.

    Raises ValueError for an unknown model and TypeError for an unknown option, naming the nearest known one.
    """
    if name not in MODELS:
        near = _nearest(name, MODELS)
        raise ValueError(f"unknown model {name!r}{near}; known: {', '.join(sorted(MODELS))}")
    model = MODELS[name]
    known = list(inspect.signature(model).parameters)
    for option in options:
        if option not in known:
            near = _nearest(option, known)
            raise TypeError(f"model {name!r} has no option {option!r}{near}; it has: {', '.join(known)}")
    return model(**options)


def _nearest(given: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
