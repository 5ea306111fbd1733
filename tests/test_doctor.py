"""`aml doctor`: what works is OK, and what does not is named with a remedy and exit code 1."""

import os
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from aml import checkpoint, cli, doctor
from aml.config import load
from aml.models import pretrained

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    tiny.write_data(folder / "data", train=1, val=1)
    tiny.write_text_encoder(folder / "encoder")
    return folder


@pytest.fixture
def words(place, tmp_path):
    return tiny.settings(place / "data", place / "encoder", tmp_path / "new" / "run")


def findings(check):
    return {(finding.level, finding.what): finding for finding in check}


def test_all_is_tried_and_nothing_is_left(words, tmp_path, capsys):
    assert cli.main(["doctor", *words]) == 0
    said = capsys.readouterr().out
    for line in (
        "OK    packages: Python 3", "OK    operators: cpu on CPU tensors: as the reference", "OK    model: compact",
        "OK    weights: compact: none asked for", "OK    run folder", "OK    data: refcoco(unc) train",
        "OK    data: refcoco(unc) val", "OK    two processes: all-reduce by gloo",
    ):  # fmt: skip
        assert line in said, said
    assert "FAIL" not in said and not list(tmp_path.iterdir())


def test_a_failure_is_exit_code_1_with_a_remedy(words, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "two_processes", lambda: iter(()))
    monkeypatch.setattr(doctor, "operators", lambda: iter(()))
    assert cli.main(["doctor", *words, "data.dataset=refcocog"]) == 1
    said = capsys.readouterr().out
    assert "FAIL  data: dataset='refcocog': no folder" in said and "-> aml data check" in said
    assert said.splitlines()[-1].startswith("1 failed")


