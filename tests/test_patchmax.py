"""Projections of the similarity map and what a pixel may match; parity with the released program's numbers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import golden
import pytest
import torch
from torch.nn.functional import normalize

from aml.assembly import build_aligner
from aml.config import ConfigError, load
from aml.models import MODELS
from aml.models.base import AlignmentInputs
from aml.patchmax import PROJECTIONS, RANDOM_DIM, PatchMax
from aml_kernels import pixel_text_similarity

pytestmark = pytest.mark.usefixtures("one_thread")
needs_golden = pytest.mark.skipif(not golden.GOLDEN.is_dir(), reason=f"{golden.GOLDEN} is absent")


def example(visual_dim: int = 12, text_dim: int = 10, attended: bool = True) -> AlignmentInputs:
    """Token 0 and the last attended one are [CLS] and [SEP], as every sample has them; then comes padding."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([3, 5, 7])[:, None]
    position = torch.arange(8).expand(3, 8)
    real = position < lengths
    words = real & (position > 0) & (position < lengths - 1)
    visual = torch.randn(3, visual_dim, 6, 5, generator=generator)
    text = torch.randn(3, 8, text_dim, generator=generator)
    return AlignmentInputs(visual, text, words, attended=real if attended else None)


def wide_matrices(seed: int, shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's two matrices, entries N(0, 1/2048), as they are drawn before they are folded."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(RANDOM_DIM, 12 if shared else 22, generator=generator, dtype=torch.float64)
    wide /= math.sqrt(RANDOM_DIM)
    return wide[:, :12], wide[:, :10] if shared else wide[:, 12:]


@pytest.mark.parametrize("projection", ["gaussian", "shared"])
def test_the_folded_projection_equals_the_wide_products(projection):
    features = example()
    patchmax = PatchMax(12, 10, projection=projection, seed=4)
    assert patchmax.projection.matrix.shape == (12, 10)  # nothing is 2048 wide
    of_pixels, of_words = wide_matrices(4, projection == "shared")
    pixels = torch.einsum("dc,bchw->bhwd", of_pixels, normalize(features.visual.double(), dim=1))
    words = normalize(features.text.double(), dim=2) @ of_words.T
    scores = torch.einsum("bhwd,bld->bhwl", pixels, words)
    expected = scores.masked_fill(~features.text_mask[:, None, None], -torch.inf).amax(3)
    torch.testing.assert_close(patchmax(features).double(), expected, atol=2e-6, rtol=0)
    # To normalise behind the projection instead makes next to no difference: lengths hardly vary there.
    behind = torch.einsum("bhwd,bld->bhwl", normalize(pixels, dim=3), normalize(words, dim=2))
    behind = behind.masked_fill(~features.text_mask[:, None, None], -torch.inf).amax(3)
    assert (behind - expected).abs().max() < 0.1 * expected.abs().max()
    assert not list(patchmax.parameters())


def test_only_a_shared_random_matrix_keeps_inner_products():
    features = example(12, 12)
    cosines = PatchMax(12, 12, projection="none")(features)
    shared, independent = (PatchMax(12, 12, projection=name)(features) for name in ("shared", "gaussian"))
    assert (shared - cosines).abs().max() < 0.1
    assert (independent - cosines).abs().max() > 0.3


def test_what_a_pixel_may_match():
    features = example()
    settings = ("words", "attended", "all")
    maps = {words: PatchMax(12, 10, projection="gaussian", words=words)(features) for words in settings}
    # A maximum over more can only be higher.
    assert (maps["attended"] >= maps["words"]).all() and (maps["all"] >= maps["attended"]).all()
    assert not torch.equal(maps["attended"], maps["words"]) and not torch.equal(maps["all"], maps["attended"])
    changed = AlignmentInputs(features.visual, features.text.clone(), features.text_mask, attended=features.attended)
    changed.text[~features.attended] = 9.0
    again = {words: PatchMax(12, 10, projection="gaussian", words=words)(changed) for words in maps}
    assert [torch.equal(maps[words], again[words]) for words in maps] == [True, True, False]


def test_scale_softmax_and_normalize_reach_the_operator():
    features = example(8, 8)
    expected = pixel_text_similarity(
        features.visual, features.text, features.text_mask, normalize=False, scale=0.3, softmax=True
    )
    options = {"normalize": False, "scale": 0.3, "softmax": True}
    for projection in ("none", "model"):
        assert torch.equal(PatchMax(8, 8, projection=projection, **options)(features), expected)
    # A folded projection without normalisation compares the features' own lengths too.
    raw = PatchMax(12, 10, projection="gaussian", normalize=False)
    longer = example()
    longer.visual.mul_(3)
    torch.testing.assert_close(raw(longer), 3 * raw(example()))
    directions = PatchMax(12, 10, projection="gaussian")
    torch.testing.assert_close(directions(longer), directions(example()))


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_seeds_and_states(projection):
    """What is random follows from the seed alone, and is part of the state."""
    built = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(built))
        built.append(PatchMax(10, 10, projection=projection, seed=seed))
    first, same, other = (patchmax(example(10, 10)).detach() for patchmax in built)
    if projection in ("gaussian", "shared", "linear"):
        assert torch.equal(first, same) and not torch.equal(first, other)
    built[2].load_state_dict(built[0].state_dict())
    assert torch.equal(built[2](example(10, 10)), built[0](example(10, 10)))


