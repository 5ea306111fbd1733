"""From photograph and sentence to mask and overlay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_model

from aml import checkpoint, cli, config
from aml.assembly import build_aligner
from aml.data.pixels import place
from aml.models import build_model
from aml.predict import (
    TINT,
    load_aligner,
    load_model,
    load_photo,
    overlay,
    predict,
    predict_with_map,
    save_map,
    save_mask,
    save_overlay,
)

SETTINGS = ["model.image_size=64", "model.backbone=resnet18", "model.layers=1", "model.dim=64"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("compact", image_size=64, pretrained=False, backbone="resnet18", layers=1, dim=64).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Its checkpoint."""
    settings, final = config.load(None, SETTINGS), tmp_path_factory.mktemp("run") / "checkpoint"
    with checkpoint.written_whole(final) as folder:
        save_model(model, str(folder / "model.safetensors"))
        save_model(build_aligner(settings, model), str(folder / "aligner.safetensors"))
        (folder / "config.yaml").write_text(config.to_yaml(settings))
    return final


@pytest.fixture
def photo():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_mask_and_probability_have_the_photographs_size(model, photo, tmp_path):
    mask, probability = predict(model, photo, "the red dog")
    assert mask.shape == probability.shape == (50, 70)
    assert mask.dtype == bool and probability.dtype == np.float32
    assert np.array_equal(mask, probability > 0.5)
    photo.save(tmp_path / "photo.png")
    assert np.array_equal(predict(model, tmp_path / "photo.png", "the red dog")[1], probability)
    assert not np.array_equal(predict(model, photo, "sky")[1], probability)


def test_a_sentence_may_hold_what_is_no_character(model, photo):
    """As typed in a terminal of another encoding."""
    expected = predict(model, photo, "the \ufffd dog")[1]
    assert np.array_equal(predict(model, photo, "the \udce9 dog")[1], expected)


def test_a_checkpoint_gives_the_same_prediction(model, folder, photo, tmp_path):
    loaded = load_model(folder)
    assert not loaded.training
    assert np.array_equal(predict(loaded, photo, "the dog")[1], predict(model, photo, "the dog")[1])
    with pytest.raises(checkpoint.CheckpointError, match="not a complete checkpoint"):
        load_model(tmp_path / "nothing")


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_the_map_lies_where_the_photograph_does(folder, photo, monkeypatch, resize):
    """A map that is the column of its cell, over the photograph's own width, padding cut off."""
    loaded = load_model(folder)
    loaded.resize = resize
    aligner = load_aligner(folder, loaded)
    mask, similarity = predict_with_map(loaded, aligner, photo, "the red dog")
    assert np.array_equal(mask, predict(loaded, photo, "the red dog")[0])
    assert similarity.shape == (50, 70) and similarity.dtype == np.float32
    cells = torch.arange(4.0).expand(1, 4, 4).mT  # the row of each cell of 16 pixels
    monkeypatch.setattr(aligner, "similarity", lambda _: cells)
    _, similarity = predict_with_map(loaded, aligner, photo, "the red dog")
    inside = place(50, 70, 64, resize)
    rows = (np.arange(50) + 0.5) * inside.height / 50 + inside.top  # of the square
    assert np.allclose(similarity, np.clip(rows / 16 - 0.5, 0, 3)[:, None], atol=0.05)