def test_what_training_refuses_is_found(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    (found,) = doctor.refused(load(None, ["train.precision=fp16"]))
    assert found == (doctor.FAIL, "settings", "train.precision=fp16: takes a GPU", "give bf16 or no")
    assert not list(doctor.refused(load(None, ["train.precision=bf16", "alignment.strategy=released"])))


def test_weights_that_are_not_here_are_not_downloaded(words, monkeypatch):
    import socket

    def no_network(*_):
        raise AssertionError("asked a server")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    settings = load(None, [*words, "model.pretrained=true", "model.backbone=resnet18"])
    built = []
    (found,) = doctor.weights(settings, built)
    assert found.level == doctor.FAIL and "not all are on this machine" in found.text
    assert "docs/models.md" in found.remedy
    assert len(built) == 1  # with random weights, for the other checks


def test_a_wrong_setting_of_the_model_is_no_question_of_weights(words):
    found = findings(doctor._guarded("weights", lambda: doctor.weights(load(None, [*words, "model.name=compakt"]), [])))
    (finding,) = found.values()
    assert finding.level == doctor.FAIL and "did you mean 'compact'" in finding.text


@pytest.mark.parametrize(
    ("word", "what", "said"),
    [
        ("alignment.projection=model", "model", "alignment.projection=model: compact has no space that"),
        ("model.name=compakt", "weights", "unknown model 'compakt' (did you mean 'compact'?)"),
    ],
)
def test_a_wrong_setting_is_told_in_its_own_words(words, monkeypatch, capsys, word, what, said):
    """Where the program found out is of no use to who mistyped."""
    for check in ("packages", "operators", "two_processes"):
        monkeypatch.setattr(doctor, check, lambda: iter(()))
    assert cli.main(["doctor", *words, word]) == 1
    lines = capsys.readouterr().out.splitlines()
    (failure,) = (number for number, line in enumerate(lines) if line.startswith("FAIL"))
    assert lines[failure].startswith(f"FAIL  {what}: {said}")
    assert not lines[failure + 1].startswith("      ->")


def test_an_operator_that_computes_something_else_fails(monkeypatch):
    from aml_kernels import __main__ as kernels

    monkeypatch.setattr(kernels, "self_check", lambda backend, device: "loss: got 1, expected 2")
    found = list(doctor.operators())
    assert found and all(each.level == doctor.FAIL for each in found if "loss: got 1" in each.text)
    assert "AML_KERNELS_BACKEND=reference" in found[0].remedy


def test_a_missing_extension_is_worth_a_warning(monkeypatch):
    from aml_kernels import _backend

    missing = _backend.missing
    monkeypatch.setattr(_backend, "missing", lambda b, d: "not built" if b == "cpu" else missing(b, d))
    monkeypatch.setattr(_backend, "choose", lambda backend, device: "reference")
    warning = findings(doctor.operators())[doctor.WARN, "operators"]
    assert "CPU tensors run on 'reference', slower: not built" in warning.text


def test_a_gradient_that_is_not_finite_fails(words):
    settings, built = load(None, words), []
    list(doctor.weights(settings, built))
    with torch.no_grad():
        next(built[0].decoder.parameters()).fill_(float("nan"))
    (found,) = doctor.training_step(settings, built)
    assert found.level == doctor.FAIL and "not finite" in found.text


def test_the_run_folder_is_asked_for_room_and_permission(words, tmp_path, monkeypatch):
    settings = load(None, words)
    usage = shutil.disk_usage(tmp_path)
    for free, level in ((10**9, doctor.OK), (300, doctor.WARN), (199, doctor.FAIL)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        (found,) = doctor.run_folder(settings, each=100)
        assert found.level == level and bool(found.remedy) == (level != doctor.OK)
    (tmp_path / "file").touch()
    (found,) = doctor.run_folder(load(None, [*words, f"train.out={tmp_path / 'file'}"]), each=100)
    assert found.level == doctor.FAIL and "is a file" in found.text
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    found = findings(doctor.run_folder(load(None, [*words, f"train.out={tmp_path / 'run'}"]), each=1))
    assert "--resume" in found[doctor.WARN, "run folder"].remedy


def test_the_size_of_a_checkpoint_is_told_about_right(words, tmp_path):
    for ema in ((), ("train.ema=0.9",)):
        all_words = [*words, "train.steps=1", "train.batch_size=2", *ema, f"train.out={tmp_path / f'run{len(ema)}'}"]
        settings, built = load(None, all_words), []
        list(doctor.weights(settings, built))
        assert cli.main(["train", *all_words]) == 0
        folder = checkpoint.resolve(settings.train.out)
        written = sum(file.stat().st_size for file in folder.iterdir())
        assert doctor.checkpoint_bytes(settings, built) == pytest.approx(written, rel=0.15)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(words, tmp_path):
    tmp_path.chmod(0o500)
    (found,) = doctor.run_folder(load(None, words), each=1)
    tmp_path.chmod(0o700)
    assert found.level == doctor.FAIL and "cannot be written" in found.text


def test_no_data_is_no_failure(words):
    (found,) = doctor.data(load(None, [*words, "data.root="]))
    assert found.level == doctor.WARN and "--data DIR" in found.remedy


def test_a_photograph_of_another_size_fails(place, words, tmp_path):
    from PIL import Image

    shutil.copytree(place / "data", tmp_path / "data")
    for path in (tmp_path / "data/images/train2014").iterdir():
        Image.new("RGB", (9, 9)).save(path)
    found = list(doctor.data(load(None, [*words, f"data.root={tmp_path / 'data'}"])))
    assert {each.level for each in found} == {doctor.FAIL} and "is 9 x 9, its mask 64 x 64" in found[0].text


def test_a_photograph_of_more_than_eight_bits_fails(place, words, tmp_path):
    from PIL import Image

    shutil.copytree(place / "data", tmp_path / "data")
    for path in (tmp_path / "data/images/train2014").iterdir():
        Image.new("I;16", (64, 64)).save(path, "PNG")
    (found,) = doctor.data(load(None, [*words, f"data.root={tmp_path / 'data'}"]))
    assert found.level == doctor.FAIL and "16 bits or more per channel" in found.text


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise SystemExit('no route to host')", "no route to host"),
        ("import time; time.sleep(60)", "no answer within 2 s"),
    ],
)
def test_processes_that_fail_or_hang_are_told_and_ended(monkeypatch, program, said):
    monkeypatch.setattr(doctor, "_RANK", program)
    monkeypatch.setattr(doctor, "RANKS_LIMIT_S", 2)
    (found,) = doctor.two_processes()
    assert found.level == doctor.FAIL and said in found.text and "GLOO_SOCKET_IFNAME" in found.remedy


def test_a_check_that_raises_does_not_end_the_others(words, monkeypatch):
    def broken():
        raise RuntimeError("surprise")
        yield

    monkeypatch.setattr(doctor, "operators", broken)
    monkeypatch.setattr(doctor, "two_processes", lambda: iter([doctor.Finding(doctor.OK, "two processes", "")]))
    found = findings(doctor.examine(load(None, words)))
    failure = found[doctor.FAIL, "operators"]
    assert "RuntimeError: surprise" in failure.text and "AML_DEBUG=1" in failure.remedy
    assert (doctor.OK, "two processes") in found


def test_the_packages_are_those_of_the_extras():
    """What `aml doctor` looks for and what a missing encoder is told to install stand in pyproject.toml too."""
    project = Path(__file__).parent.parent / "pyproject.toml"
    extras = pytest.importorskip("tomllib").loads(project.read_text())["project"]["optional-dependencies"]
    assert sorted(doctor.PACKAGES) == sorted(re.split("[>=]", requirement)[0] for requirement in extras["ris"])
    assert pretrained.INSTALL.split()[2:] == [each for each in extras["demo"] if not each.startswith("aml-kernels")]
