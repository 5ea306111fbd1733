"""The command `aml`: train, eval, predict, convert, alignment-report, data, demo.

Imports of torch and its kin stand inside the commands, so that help and mistakes in settings show at once.
Exit codes: 0 done, 1 the run failed, 2 a mistake of the user's, 128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError

from aml.errors import CheckpointError, NonFiniteLoss, ResumeError, Stopped

TRAIN_EXAMPLES = """\
Settings are given in a YAML file and, after it, as section.name=value words:
  aml train --config run.yaml --data DATA --out runs/first optim.lr=1e-4 train.epochs=5
  aml train --resume --out runs/first        # after an interruption: goes on as if there had been none
  torchrun --nproc-per-node 4 -m aml train --config run.yaml

Settings:
"""


class _Parser(argparse.ArgumentParser):
    """Exits with 2 and one line, without the usage text in which the error would be lost."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"error: {message}\nsee {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `aml` with the given arguments (default: those of the process) and return its exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    settings = [word for word in rest if "=" in word and not word.startswith("-")]
    unknown = [word for word in rest if word not in settings]
    if unknown or (settings and not options.takes_settings):
        parser.error(_unknown(unknown or settings, options))
    if options.takes_settings:
        options.settings = settings
    return _without_traceback(options)


def _parser() -> argparse.ArgumentParser:
    from aml import __version__, alignment_report
    from aml.data.commands import add_data_commands

    parser = _Parser(
        prog="aml",
        description="Referring image segmentation with alignment-aware masked learning.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"aml {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str,
        run: Callable[[argparse.Namespace], int],
        about: str,
        takes_settings: bool = False,
        epilog: str | None = None,
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=about,
            description=about,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run, takes_settings=takes_settings, options=added._option_string_actions)
        return added

    train = command(
        "train",
        _train,
        "Train a model on data in the REFER layout.",
        True,
        TRAIN_EXAMPLES + _settings_table(),
    )
    train.usage = "aml train [--config FILE] [--data DIR] [--out DIR] [--resume] [section.name=value ...]"
    train.add_argument("--config", metavar="FILE", help="settings in YAML; without it, the defaults")
    train.add_argument("--data", metavar="DIR", help="folder of the data: short for data.root=DIR")
    train.add_argument("--out", metavar="DIR", help="run directory: short for train.out=DIR")
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --out, with its settings unless --config is given",
    )
    train.add_argument(
        "--allow-change",
        metavar="WHAT",
        action="append",
        default=[],
        choices=("data", "batch", "seed", "world"),
        help="resume although this has changed: data, batch, seed or world; may be repeated",
    )

    evaluate = command(
        "eval", _eval, "Evaluate a checkpoint: mIoU, oIoU, P@X, at input and original size.", True
    )
    evaluate.usage = "aml eval --checkpoint DIR [--data DIR] [--split SPLIT] [section.name=value ...]"
    _add_checkpoint(evaluate)
    evaluate.add_argument("--data", metavar="DIR", help="folder of the data; default: that of the training")
    evaluate.add_argument("--split", default="val", help="default: val")
    evaluate.add_argument(
        "--perturb",
        metavar="KIND:SEVERITY",
        type=_perturbation,
        help="disturb the images first: noise, blur or occlusion, severity 1 to 5, as noise:3",
    )
    evaluate.add_argument(
        "--out",
        metavar="FILE",
        help="JSON file for metrics and one record per sentence; "
        "default: eval-SPLIT.json beside the checkpoint",
    )

    predict = command("predict", _predict, "Segment what a sentence refers to in a photo.")
    predict.add_argument("photo", metavar="PHOTO")
    predict.add_argument("sentence", metavar="SENTENCE", help="for example: 'the black dog'")
    _add_checkpoint(predict)
    predict.add_argument(
        "--out", metavar="DIR", default=".", help="folder of mask and overlay; default: here"
    )

    convert = command(
        "convert", _convert, "Convert a released CARIS or AMLRIS checkpoint; nothing in the file is run.", True
    )
    convert.usage = "aml convert CHECKPOINT.pth --out DIR [section.name=value ...]"
    convert.add_argument("file", metavar="CHECKPOINT.pth")
    convert.add_argument("--out", metavar="DIR", required=True, help="new folder, for eval and predict --checkpoint")

    report = command(
        "alignment-report", alignment_report.run, "Measure which similarity maps point at the target.", True
    )
    alignment_report.add_arguments(report)

    add_data_commands(commands, argparse.RawDescriptionHelpFormatter)

    demo = command("demo", _demo, "Train and compare the strategies on rendered scenes; writes report.html.")
    demo.add_argument("--out", metavar="DIR", default="runs/demo", help="default: runs/demo")
    return parser


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        required=True,
        help="a run directory (its best checkpoint), or one of its checkpoints/step-*",
    )


