"""Files that appear complete or not at all, and what keeps them so."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def appearing_whole(path: Path) -> Iterator[Path]:
    """A path to write to, of the same suffix, which becomes `path` at the end of the block, or nothing."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_text(path: str | Path, what: str) -> str:
    """The text of a file. what: names it in errors, for example by the option it was given with.

    Raises OSError (FileNotFoundError where it is missing) or, where it is not UTF-8, ValueError.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path} is not text in UTF-8: {error}") from error
    except OSError as error:
        raise type(error)(f"{what} {path} cannot be read: {error.strerror}") from error


def write_whole(path: Path, text: str) -> None:
    with appearing_whole(path) as temporary:
        # Names of files may hold bytes that are no UTF-8, and no result is given up for one.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(finite(value), indent=1))


def finite(value: Any) -> Any:
    """The value with null for NaN and infinite numbers, for which JSON has no word."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def require_no_file(folder: Path) -> None:
    """Raise NotADirectoryError where a folder that is to be written to, or one above it, is a file."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file; give a folder, one that there is or a new one")


def require_writable(folder: Path) -> None:
    """Make the folder, or raise OSError, before hours of work for what cannot be stored."""
    require_no_file(folder)
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable-{os.getpid()}"
    probe.touch()
    probe.unlink()


def flush(path: Path) -> None:
    """Write a file, or the names in a folder, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hard_linked(source: Path, path: Path) -> bool:
    """Give the file `source` a second name, if that is possible."""
    try:
        os.link(source, path)
    except OSError:  # a file system without hard links, or the source is gone
        return False
    return True


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
