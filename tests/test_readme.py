"""What the pages show works: code runs, commands, targets and variables exist, links lead somewhere."""

import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import tiny

from aml import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))))


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize(
    ("page", "printed"),
    [("README.md", "pixels kept"), ("docs/data.md", "refcoco(unc) "), ("docs/evaluation.md", '"N-acc": 1.0')],
)
def test_python_blocks_run(page, printed, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codes = blocks(page, "python")
    assert codes
    for code in codes:
        exec(compile(code, page, "exec"), {})
    assert printed in capsys.readouterr().out


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target for block in blocks(page, "bash") for line in block.splitlines() if line.startswith("make ")
        for target in line.partition("#")[0].split()[1:] if "=" not in target
    }
    assert named and named <= targets


@pytest.mark.parametrize("page", [page for page in PAGES if "aml " in "".join(blocks(page, "bash"))])
def test_commands_exist(page):
    """Every line of `aml` is understood: its command, its options, the number of its words."""
    whole = [block.replace("\\\n", " ") for block in blocks(page, "bash")]
    lines = [line.partition("  #")[0] for block in whole for line in block.splitlines()]
    commands = [line.partition("-m aml ")[2] or line.partition("aml ")[2] for line in lines
                if line.startswith(("aml ", "torchrun ", "accelerate "))]  # fmt: skip
    assert commands
    for command in commands:
        options, rest = cli._parser().parse_known_args(shlex.split(command))
        assert all("=" in word for word in rest) and (options.takes_settings or not rest), command


@pytest.mark.usefixtures("one_thread")
def test_its_train_and_eval_run_where_two_partitions_lie(tmp_path, monkeypatch):
    """RefCOCO as REFER distributes it; the model is small and trained for a step."""
    monkeypatch.chdir(tmp_path)
    refs = tiny.write_data(tmp_path / "DIR") / "refcoco/refs(unc).p"
    shutil.copyfile(refs, refs.with_name("refs(google).p"))
    lines = [line.partition("  #")[0] for block in blocks("README.md", "bash") for line in block.splitlines()]
    (train,) = (line for line in lines if line.startswith("aml train --data DIR"))
    (evaluate,) = (line for line in lines if line.startswith("aml eval "))
    small = tiny.settings(tmp_path / "DIR", tiny.write_text_encoder(tmp_path / "encoder"), tmp_path, "train.steps=1")
    small = [word for word in small if not word.startswith(("data.root", "train.out"))]
    assert cli.main([*shlex.split(train)[1:], *small]) == 0
    assert cli.main(shlex.split(evaluate)[1:]) == 0
    assert (tmp_path / "runs/first/evaluations").is_dir()


def test_the_table_is_that_of_the_stored_rows(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import tables

    report = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    assert tables.readme(report) in (ROOT / "README.md").read_text(), "run benchmarks/plot.py"


def test_the_figures_of_a_gpu_are_those_of_the_stored_rows():
    rows = json.loads((ROOT / "benchmarks/results/cuda-goal.json").read_text())["rows"]
    lines, text = [], (ROOT / "README.md").read_text()
    operators, types = ("masked_loss", "aml_loss"), {"float32": "fp32", "bfloat16": "bf16"}
    for op, dtype, backward in itertools.product(operators, types, ("", "+backward")):
        ms = {
            row["provider"]: row["p50_ms"] for row in rows
            if (row["op"], row["dtype"], row["pass"]) == (op, dtype, f"forward{backward}")
        }
        times = " / ".join(f"{ms[name] / ms['cuda']:.{1 if name == 'compile' else 0}f}" for name in list(ms)[:3])
        numbers = " | ".join(f"{value:#.3g}" for value in ms.values())
        name = "" if backward else f"`{op}`, {types[dtype]}"
        lines.append(f"| {name} | {'+ backward' if backward else 'forward'} | {numbers} | {times} |")
    assert [line for line in lines if line not in text] == []


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
        assert link.startswith("https://") or ((ROOT / page).parent / link).exists(), link
