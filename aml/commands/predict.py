"""`aml predict`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from aml.commands.options import add_checkpoint

ABOUT = "Segment what a sentence refers to in photos."
EPILOG = """\
Writes NAME-mask.png, NAME-overlay.png and NAME-map.png (similarity of the pixels to the words) for every photo NAME;
what is there already is not overwritten: the next is NAME-2-mask.png.

  aml predict photo.jpg "the black dog" --checkpoint runs/first --out prediction
  aml predict photos/ more.png "the black dog" --checkpoint runs/first --out prediction
  aml predict photo.jpg --interactive --checkpoint runs/first --out prediction
  aml predict --checkpoint runs/first photo.jpg -- "-dog"      # what is behind -- is no option
"""
DASH_REMEDY = (
    "a sentence that begins with a dash goes behind photos and --, as in\n  aml predict --checkpoint DIR PHOTO -- -dog"
)
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}  # of the photos in a folder
PARTS = ("mask", "overlay", "map")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "aml predict PHOTO [PHOTO ...] (SENTENCE | --interactive) --checkpoint DIR [--out DIR]"
    parser.epilog = EPILOG
    parser.add_argument("words", metavar="PHOTO", nargs="+", help="photos and folders of photos; then the sentence")
    parser.add_argument("--interactive", action="store_true", help="ask for sentences, one after the other")
    add_checkpoint(parser)
    parser.add_argument("--out", metavar="DIR", default=".", help="folder of what is written; default: here")


def run(options: argparse.Namespace) -> int:
    words = options.words
    if not options.interactive and len(words) < 2:
        raise ValueError(f"{words[0]!r}: expected photos and a sentence, or --interactive")
    if not options.interactive and _means_a_path(words[-1]):
        raise ValueError(f"{words[-1]!r} is a file or folder: the sentence comes last, or give --interactive")
    paths = list(_photos(words if options.interactive else words[:-1]))
    import torch

    from aml import predict
    from aml.files import require_no_file

    require_no_file(Path(options.out))
    photos = {path: predict.load_photo(path) for path in paths} if len(paths) == 1 else dict.fromkeys(paths)
    model = predict.load_model(options.checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    tools = model, predict.load_aligner(options.checkpoint, model)
    failed: list[str] = []
    for sentence in _asked() if options.interactive else [words[-1]]:
        for path, photo in photos.items():
            try:
                _predict_one(tools, path, photo or predict.load_photo(path), sentence, Path(options.out))
            except BrokenPipeError:  # nobody reads what is printed; the files are there
                raise
            except OSError as error:  # one of many
                print(f"error: {error}", file=sys.stderr)
                failed.append(str(path))
    if failed:
        print(f"{len(failed)} of {len(paths)} photos were not read or their results not written", file=sys.stderr)
    return 1 if failed else 0


def _means_a_path(word: str) -> bool:
    """Not so a sentence of one word, such as "dog", for all that a file or folder of that name lies here."""
    looks = Path(word).suffix.lower() in SUFFIXES or os.path.basename(word) != word
    return looks and os.path.exists(word)


def _photos(words: list[str]) -> Iterator[Path]:
    """The files that are meant, each once."""
    found: dict[Path, None] = {}
    for path in map(Path, words):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not inside:
                raise FileNotFoundError(f"{path} holds no photos ({', '.join(sorted(SUFFIXES))})")
            found |= dict.fromkeys(inside)
        elif path.is_file():
            found[path] = None
        else:
            raise FileNotFoundError(f"{path}: no such photo or folder")
    yield from found


def _asked() -> Iterator[str]:
    """Sentences that are typed, up to an empty one or the end of the input."""
    while True:
        try:
            sentence = input("sentence (empty to end): ").strip()
        except EOFError:
            return
        if not sentence:
            return
        yield sentence


def _predict_one(tools: tuple[Any, Any], path: Path, photo: Any, sentence: str, out: Path) -> None:
    from aml import predict

    mask, similarity = predict.predict_with_map(*tools, photo, sentence)
    files = _free_names(out, path.stem)
    predict.save_mask(files["mask"], mask)
    predict.save_overlay(files["overlay"], photo, mask, sentence)
    predict.save_map(files["map"], photo, similarity, sentence)
    print(f"{path}: {sentence!r}: {mask.mean():.1%} of the photo")
    for file in files.values():
        print(f"wrote {file}", flush=True)


def _free_names(out: Path, stem: str) -> dict[str, Path]:
    """Files of the first number that none of them has yet: photos of one name are in many folders."""
    for number in count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        files = {part: out / f"{name}-{part}.png" for part in PARTS}
        if not any(file.exists() for file in files.values()):
            return files
    raise AssertionError("count is endless")
