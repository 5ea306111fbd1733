"""Options that several commands have."""

from __future__ import annotations

import argparse

FEWER_AT_ONCE = "give a lower train.batch_size, which is here how many sentences are taken at once"  # for MEMORY_REMEDY
KINDS = ("occlusion", "noise", "blur", "colour", "low_light", "haze", "jpeg")  # those of `aml.perturbations`


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        required=True,
        help="a run directory (its best checkpoint), one of its checkpoints/step-*, or what `aml convert` wrote",
    )


def add_data_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "root",
        metavar="ROOT",
        help="folder of the data: annotations in <dataset>/, images in images/train2014/ or train2014/",
    )


def count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 0 or more")
    return int(text)


def picture(text: str) -> str:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a file that ends in .png, which is what is written")
    return text


def perturbation(text: str) -> tuple[str, int]:
    kind, _, severity = text.partition(":")
    if kind not in KINDS or severity not in ("1", "2", "3", "4", "5"):
        raise argparse.ArgumentTypeError(
            f"{text!r}: write noise:3, or another of {', '.join(KINDS)}, with severity 1 to 5"
        )
    return kind, int(severity)