def test_words_that_the_model_does_not_tell():
    with pytest.raises(ValueError, match="words='attended'.*expected words or all"):
        PatchMax(12, 10, words="attended")(example(attended=False))


def test_the_models_own_space_is_for_models_that_have_one():
    config = load(None, ["alignment.projection=model"])
    own, other = (SimpleNamespace(visual_dim=8, text_dim=8, shares_space=shares) for shares in (True, False))
    assert build_aligner(config, own).patchmax(example(8, 8)).shape == (3, 6, 5)
    with pytest.raises(ConfigError, match="alignment.projection=model: compact has no space"):
        build_aligner(config, other)
    assert [model.shares_space for model in MODELS.values()] == [name == "clipseg" for name in MODELS]


@needs_golden
@pytest.mark.parametrize(
    "case", ["small14", "small7_L5", "small7_L1", "sat14", "rect", "real7_L5", "real14", "real14_sat", "real15"]
)
def test_released_alignment_is_reproduced(case):
    """An affine map of the words, softmax over all of them, padding included, of unnormalised products."""
    pytest.importorskip("safetensors")
    tensors, meta = golden.read("alignment")
    meta, gauss = meta["cases"][case], golden.recipe().gauss
    visual_dim, text_dim, seed = meta["visual_dim"], meta["text_dim"], meta["seed"]

    def draw(offset: int, shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.from_numpy(gauss(seed + offset, shape, scale))

    patchmax = PatchMax(visual_dim, text_dim, projection="linear", words="all", normalize=False, softmax=True)
    patchmax.projection.load_state_dict(
        {"weight": draw(0, (visual_dim, text_dim), text_dim**-0.5), "bias": draw(1, (visual_dim,), 0.1)}
    )
    text = draw(4, (meta["B"], meta["L"], text_dim), meta["text_scale"])
    visual = draw(5, (meta["B"], visual_dim, meta["H"], meta["W"]), meta["visual_scale"])
    features = AlignmentInputs(visual, text, torch.zeros(text.shape[:2], dtype=torch.bool))
    # A softmax is off by up to a quarter of what the difference of two scores is off by. Scores reach 120, and are off
    # by as many roundings as the processor's matrix products make.
    words = torch.nn.functional.linear(text, **patchmax.projection.state_dict())
    tolerance = 1e-6 + 2**-22 * float((visual.flatten(2).mT @ words.mT).abs().max())
    torch.testing.assert_close(patchmax(features).flatten(1), tensors[f"{case}.relevance"], atol=tolerance, rtol=0)
