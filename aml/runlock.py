"""One run at a time in a folder: two would overwrite each other's checkpoints and log."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from aml.errors import LaunchError

LOCK = ".lock"


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """The run folder is this process's own while the block runs; LaunchError where it is another one's already.

    Of several ranks the first one, which writes, does it for all. The lock ends with the process, however that ends, so
    that it never keeps a run from being resumed. Where files cannot be locked, nothing is refused. A block that wrote
    nothing leaves nothing, no folder either.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    file = _locked(folder / LOCK)
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                os.unlink(file.name)  # as long as it is locked, or it might be the next run's
            file.close()
        for each in made:
            with contextlib.suppress(OSError):  # it is not empty, or was never made
                each.rmdir()


def _locked(path: Path) -> BinaryIO | None:
    """The file, locked; None where it cannot be: what else is wrong there, the run itself will tell."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab")
        except OSError:
            return None
        try:
            # Not flock, whose lock the loader's forked processes would share: they outlive a killed run for a moment.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink:
                return file
        except BlockingIOError as error:
            file.close()
            raise LaunchError(
                f"{path.parent}: another run is writing there; wait for its end or stop it, or give another --out"
            ) from error
        except OSError:
            file.close()
            return None
        file.close()  # a run that has just ended removed it: once more, with a new one
