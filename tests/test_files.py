"""Files of a run and pictures of a report appear whole or stay as they were."""

from pathlib import Path

import pytest

from aml.config import load
from aml.figures import save_png
from aml.files import write_whole
from aml.training import train

SETTINGS = ("train.steps=1",)
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    save_png(Figure((1, 1)), tmp_path / "picture.png")
    before = (tmp_path / "picture.png").read_bytes()
    assert before.startswith(b"\x89PNG")

    def full(self, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FigureCanvasAgg, "print_png", full)
    with pytest.raises(OSError, match="No space"):
        save_png(Figure((1, 1)), tmp_path / "picture.png")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("picture.png", before)]


def test_a_folder_that_is_given_for_a_file_is_named(tmp_path):
    from matplotlib.figure import Figure

    for write in (lambda: write_whole(tmp_path, "text"), lambda: save_png(Figure((1, 1)), tmp_path)):
        with pytest.raises(IsADirectoryError, match=f"^{tmp_path} is a folder; give the name of a file"):
            write()
    assert not any(tmp_path.iterdir())


def test_a_name_that_is_no_utf_8_is_written_in_other_words(tmp_path):
    """In which Python gives the bytes of a file's name."""
    write_whole(tmp_path / "report.csv", "caf\udce9.png,0.5\nöl.png,0.7\n")
    assert (tmp_path / "report.csv").read_text(encoding="utf-8") == "caf\\udce9.png,0.5\nöl.png,0.7\n"


@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
def test_a_full_disk_on_resuming_leaves_what_the_run_says_of_itself(tmp_path, words, monkeypatch, name):
    train(load(None, words(tmp_path)))
    before = (tmp_path / name).read_text()

    def full(self, text, *arguments, original=Path.write_text, **options):
        kind = Path(name)
        if self.parent == tmp_path and kind.stem in self.name and self.suffix == kind.suffix:
            original(self, text[:20], *arguments, **options)
            raise OSError(28, "No space left on device")
        return original(self, text, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        train(load(None, words(tmp_path, "train.steps=2")), resume=True)
    assert (tmp_path / name).read_text() == before
