"""`FeatureTap`: the method attached to models that were not written for it, by the names of two submodules."""

import pytest
import torch
from torch import nn
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from aml.alignment import AlignmentLoss
from aml.models import FeatureTap


def plain_network():
    """transformers' own CLIPSeg, small; nothing of ours in it."""
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 16}
    vision, text = small | {"image_size": 32, "patch_size": 8}, small | {"vocab_size": 30, "eos_token_id": 29}
    return CLIPSegForImageSegmentation(
        CLIPSegConfig(
            vision_config=vision, text_config=text, projection_dim=8, reduce_dim=8, extract_layers=[0, 1],
            decoder_num_attention_heads=2, decoder_intermediate_size=16,
        )
    )


def batches(count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        tokens = torch.randint(1, 29, (2, 6), generator=generator)
        tokens[:, -1] = 29
        words = torch.tensor([[True, True, True, True, True, False], [True, True, False, False, False, False]])
        yield torch.randn(2, 3, 32, 32, generator=generator), tokens, words, torch.ones(2, 32, 32, dtype=torch.bool)


def test_ten_lines_attach_the_method_to_a_plain_model():
    torch.manual_seed(0)
    net = plain_network()
    before = net.decoder.film_mul.weight.detach().clone()
    # The ten lines:
    tap = FeatureTap(
        net,
        visual="clip.vision_model",
        text="clip.text_model",
        call=lambda net, image, tokens, mask: net(pixel_values=image, input_ids=tokens).logits,
    )
    aligner = AlignmentLoss(strategy="loss", visual_dim=16, text_dim=16, dim=8, warmup_steps=1)
    optimizer = torch.optim.AdamW([*net.decoder.parameters(), *aligner.parameters()], lr=1e-3)
    for step, (image, tokens, words, target) in enumerate(batches(3)):
        logits, features = tap(image, tokens, words, return_alignment=True)
        loss, record = aligner(logits, target, features, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # What came of it:
    assert features.visual.shape == (2, 16, 4, 4) and features.text.shape == (2, 6, 16)
    assert loss.isfinite() and record["kept"] == 1 and not torch.equal(net.decoder.film_mul.weight, before)
    image, tokens, words, _ = next(iter(batches(1)))
    states = net.clip.vision_model(image).last_hidden_state
    found = tap.encode(image, tokens, words)
    assert torch.equal(found.visual[:, :, 1, 2], states[:, 1 + 4 * 1 + 2])
    assert torch.equal(found.text, net.clip.text_model(tokens).last_hidden_state)
    assert torch.equal(tap(image, tokens, words), net(pixel_values=image, input_ids=tokens).logits)


class Plain(nn.Module):
    """As people write them: a convolution, an embedding, their product."""

    def __init__(self, passes=1):
        super().__init__()
        self.passes = passes
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 4, stride=4), nn.ReLU())
        self.words = nn.Embedding(10, 5)
        self.unused = nn.Linear(1, 1)
        self.recurrent = nn.GRU(5, 5, batch_first=True)

    def forward(self, image, tokens, text_mask):
        for _ in range(self.passes):
            pixels = self.stem(image)
        words, _ = self.recurrent(self.words(tokens))
        return torch.einsum("bchw,bc->bhw", pixels, words.mean(1))


@pytest.fixture
def given():
    torch.manual_seed(0)
    return torch.randn(2, 3, 16, 24), torch.randint(0, 10, (2, 4)), torch.ones(2, 4, dtype=torch.bool)


def test_maps_and_words_are_passed_on_with_their_gradient(given):
    net = Plain()
    tap = FeatureTap(net, visual="stem", text="words")
    logits, features = tap(*given, return_alignment=True)
    assert torch.equal(logits, net(*given)) and features.visual.shape == (2, 5, 4, 6) and features.visual_valid is None
    assert torch.equal(features.text, net.words(given[1])) and features.text_mask is given[2]
    (features.visual.sum() + features.text.sum()).backward()
    assert net.stem[0].weight.grad is not None and net.words.weight.grad is not None


def test_outputs_of_other_forms_are_picked(given):
    tap = FeatureTap(Plain(), visual="stem", text="recurrent", pick_text=lambda output: output[0])
    assert tap.encode(*given).text.shape == (2, 4, 5)
    channels_last = FeatureTap(
        Plain(), visual="stem.0", text="words", pick_visual=lambda output: output.permute(0, 2, 3, 1)
    )
    assert channels_last.encode(*given).visual.shape == (2, 4, 6, 5)


@pytest.mark.parametrize(("count", "side"), [(9, 3), (10, 3), (1, 1), (2, 1)])
def test_tokens_of_a_square_grid_become_a_map(given, count, side):
    """With a class token in front of them, or none."""

    class Tokens(Plain):
        def __init__(self):
            super().__init__()
            self.tower = nn.Linear(5, 5)

        def forward(self, image, tokens, text_mask):
            return self.tower(patches).sum() + self.words(tokens).sum()

    patches = torch.randn(2, count, 5)
    tap = FeatureTap(Tokens(), visual="tower", text="words")
    visual = tap.encode(*given).visual
    assert visual.shape == (2, 5, side, side)
    assert torch.equal(visual[:, :, -1, -1], tap.model.tower(patches)[:, -1])


def test_nothing_is_kept_between_passes(given):
    tap = FeatureTap(Plain(), visual="stem", text="words")
    tap(*given)
    tap.model(*given)
    tap(*given, return_alignment=True)
    assert tap._outputs is None
    tap.call = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        tap(*given, return_alignment=True)
    assert tap._outputs is None


def test_gradient_checkpointing_in_the_model_is_no_second_pass(given):
    class Checkpointed(Plain):
        def forward(self, image, tokens, text_mask):
            pixels = torch.utils.checkpoint.checkpoint(self.stem, image, use_reentrant=False)
            return torch.einsum("bchw,bc->bhw", pixels, self.words(tokens).mean(1))

    tap = FeatureTap(Checkpointed(), visual="stem", text="words")
    logits, _ = tap(*given, return_alignment=True)
    logits.sum().backward()
    tap(*given, return_alignment=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"visual": "stm"}, r"visual='stm' is no submodule of Plain; near it: stem"),
        ({"text": "encoder.layers"}, r"text='encoder.layers' is no submodule of Plain; near it: .*words"),
        ({"text": "unused"}, r"text='unused' ran 0 times in a forward pass; expected once"),
        ({"model": Plain(passes=2)}, r"visual='stem' ran 2 times"),
        ({"text": "recurrent"}, r"text='recurrent' gave tuple; expected \[B, L, D\]: convert it with pick_text"),
        ({"visual": "recurrent"}, r"visual='recurrent' gave tuple; expected \[B, C, h, w\]"),
        ({"pick_visual": lambda x: x[0]}, r"visual='stem' gave \[5, 4, 6\]; expected \[B, C, h, w\]"),
        ({"pick_text": lambda x: x[:, 1:]}, r"text='words' gave 3 tokens, text_mask has 4"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_mistakes_are_named(given, options, message):
    with pytest.raises(ValueError, match=message):
        FeatureTap(**{"model": Plain(), "visual": "stem", "text": "words", **options}).encode(*given)