def _settings_table() -> str:
    from aml.config import describe

    lines, section = [], ""
    for name, kind, default, doc in describe():
        if not name.startswith(section + ".") or not section:
            section = name.partition(".")[0]
            lines.append(f"  {section}")
        lines.append(f"    {name}: {kind}; default {default or 'empty'}\n        {doc}")
    return "\n".join(lines)


def _unknown(words: list[str], options: argparse.Namespace) -> str:
    known = [option for option in options.options if option.startswith("--")]
    lines = []
    for word in words:
        near = difflib.get_close_matches(word.partition("=")[0], known, n=1)
        lines.append(f"unknown argument {word!r}" + (f"; did you mean {near[0]}?" if near else ""))
    return "\n       ".join(lines)


def _perturbation(text: str) -> tuple[str, int]:
    kind, _, severity = text.partition(":")
    if kind not in ("noise", "blur", "occlusion") or severity not in ("1", "2", "3", "4", "5"):
        raise argparse.ArgumentTypeError(
            f"{text!r}: write noise:3, or blur or occlusion, with severity 1 to 5"
        )
    return kind, int(severity)


def _train(options: argparse.Namespace) -> int:
    from aml import config

    words = _short_forms(options) + options.settings
    settings = config.load(options.config, words)
    if options.resume and not options.config:
        from aml import checkpoint

        found, _ = checkpoint.newest(Path(settings.train.out))
        if found:  # otherwise `train` says what is wrong
            settings = config.load(found / "config.yaml", [*words, f"train.out={settings.train.out}"])
    from aml.training import train

    train(settings, resume=options.resume, allow_change=options.allow_change)
    return 0


def _short_forms(options: argparse.Namespace) -> list[str]:
    pairs = (("data.root", options.data), ("train.out", getattr(options, "out", None)))
    return [f"{name}={value}" for name, value in pairs if value is not None]


def _eval(options: argparse.Namespace) -> int:
    import torch

    from aml import assembly, checkpoint, config, evaluation, predict

    folder = checkpoint.resolve(options.checkpoint)
    words = [f"data.root={options.data}"] if options.data else []
    settings = config.load(folder / "config.yaml", words + options.settings)
    refer = assembly.open_data(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = predict.load_model(folder, device)
    aligner = assembly.build_aligner(settings, model)
    checkpoint.load_weights(folder, aligner=aligner)
    dataset = assembly.build_dataset(settings, refer, model, options.split, train=False)
    records = evaluation.evaluate(
        model,
        dataset,
        device=device,
        batch_size=settings.train.batch_size,
        perturb=options.perturb,
        aligner=aligner.to(device),
        workers=settings.train.workers,
    )
    metrics = evaluation.metrics(records, dataset.sample_ids)
    print(_table(metrics))
    out = Path(options.out) if options.out else folder / f"eval-{options.split}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "checkpoint": str(folder),
        "data": settings.data.root,
        "split": options.split,
        "perturb": options.perturb,
        "metrics": metrics,
        "records": records,
    }
    out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"wrote {out}")
    return 0


def _table(metrics: dict[str, float | int]) -> str:
    """The metrics at input size and at the photos' own size side by side, then the rest."""
    lines = [f"{'':<20}{'input size':>12}{'own size':>12}"]
    pairs = [name for name in metrics if f"full_{name}" in metrics]
    lines += [
        f"{name:<20}{_number(metrics[name]):>12}{_number(metrics['full_' + name]):>12}" for name in pairs
    ]
    alone = [name for name in metrics if name not in pairs and not name.startswith("full_")]
    return "\n".join(lines + [f"{name:<20}{_number(metrics[name]):>12}" for name in alone])


def _number(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _predict(options: argparse.Namespace) -> int:
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


def _convert(options: argparse.Namespace) -> int:
    from aml.convert import convert

    print(convert(Path(options.file), Path(options.out), options.settings))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from aml.demo import run_demo

    run_demo(Path(options.out))
    return 0


def _without_traceback(options: argparse.Namespace) -> int:
    """Run the command; what the user can mend is told in a line, and with AML_DEBUG=1 where it came from."""
    if os.environ.get("AML_DEBUG"):
        return options.run(options)
    try:
        return options.run(options)
    except Stopped as error:
        print(error, file=sys.stderr)
        return 128 + error.signum
    except NonFiniteLoss as error:
        return _fail(error, 1)
    except (CheckpointError, ResumeError, OSError, ValueError, ImportError, UnpicklingError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return 130


def _fail(error: BaseException, code: int) -> int:
    text = str(error) or type(error).__name__
    print("error: " + text.replace("\n", "\n       "), file=sys.stderr)
    return code
