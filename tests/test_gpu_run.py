"""The driver of `make gpu`, on parts that need no GPU: what it starts, ends, stores, skips and reports."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "gpu" / "run.py"
spec = importlib.util.spec_from_file_location("gpu_run", SOURCE)
driver = sys.modules["gpu_run"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(driver)


def part(name, script, seconds=60, proof=r"^done.*", **more):
    return driver.Part(name, seconds, (sys.executable, "-c", script), proof, **more)


def drive(folder, *planned, only=(), minutes=1.0):
    """Exit code and the stored results."""
    arguments = ["--out", str(folder), "--minutes", str(minutes), *(["--only", *only] if only else [])]
    code = driver.main(arguments, make=lambda folder: list(planned))
    stored, = folder.glob("*/results.json")
    return code, json.loads(stored.read_text())


def waiting(name, other, folder):
    """A part that ends when `other` has begun too; after 20 seconds it fails."""
    return part(name, f"""
import pathlib, time
pathlib.Path({str(folder / name)!r}).touch()
for _ in range(200):
    if pathlib.Path({str(folder / other)!r}).exists():
        raise SystemExit(print("done"))
    time.sleep(0.1)
""")


def counting(name, folder):
    return part(name, f"open({str(folder / name)!r}, 'a').write('x'); print('done', {name!r})")


def test_what_has_passed_is_not_run_again(tmp_path):
    a, b = counting("a", tmp_path), counting("b", tmp_path)
    broken = part("b", "raise SystemExit(3)")
    code, results = drive(tmp_path / "out", a, broken)
    assert code == 1 and results["a"]["state"] == "passed" and results["a"]["says"] == "done a"
    assert results["b"]["state"] == "failed" and "exit code 3" in results["b"]["says"]
    code, results = drive(tmp_path / "out", a, b)
    assert code == 0 and results["b"]["state"] == "passed"
    assert (tmp_path / "a").read_text() == "x"
    drive(tmp_path / "out", a, b, only=["a"])
    assert (tmp_path / "a").read_text() == "xx" and (tmp_path / "b").read_text() == "x"


def test_a_part_that_others_depend_on_runs_every_time(tmp_path):
    build = part("build", f"open({str(tmp_path / 'n')!r}, 'a').write('x'); print('done')", always=True)
    for _ in range(2):
        drive(tmp_path / "out", build)
    assert (tmp_path / "n").read_text() == "xx"


def test_nothing_passes_with_what_was_built_of_earlier_sources(tmp_path):
    built = tmp_path / "built"
    built.touch()
    build = part("build", "raise SystemExit('no nvcc')", always=True, alone=True, makes=built)
    code, results = drive(tmp_path / "out", build, part("a", f"open({str(built)!r}); print('done')"))
    assert code == 1 and results["build"]["state"] == results["a"]["state"] == "failed"


def test_what_passed_without_the_build_is_run_again_with_it(tmp_path):
    """Not before: who has no nvcc goes on where the last run ended."""
    failing, build = (part("build", x, always=True, alone=True) for x in ("raise SystemExit(1)", "print('done')"))
    a = counting("a", tmp_path)
    for first, times in ((failing, 1), (failing, 1), (build, 2), (build, 2)):
        drive(tmp_path / "out", first, a)
        assert (tmp_path / "a").read_text() == times * "x"


def test_the_build_makes_what_is_imported(tmp_path):
    build, = (p for p in driver.parts(tmp_path) if p.makes)
    assert build.name == "build" and build.makes == driver.ROOT / "aml_kernels" / "_C.abi3.so"


def test_parts_run_at_once_and_are_told_in_order(tmp_path, capsys):
    slow = part("slow", "import time; time.sleep(1); print('done')")
    code, results = drive(tmp_path / "out", slow, waiting("a", "b", tmp_path), waiting("b", "a", tmp_path))
    assert code == 0 and results["b"]["seconds"] < 20
    said = capsys.readouterr().out.splitlines()
    assert "running slow, a, b" in said
    assert [x.split()[0] for x in said if " passed " in x] == ["slow", "a", "b"]


def test_nothing_runs_beside_a_part_that_runs_alone(tmp_path):
    lock = str(tmp_path / "lock")
    script = f"import os, time; os.mkdir({lock!r}); time.sleep(0.5); os.rmdir({lock!r}); print('done')"
    planned = (part(name, script, alone=name in "bc") for name in "abcd")
    code, results = drive(tmp_path / "out", *planned)
    assert code == 0, results


def test_what_a_part_leaves_running_ends_with_it(tmp_path):
    late = f"import time; time.sleep(2); open({str(tmp_path / 'late')!r}, 'w')"
    leaving = part("a", f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {late!r}]); print('done')")
    code, _ = drive(tmp_path / "out", leaving)
    time.sleep(3)
    assert code == 0 and not (tmp_path / "late").exists()


@pytest.mark.parametrize("how", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), ids=lambda how: how.name)
def test_who_interrupts_it_ends_all_that_runs(tmp_path, how):
    started, alive = tmp_path / "started", tmp_path / "alive"
    script = f"import time; open({str(started)!r}, 'w'); time.sleep(3); open({str(alive)!r}, 'w')"
    program = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
sys.path.insert(0, {str(SOURCE.parent)!r})
import run
parts = [run.Part(name, 60, (sys.executable, "-c", {script!r}), "") for name in "ab"]
run.main(["--out", {str(tmp_path / "out")!r}], make=lambda folder: parts)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(how)
    assert process.wait(30) != 0
    time.sleep(4)
    assert not alive.exists()


def test_a_part_that_did_nothing_has_not_passed(tmp_path):
    code, results = drive(tmp_path, part("tests", "print('5 skipped in 0.1s')", proof=r"^.*\b\d+ passed.*"))
    assert code == 1 and results["tests"]["state"] == "failed" and "nothing was run" in results["tests"]["says"]


def test_a_part_is_ended_with_its_workers_after_its_time(tmp_path):
    alive = tmp_path / "alive"
    worker = f"import time; time.sleep(3); open({str(alive)!r}, 'w')"
    script = (
        f"import subprocess, sys, time; print('started', flush=True); "
        f"subprocess.Popen([sys.executable, '-c', {worker!r}]); time.sleep(60)"
    )
    start = time.monotonic()
    code, results = drive(tmp_path / "out", part("slow", script, seconds=1), part("next", "print('done')"))
    assert code == 1 and results["slow"]["state"] == "cut off" and "started" in results["slow"]["says"]
    assert results["next"]["state"] == "passed" and time.monotonic() - start < 30
    time.sleep(max(0.0, start + 5 - time.monotonic()))
    assert not alive.exists()


def test_parts_that_no_time_is_left_for_wait_for_the_next_run(tmp_path):
    code, results = drive(tmp_path, part("a", "print('done')"), minutes=0.01)
    assert code == 1 and results["a"]["state"] == "not started"


def test_a_tool_that_is_not_installed_is_no_failure(tmp_path):
    code, results = drive(tmp_path, part("tool", "", missing="is not installed"))
    assert code == 0 and results["tool"] == {"state": "missing", "says": "is not installed", "seconds": 0.0}


def test_an_unknown_part_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(driver, "sees_gpu", lambda: True)
    with pytest.raises(SystemExit):
        driver.main(["--only", "sanitiser", "--out", str(tmp_path)])
    assert "memcheck" in capsys.readouterr().err


def test_what_the_environment_lacks_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(driver.NEEDED, "hypothesis", (10**6, 1))
    monkeypatch.setitem(driver.NEEDED, "no_such_package", (1,))
    with pytest.raises(SystemExit):
        driver.main(["--out", str(tmp_path)])
    assert "pip install 'hypothesis>=1000000.1' 'no_such_package>=1'" in capsys.readouterr().err


def test_without_a_gpu_nothing_is_built_or_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(driver, "sees_gpu", lambda: False)
    with pytest.raises(SystemExit):
        driver.main(["--out", str(tmp_path)])
    assert "sees no NVIDIA GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_plan_names_what_exists(tmp_path):
    planned = driver.parts(tmp_path)
    assert len({p.name for p in planned}) == len(planned)
    for p in planned:
        for word in map(str, p.command):
            if word.endswith(".py"):
                assert (driver.ROOT / word).is_file(), f"{p.name}: {word}"


def test_what_is_measured_follows_the_tests_and_runs_alone(tmp_path):
    planned = driver.parts(tmp_path)
    names = [p.name for p in planned]
    assert names[:3] == ["build", "about", "cuda"] and names[-2:] == ["goal", "others"]
    assert {p.name for p in planned if p.alone} == {"build", "about", "large", "goal", "others"}


@pytest.mark.parametrize(("cores", "expected"), ((1, [1, 1, 1, 1]), (8, [4, 6, 1, 1]), (64, [8, 12, 3, 1])))
def test_workers_share_the_cores(tmp_path, monkeypatch, cores, expected):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    commands = {p.name: " ".join(p.command) for p in driver.parts(tmp_path)}
    for name, workers in zip(("cuda", "triton", "features", "large"), expected, strict=True):
        assert f"--numprocesses={workers} " in commands[name]


def test_there_is_time_to_compile_what_a_sanitizer_watches(tmp_path):
    """Two seconds a program, in the part and in the one test that do it."""
    limits = {p.name: p for p in driver.parts(tmp_path)}
    assert f"--timeout={2 * driver.PROGRAMS}" in limits["features"].command
    assert min(limits[name].seconds for name in ("features", "memcheck-triton")) > 2 * driver.PROGRAMS


def test_initcheck_sees_what_other_kernels_write(tmp_path):
    passing_over = {p.name for p in driver.parts(tmp_path) if "--kernel-name-exclude" in p.command}
    assert passing_over == {"memcheck", "racecheck", "synccheck", "memcheck-triton"}


def test_a_test_that_hangs_costs_no_other(tmp_path):
    """Not even one in C code, as waiting for a GPU is."""
    pytest.importorskip("xdist")
    pytest.importorskip("pytest_timeout")
    (tmp_path / "pytest.ini").write_text("[pytest]")
    (tmp_path / "test_x.py").write_text(
        "import threading\nlock = threading.Lock()\n"
        "def test_a(): pass\ndef test_b(): lock.acquire(), lock.acquire()\ndef test_c(): pass\n"
    )
    planned = driver.tests("x", 600, 1, 1, "--rootdir", str(tmp_path), str(tmp_path / "test_x.py"))
    _, results = drive(tmp_path / "out", planned, minutes=10)
    assert results["x"]["state"] == "failed" and "1 failed, 2 passed" in results["x"]["says"]


def test_programs_that_lie_beside_python_are_found(tmp_path):
    """As ninja does where pip installed it; of several, the one on PATH is taken."""
    script = "import os; print('done', os.environ['PATH'])"
    _, results = drive(tmp_path, part("a", script))
    assert results["a"]["says"].split(":")[-1] == str(Path(sys.executable).parent)


def test_packages_are_imported_from_where_the_driver_imports_them(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    _, results = drive(tmp_path, part("a", "import os; print('done', os.environ['PYTHONPATH'])"))
    assert results["a"]["says"] == f"done {driver.ROOT}:{tmp_path / 'packages'}"


def test_all_lines_that_show_what_was_done_are_told(tmp_path):
    _, results = drive(tmp_path, part("a", "print('done 1'); print('x'); print('done 2')"))
    assert results["a"]["says"].split("\n") == ["done 1", "    done 2"]


def test_results_belong_to_the_sources(tmp_path, monkeypatch):
    (tmp_path / "setup.py").write_text("1")
    monkeypatch.setattr(driver, "ROOT", tmp_path)
    before = driver.key()
    assert driver.key() == before
    (tmp_path / "setup.py").write_text("2")
    assert driver.key() != before
