"""`aml ... | head`: whoever reads the output may leave first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from aml import checkpoint, cli

SETTINGS = ("train.steps=4", "train.log_every=1")
pytestmark = pytest.mark.usefixtures("one_thread")


def unread(*words: str, merged: bool = False, lines: int = 0, unbuffered: str = "") -> tuple[int, str]:
    """Exit code and errors of `aml`, from whose pipe only so many lines are read; merged: errors go there too."""
    process = subprocess.Popen(
        [sys.executable, "-m", "aml", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if merged else subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": unbuffered},
        cwd=Path(cli.__file__).parents[1],
    )
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    errors = "" if merged else process.stderr.read().decode()
    return process.wait(120), errors


@pytest.mark.parametrize("merged", [False, True])
def test_training_goes_on_unread(tmp_path, words, merged):
    code, errors = unread("train", *words(tmp_path), merged=merged, lines=1)
    assert (code, errors) == (0, "")
    assert checkpoint.newest(tmp_path)[0].name == "step-00000004"


def test_predictions_are_written_though_nobody_reads_of_them(tmp_path, straight):
    Image.new("RGB", (70, 50), (200, 30, 30)).save(tmp_path / "photo.png")
    given = [str(tmp_path / "photo.png"), "the red circle", "--checkpoint", str(straight), "--out", str(tmp_path)]
    assert unread("predict", *given) == (141, "")
    assert all((tmp_path / f"photo-{part}.png").exists() for part in ("mask", "overlay", "map"))


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_short_output_is_no_error_either(place, unbuffered):
    words = ["data", "check", str(place / "data"), "--quick"]
    assert unread(*words, unbuffered=unbuffered) == (141, "")
    assert unread(*words, merged=True, unbuffered=unbuffered)[0] == 141


def test_nor_is_help():
    assert unread("--help") == (141, "")


def test_a_broken_pipe_of_another_kind_is_told(monkeypatch, capsys):
    def breaks(*_):
        raise BrokenPipeError(32, "a worker process is gone")

    monkeypatch.setattr(cli.COMMANDS["doctor"], "run", breaks)
    assert cli.main(["doctor"]) == 2 and "a worker process is gone" in capsys.readouterr().err