def test_photographs_are_turned_upright_and_converted(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    photo.convert("L").save(tmp_path / "turned.jpg", exif=exif)
    upright = load_photo(tmp_path / "turned.jpg")
    assert upright.size == (50, 70) and upright.mode == "RGB"


@pytest.mark.parametrize(
    ("suffix", "dtype"), [("png", "uint16"), ("tif", "uint16"), ("tif", "int32"), ("tif", "float32")]
)
def test_more_than_eight_bits_are_refused_where_they_would_be_clipped(tmp_path, suffix, dtype):
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(np.arange(0, 60000, 100, dtype).reshape(20, 30)).save(path)
    with pytest.raises(OSError, match=r"deep.*16 bits or more per channel \(mode (I|I;16|F)\); save it with 8"):
        load_photo(path)


def test_unreadable_input_is_named(model, photo, tmp_path):
    (tmp_path / "photo.jpg").write_text("no image")
    with pytest.raises(OSError, match=r"photo\.jpg is not an image"):
        load_photo(tmp_path / "photo.jpg")
    with pytest.raises(FileNotFoundError, match=r"absent\.jpg"):
        load_photo(tmp_path / "absent.jpg")
    with pytest.raises(ValueError, match="sentence='  '"):
        predict(model, photo, "  ")


def test_a_photograph_too_large_to_be_one_is_named(photo, tmp_path, monkeypatch):
    photo.save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OSError, match=r"large.png is not an image that can be read \(Image size .* exceeds limit"):
        load_photo(tmp_path / "large.png")


def test_saved_mask_and_overlay(photo, tmp_path):
    mask = np.zeros((50, 70), dtype=bool)
    mask[10:30, 20:50] = True
    save_mask(tmp_path / "mask.png", mask)
    with Image.open(tmp_path / "mask.png") as saved:
        assert np.array_equal(np.asarray(saved), mask * np.uint8(255))
    save_overlay(
        tmp_path / "overlay.png", photo, mask, "a sentence that is too long for one line of so small a picture"
    )
    with Image.open(tmp_path / "overlay.png") as saved:
        assert saved.width == 70 and saved.height > 50 + 2 * 12  # the caption takes several lines below
    plain = np.asarray(overlay(photo, mask)).astype(int)
    original = np.asarray(photo).astype(int)
    assert plain.shape == original.shape
    assert plain[~mask].mean() < 0.8 * original[~mask].mean()  # what is not meant is dark
    assert (plain[15:25, 25:45, 0] >= plain[15:25, 25:45, 1]).mean() > (
        original[15:25, 25:45, 0] >= original[15:25, 25:45, 1]
    ).mean()
    with pytest.raises(ValueError, match=r"expected \[50, 70\]"):
        overlay(photo, mask.T)


def test_the_outline_of_a_mask_and_of_its_corners():
    mask = np.zeros((400, 300), bool)
    mask[0, 0] = mask[200, 150] = mask[399, 290:] = True
    inner, outer = (  # the definition; 300 / 200 is rounded to a width of 2
        np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(size))) > 0 for size in (5, 9)
    )
    drawn = np.asarray(overlay(Image.new("RGB", (300, 400)), mask))
    assert np.array_equal((drawn == 255).all(2), outer & ~inner)
    assert np.array_equal((drawn == TINT).all(2), inner & ~mask)


def test_the_map_is_drawn_from_its_least_to_its_greatest_value(photo, tmp_path):
    similarity = np.linspace(-0.2, 0.6, 70, dtype=np.float32)[None].repeat(50, 0)
    save_map(tmp_path / "map.png", photo, similarity, "a dog")
    with Image.open(tmp_path / "map.png") as saved:
        pixels = np.asarray(saved)[:50].astype(float)
    assert pixels[:, -9:, :2].mean() > pixels[:, :9, :2].mean() + 80  # yellow against violet
    save_map(tmp_path / "flat.png", photo, np.zeros_like(similarity))
    with pytest.raises(ValueError, match=r"similarity: expected \[50, 70\]"):
        save_map(tmp_path / "no.png", photo, similarity.T)
    assert not (tmp_path / "no.png").exists()


def test_a_picture_that_cannot_be_written_leaves_nothing(photo, tmp_path, monkeypatch):
    def full(self, path, **options):
        path.write_bytes(b"\x89PNG")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space left"):
        save_mask(tmp_path / "mask.png", np.zeros((5, 5), bool))
    assert not list(tmp_path.iterdir())


# `aml predict`


