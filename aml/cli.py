"""The command `aml`: puts the commands of `aml.commands` together, and tells mistakes in a line.

Exit codes: 0 done, 1 the run failed, 2 a mistake of the user's, 128 + n stopped by signal n; so 141 (SIGPIPE) where the
reader of the output left first, as after `| head`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Sequence
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

from aml import __version__
from aml.commands import (
    alignment_report,
    compare,
    convert,
    data,
    demo,
    doctor,
    evaluate,
    predict,
    robustness,
    train,
)
from aml.console import reader_has_left
from aml.errors import CheckpointError, LaunchError, NonFiniteLoss, ResumeError, Stopped

COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "eval": evaluate,
    "robustness": robustness,
    "compare": compare,
    "predict": predict,
    "convert": convert,
    "alignment-report": alignment_report,
    "data": data,
    "doctor": doctor,
    "demo": demo,
}
# Where a command has no setting that lowers its need of memory.
MEMORY_REMEDY = "free memory of the GPU, or run on the CPU: CUDA_VISIBLE_DEVICES= aml ..."


class _Parser(argparse.ArgumentParser):
    """Exits with 2 and one line, without the usage text in which the error would be lost."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"error: {message}\nsee {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `aml` with the given arguments (default: those of the process) and return its exit code."""
    try:
        try:
            code = _run(arguments)
        except SystemExit:  # of --help
            _flush()
            raise
        _flush()
        return code
    except BrokenPipeError as error:
        return 128 + signal.SIGPIPE if reader_has_left() else _fail(error, 2)


def _flush() -> None:
    """Now, since at the end of the process Python would complain if nobody reads any more."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _run(arguments: Sequence[str] | None) -> int:
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
    parser = _Parser(
        prog="aml",
        description="Referring image segmentation with alignment-aware masked learning.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"aml {__version__}")
    _add_commands(parser, COMMANDS)
    return parser


def _add_commands(parser: argparse.ArgumentParser, modules: dict[str, ModuleType]) -> None:
    commands: Any = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in modules.items():
        added = commands.add_parser(
            name,
            help=module.ABOUT,
            description=module.ABOUT,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if hasattr(module, "COMMANDS"):
            _add_commands(added, module.COMMANDS)
            continue
        module.add_arguments(added)
        added.set_defaults(
            run=module.run,
            takes_settings=getattr(module, "TAKES_SETTINGS", False),
            memory_remedy=getattr(module, "MEMORY_REMEDY", MEMORY_REMEDY),
            dash_remedy=getattr(module, "DASH_REMEDY", ""),
            options=added._option_string_actions,
        )


def _unknown(words: list[str], options: argparse.Namespace) -> str:
    known = [option for option in options.options if option.startswith("--")]
    lines, remedy = [], ""
    for word in words:
        near = difflib.get_close_matches(word.partition("=")[0], known, n=1)
        lines.append(f"unknown argument {word!r}" + (f"; did you mean {near[0]}?" if near else ""))
        if word.startswith("-") and not near:
            remedy = options.dash_remedy
    return "\n".join(filter(None, [*lines, remedy])).replace("\n", "\n       ")


def _without_traceback(options: argparse.Namespace) -> int:
    """Run the command; what the user can mend is told in a line, and with AML_DEBUG=1 where it came from."""
    if os.environ.get("AML_DEBUG"):
        return options.run(options)
    try:
        return options.run(options)
    except BrokenPipeError:
        raise
    except Stopped as error:
        print(error, file=sys.stderr)
        return 128 + error.signum
    except NonFiniteLoss as error:
        return _fail(error, 1)
    except (CheckpointError, LaunchError, ResumeError, OSError, ValueError, ImportError, UnpicklingError) as error:
        return _fail(error, 2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # of torch, which is not imported for its name
            raise
        return _fail(f"{error}\n{options.memory_remedy}", 1)
    except KeyboardInterrupt:
        return 130


def _fail(error: BaseException | str, code: int) -> int:
    text = str(error) or type(error).__name__
    print("error: " + text.replace("\n", "\n       "), file=sys.stderr)
    return code
