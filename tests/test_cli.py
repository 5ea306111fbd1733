"""The command line: quick help, one line for a mistake, and the way from data to a mask."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from aml import checkpoint, cli
from aml.config import load
from aml.errors import LaunchError

REAL = Path(__file__).resolve().parents[2] / "shared/fixtures/real_ris"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run directory beside its data."""
    folder = tmp_path_factory.mktemp("cli")
    data, encoder = tiny.write_data(folder / "data"), tiny.write_text_encoder(folder / "encoder")
    (folder / "run.yaml").write_text("train: {epochs: 1}\noptim: {lr: 1e-3}\n")
    words = tiny.settings(data, encoder, folder / "ignored", "train.steps=3")
    given = ["--config", str(folder / "run.yaml"), "optim.lr=0.002", "--out", str(folder / "ignored too")]
    assert cli.main(["train", *given, *words, f"train.out={folder / 'run'}"]) == 0
    return folder / "run"


def failing(capsys, *words: str) -> str:
    """What a command that must fail with code 2 says on stderr."""
    try:
        code = cli.main(words)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2 and "Traceback" not in said.err and said.out == ""
    return said.err


@pytest.mark.parametrize(
    "words",
    [
        ["--help"], ["train", "--help"], ["--version"],
        ["data", "--help"], ["data", "check", "--help"], ["data", "stats", "--help"],
    ],
    ids=str,
)
def test_help_imports_nothing_heavy(words):
    """Its time is then that of Python itself: 0.2 to 0.3 s where this was written."""
    code = f"""
import sys
from aml.cli import main
try:
    main({words!r})
except SystemExit as stop:
    assert stop.code == 0
heavy = {{"torch", "numpy", "transformers", "timm", "accelerate", "matplotlib", "PIL", "yaml", "pycocotools", "tqdm"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    printed = capsys.readouterr().out
    assert "optim.lr: a number; default 0.001" in printed and "eval.metric: one of mIoU" in printed


def test_a_mistake_in_settings_is_found_without_torch():
    code = """
import sys
from aml.cli import main
code = main(["train", "optim.lr=fast", "sede=1"])
assert "torch" not in sys.modules
sys.exit(code)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: command line: optim.lr takes a number, got 'fast'",
        "       command line: unknown setting 'sede'; did you mean train.seed?",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--reusme"], "unknown argument '--reusme'; did you mean --resume?"),
        (["train", "--confg=x"], "unknown argument '--confg=x'; did you mean --config?"),
        (["train", "surplus"], "unknown argument 'surplus'"),
        (["train", "--config", "/nowhere.yaml"], "configuration (--config) /nowhere.yaml cannot be read: No such file"),
        (["train", "--config", "/"], "configuration (--config) / cannot be read: Is a directory"),
        (["data", "check", "/nowhere"], "no folder /nowhere"),
        (["data", "check", "/", "--skip", "/nowhere.txt"], "list of images (data.skip, --skip) /nowhere.txt cannot be"),
        (["train"], "data.root: no data given; use --data"),
        (["train", "--data", "/nowhere"], "no folder"),
        (["train", "--data", __file__], "test_cli.py is a file: name the folder that holds annotations and images"),
        (["data", "check", __file__], "test_cli.py is a file: name the folder that holds annotations and images"),
        (["train", "--resume", "--out", "/nowhere"], "/nowhere has no complete checkpoint"),
        (["train", "--allow-change", "luck"], "invalid choice: 'luck'"),
        (["predict", "a.png", "the dog"], "required: --checkpoint"),
        (["predict", "/nowhere.png", "the dog", "--checkpoint", "x"], "/nowhere.png"),
        (
            ["predict", "a.png", "the dog", "--checkpoint", "x", "train.seed=1"],
            "unknown argument 'train.seed=1'",
        ),
        (["eval", "--checkpoint", "/nowhere"], "/nowhere is not a complete checkpoint"),
        (["eval", "--checkpoint", "x", "--perturb", "fog:2"], "write noise:3, or another of occlusion, noise, blur"),
        (["compare", "a", "b", "--plot", "d.pdf"], "--plot: 'd.pdf': expected a file that ends in .png"),
        (["data", "stats", "/", "--out", "folder"], "--out: 'folder': expected a file that ends in .png"),
        (["evaluate"], "invalid choice: 'evaluate'"),
        ([], "required: COMMAND"),
    ],
    ids=lambda value: (" ".join(value) if isinstance(value, list) else "says")[:40],
)
def test_a_mistake_is_told_in_a_line(capsys, words, said):
    assert said in failing(capsys, *words)


def test_a_configuration_that_is_no_text_is_named(tmp_path, capsys):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe")
    said = failing(capsys, "train", "--config", str(tmp_path / "run.yaml"))
    assert f"{tmp_path / 'run.yaml'} is not text in UTF-8" in said