def run(capsys, *words):
    code = cli.main(["predict", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def photos(photo, tmp_path):
    """Two photographs of one name in two folders, one of them beside a text file and a damaged image."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        photo.rotate(180 * (name == "b")).save(tmp_path / name / "dog.png")
    (tmp_path / "b/notes.txt").write_text("no photo")
    (tmp_path / "b/broken.jpg").write_text("no photo either")
    return tmp_path / "a", tmp_path / "b"


def test_folders_and_files_in_one_call(folder, photos, tmp_path, capsys, monkeypatch):
    from aml import predict as module

    loads = []
    monkeypatch.setattr(module, "load_model", lambda *args: loads.append(args) or load_model(*args))
    out = tmp_path / "out"
    code, said, error = run(capsys, photos[0], photos[1], photos[0] / "dog.png", "a dog", "--checkpoint", folder,
                            "--out", out)  # fmt: skip
    assert code == 1 and len(loads) == 1
    assert "broken.jpg is not an image" in error and "1 of 3 photos were not read" in error
    names = [f"{stem}-{part}.png" for stem in ("dog", "dog-2") for part in ("map", "mask", "overlay")]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for path, stem in ((photos[0], "dog"), (photos[1], "dog-2")):
        with Image.open(out / f"{stem}-mask.png") as saved:
            expected = predict(load_model(folder), path / "dog.png", "a dog")[0]
            assert np.array_equal(np.asarray(saved) > 0, expected)
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert run(capsys, photos[0] / "dog.png", "another", "--checkpoint", folder, "--out", out)[0] == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (out / "dog-3-mask.png").exists()


def test_sentences_are_asked_for_until_an_empty_one(folder, photos, tmp_path, capsys, monkeypatch):
    answers = iter(["the dog", "  the sky ", "", "never asked"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    photos = [path / "dog.png" for path in photos]
    code, said, _ = run(capsys, *photos, "--interactive", "--checkpoint", folder, "--out", tmp_path / "out")
    assert code == 0 and next(answers) == "never asked"
    assert [said.count(f"dog.png: {sentence!r}") for sentence in ("the dog", "the sky")] == [2, 2]
    assert len(list((tmp_path / "out").iterdir())) == 4 * 3

    def closed(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", closed)
    assert run(capsys, photos[0], "--interactive", "--checkpoint", folder, "--out", tmp_path / "none")[0] == 0
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["touch", "mkdir"])
def test_a_sentence_may_be_named_as_something_here_is(folder, photos, tmp_path, monkeypatch, capsys, kind):
    getattr(tmp_path / "dog", kind)()
    monkeypatch.chdir(tmp_path)
    assert run(capsys, photos[0], "dog", "--checkpoint", folder, "--out", "out")[0] == 0


def test_a_sentence_may_begin_with_a_dash(folder, photos, tmp_path, capsys):
    """Which looks like an option, so that it is told how to give it; that way it is a sentence."""
    given = ["--checkpoint", folder, "--out", tmp_path / "out"]
    for words in ([photos[0], "-dog", *given], [photos[0], *given, "--", "-dog"]):
        with pytest.raises(SystemExit) as stop:
            run(capsys, *words)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "unknown argument '-dog'\n       a sentence that begins with a dash" in error
    assert "aml predict --checkpoint DIR PHOTO -- -dog\n" in error
    code, said, _ = run(capsys, *given, photos[0], "--", "-dog")
    assert code == 0 and "dog.png: '-dog': " in said
    with pytest.raises(SystemExit):
        run(capsys, photos[0], "a dog", *given, "--interactve")
    assert "did you mean --interactive?\nsee" in capsys.readouterr().err


def test_mistakes_of_predict(folder, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for words, said in (
        ([photos[0]], "expected photos and a sentence, or --interactive"),
        (photos, "is a file or folder: the sentence comes last, or give --interactive"),
        ([tmp_path / "empty", "a dog"], "holds no photos (.bmp, "),
        ([tmp_path / "nowhere.png", "a dog"], "no such photo or folder"),
        ([photos[1] / "broken.jpg", "a dog"], "is not an image that can be read"),
        ([photos[0], " "], "expected words that describe one object"),
    ):
        code, _, error = run(capsys, *words, "--checkpoint", folder, "--out", tmp_path / "out")
        assert code == 2 and said in error
    assert not (tmp_path / "out").exists()
