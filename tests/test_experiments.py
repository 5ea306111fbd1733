"""`benchmarks/experiments.py` on a tiny experiment: every run once, what is finished is not done again, the report."""

import importlib
import sys
from pathlib import Path

import pytest
import tiny

from aml import cli

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
experiments = importlib.import_module("experiments")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of the report, commands of a first call, of a second call)."""
    folder = tmp_path_factory.mktemp("experiments")
    data, encoder = tiny.write_data(folder / "data", val=1), tiny.write_text_encoder(folder / "encoder")
    common = [word for word in tiny.settings(data, encoder, folder) if not word.startswith(("data.root", "train.out"))]
    variants = {name: experiments.STRATEGIES[name] for name in ("none", "image-gaussian")}
    plan = experiments.Experiment(
        "Two.", "tiny", variants, (*common, "train.steps=4", "eval.every=100"), "val", (0, 3), ("image-gaussian",),
    )
    commands: list[tuple[str, ...]] = []

    def here(*words):
        commands.append(words)
        assert cli.main(words) == 0

    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "EXPERIMENTS", {"two": plan})
        patch.setattr(experiments, "aml", here)
        for _ in range(2):
            commands.clear()
            options = ["--data", str(data), "--out", str(folder / "runs"), "--report", str(folder / "docs")]
            experiments.main(["two", *options, "--jobs", "1"])
            calls.append(list(commands))
    return folder / "docs" / "two", *calls


def test_every_run_is_made_once(made):
    _, first, second = made
    assert [words[0] for words in first] == ["train", "eval"] * 4 + ["robustness"]
    trained = [words[2].rpartition("/")[2] for words in first if words[0] == "train"]
    assert trained == ["none-0", "image-gaussian-0", "none-3", "image-gaussian-3"]
    assert [words[0] for words in second] == ["robustness"]  # which does itself only what is missing


def test_report(made):
    folder, *_ = made
    text = (folder / "report.md").read_text()
    head = ["# Experiment: two", "Two.", "Made by `python benchmarks/experiments.py two`.", "Evaluated on "]
    assert text.startswith("\n\n".join(head))
    assert "| none | 0, 3 |" in text and "| image-gaussian | 0, 3 |" in text
    gauges = text.partition("## Gauges")[2].partition("## Disturbed")[0]
    assert gauges.count("\n| ") == 4 and "| none | 100.0 | 0.0 |" in gauges
    assert text.partition("## Disturbed")[2].count("| image-gaussian |") == 1
    assert (folder / "differences.png").stat().st_size > 1000


def test_a_failed_run_is_named():
    with pytest.raises(RuntimeError, match="aml eval --checkpoint nowhere(?s:.*)error: "):
        experiments.aml("eval", "--checkpoint", "nowhere")