def test_an_out_that_is_a_file_is_named(run, tmp_path, capsys):
    (tmp_path / "out").touch()
    photo = next((run.parent / "data").rglob("*.png"))
    given = ["--checkpoint", str(run), "--out", str(tmp_path / "out")]
    for words in (
        ["eval", *given], ["robustness", *given], ["predict", str(photo), "the dog", *given],
        ["train", "--data", str(run.parent / "data"), "--out", str(tmp_path / "out/run")],
        ["alignment-report", "--out", str(tmp_path / "out")], ["demo", "--out", str(tmp_path / "out/demo")],
    ):
        assert f"{tmp_path / 'out'} is a file; give a folder" in failing(capsys, *words)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (LaunchError("WORLD_SIZE=2"), 2, "error: WORLD_SIZE=2"),
        (torch.OutOfMemoryError("GPU 0 is full."), 1, "error: GPU 0 is full.\n       free memory of the GPU, or"),
    ],
)
def test_what_is_no_bug_is_told_without_traceback(capsys, monkeypatch, error, code, said):
    def run(options):
        raise error

    monkeypatch.setattr(cli.doctor, "run", run)
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["train"], "a lower train.batch_size (train.accumulate makes up for it), train.precision=bf16"),
        (["eval", "--checkpoint", "x"], "a lower train.batch_size, which is here how many sentences"),
        (["robustness", "--checkpoint", "x"], "a lower train.batch_size, which is here how many sentences"),
        (["alignment-report", "--out", "x"], "a lower train.batch_size, which is here how many sentences"),
        (["predict", "a.png", "the dog", "--checkpoint", "x"], "run on the CPU: CUDA_VISIBLE_DEVICES= aml"),
        (["demo"], "run on the CPU: CUDA_VISIBLE_DEVICES= aml"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_to_do_where_memory_is_short_fits_the_command(capsys, monkeypatch, words, remedy):
    def run(options):
        raise torch.OutOfMemoryError("GPU 0 is full.")

    monkeypatch.setattr(cli.COMMANDS[words[0]], "run", run)
    assert cli.main(words) == 1
    assert remedy in capsys.readouterr().err


def test_other_errors_keep_theirs(monkeypatch):
    monkeypatch.setattr(cli.doctor, "run", lambda options: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        cli.main(["doctor"])


def test_file_then_options_then_words_decide(run):
    settings = load(checkpoint.resolve(run) / "config.yaml")
    assert settings.optim.lr == 0.002 and settings.train.epochs == 1 and settings.train.steps == 3


def test_resume_takes_the_settings_of_the_run(run, capsys):
    assert cli.main(["train", "--resume", "--out", str(run), "train.steps=4"]) == 0
    printed = capsys.readouterr().out
    assert "changed: train.steps: 3 -> 4" in printed and "finished at step 4" in printed
    assert printed.count("changed:") == 1


def test_eval_prints_a_table_and_writes_json(run, tmp_path, capsys):
    out = tmp_path / "new" / "result.json"
    words = ["eval", "--checkpoint", str(run), "--split", "val", "--perturb", "blur:2", "--out", str(out)]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert f"{result['metrics']['mIoU']:.4f}" in printed and "P@0.9" in printed and str(out) in printed
    assert len(result["records"]) == result["metrics"]["sentences"] > 0 and result["perturb"] == ["blur", 2]
    assert "mIoU" in result["metrics"] and "full_oIoU" in result["metrics"] and "auc" in result["metrics"]


def test_eval_repeats_the_metrics_of_the_training(run, tmp_path):
    out = tmp_path / "result.json"
    folder = checkpoint.resolve(run)
    assert cli.main(["eval", "--checkpoint", str(folder), "--out", str(out)]) == 0
    metrics = json.loads(out.read_text())["metrics"]
    step = checkpoint.read(folder).state["progress"]["step"]
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (logged,) = (line for line in lines if line["kind"] == "eval" and line["step"] == step)
    assert metrics == {name: logged[name] for name in metrics}


def test_eval_of_an_unknown_split_names_those_there(run, capsys):
    assert "its splits are train, val" in failing(
        capsys, "eval", "--checkpoint", str(run), "--split", "testA"
    )


def test_predict_writes_mask_and_overlay(run, tmp_path, capsys):
    Image.new("RGB", (70, 50), (200, 30, 30)).save(tmp_path / "photo.png")
    words = ["predict", str(tmp_path / "photo.png"), "the red circle", "--checkpoint", str(run), "--out"]
    assert cli.main([*words, str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out/photo-mask.png") as mask:
        assert mask.size == (70, 50) and set(mask.tobytes()) <= {0, 255}
    assert (tmp_path / "out/photo-overlay.png").exists() and "% of the photo" in capsys.readouterr().out
    assert "sentence" in failing(capsys, *words[:2], " ", *words[3:], str(tmp_path))


def test_stopping_gives_the_signals_exit_code(run, monkeypatch, capsys):
    from aml import training
    from aml.errors import Stopped

    def stopped(*args, **kwargs):
        raise Stopped(15, "saved; go on with ...")

    monkeypatch.setattr(training, "train", stopped)
    assert cli.main(["train"]) == 128 + 15 and "go on with" in capsys.readouterr().err


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real photographs: {REAL} is absent")
def test_real_photographs_from_training_to_a_mask(tmp_path, capsys):
    encoder, out = tiny.write_text_encoder(tmp_path / "encoder"), tmp_path / "run"
    words = tiny.settings(REAL, encoder, out, "train.steps=4")
    assert cli.main(["train", *words]) == 0
    assert "138 objects" in capsys.readouterr().out
    photo = next((REAL / "images/train2014").glob("*.jpg"))
    assert (
        cli.main(["predict", str(photo), "the black dog", "--checkpoint", str(out), "--out", str(tmp_path)])
        == 0
    )
    with Image.open(photo) as image, Image.open(tmp_path / f"{photo.stem}-mask.png") as mask:
        assert mask.size == image.size
