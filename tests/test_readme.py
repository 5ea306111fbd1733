"""What README and CONTRIBUTING show works: code runs, commands, targets and variables exist, links lead somewhere."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md")


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("code", [code for page in PAGES for code in blocks(page, "python")])
def test_python_blocks_run(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    assert "pixels kept" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target for block in blocks(page, "bash") for line in block.splitlines() if line.startswith("make ")
        for target in line.partition("#")[0].split()[1:] if "=" not in target
    }
    assert named and named <= targets


def test_commands_exist():
    lines = [line.partition("  #")[0] for block in blocks("README.md", "bash") for line in block.splitlines()]
    commands = {line.split()[1] for line in lines if line.startswith("aml ")}
    assert commands == {"train", "eval", "predict"}
    for command in sorted(commands):
        run = subprocess.run([sys.executable, "-m", "aml", command, "--help"], capture_output=True, text=True, cwd=ROOT)
        assert run.returncode == 0, run.stderr
        shown = [line for line in lines if line.startswith(f"aml {command}")]
        for option in {word for line in shown for word in re.findall(r"--\w+", line)}:
            assert option in run.stdout, f"aml {command} has no {option}"


def test_the_table_is_that_of_the_stored_rows(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import tables

    report = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    assert tables.readme(report) in (ROOT / "README.md").read_text(), "run benchmarks/plot.py"


def test_every_environment_variable_is_in_the_table():
    table = set(re.findall(r"^\| `(AML_\w+)`", (ROOT / "README.md").read_text(), re.MULTILINE))
    sources = [*ROOT.glob("aml*/**/*.py"), *ROOT.glob("csrc/**/*.*"), ROOT / "setup.py"]
    used = {
        name for path in sources
        for name in re.findall(r"(?:environ\.get\(|environ\[|getenv\(|switch\()\s*\"(AML_\w+)\"", path.read_text())
    }
    assert table == used


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert link.startswith("https://") or (ROOT / link).exists(), link
