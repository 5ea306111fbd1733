"""`aml predict`."""

from __future__ import annotations

import argparse
from pathlib import Path

from aml.commands.options import add_checkpoint

ABOUT = "Segment what a sentence refers to in a photo."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photo", metavar="PHOTO")
    parser.add_argument("sentence", metavar="SENTENCE", help="for example: 'the black dog'")
    add_checkpoint(parser)
    parser.add_argument("--out", metavar="DIR", default=".", help="folder of mask and overlay; default: here")


def run(options: argparse.Namespace) -> int:
    from aml import predict

    photo = predict.load_photo(options.photo)
    model = predict.load_model(options.checkpoint)
    mask, _ = predict.predict(model, photo, options.sentence)
    out, stem = Path(options.out), Path(options.photo).stem
    out.mkdir(parents=True, exist_ok=True)
    paths = out / f"{stem}-mask.png", out / f"{stem}-overlay.png"
    predict.save_mask(paths[0], mask)
    predict.save_overlay(paths[1], photo, mask, options.sentence)
    print(f"{options.sentence!r}: {mask.mean():.1%} of the photo\nwrote {paths[0]}\nwrote {paths[1]}")
    return 0
