"""`aml doctor`: does what a training needs, in small, and says what does not work and what to do about it.

Nothing is downloaded, and nothing is left behind.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from aml.assembly import build_aligner, open_data, training_problems
from aml.config import Config
from aml.data.photographs import to_rgb
from aml.models import RISModel, build_model

OK, WARN, FAIL = "OK", "WARN", "FAIL"
# What the extra `ris` brings.
PACKAGES = (
    "accelerate", "matplotlib", "numpy", "pillow", "pycocotools", "pyyaml", "safetensors", "timm", "tqdm",
    "transformers",
)  # fmt: skip
RANKS_LIMIT_S = 90  # of the two processes together; they take as long as `import torch`
COLLECTIVE_LIMIT_S = 20
_RANK = """
import datetime, sys, torch, torch.distributed as dist
rank, rendezvous, limit = int(sys.argv[1]), sys.argv[2], datetime.timedelta(seconds=float(sys.argv[3]))
dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=limit)
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
assert total.item() == 3, f"the sum of 1 and 2 came out as {total.item()}"
dist.destroy_process_group()
"""


class Finding(NamedTuple):
    level: str
    what: str
    text: str
    remedy: str = ""


def examine(settings: Config) -> Iterator[Finding]:
    """One finding or several of each check, as they are made."""
    built: list[RISModel] = []
    yield from _guarded("packages", packages)
    yield from _guarded("operators", operators)
    yield from _guarded("settings", lambda: refused(settings))
    yield from _guarded("weights", lambda: weights(settings, built))
    yield from _guarded("model", lambda: training_step(settings, built))
    yield from _guarded("run folder", lambda: run_folder(settings, checkpoint_bytes(settings, built)))
    yield from _guarded("data", lambda: data(settings))
    yield from _guarded("two processes", two_processes)


def _guarded(what: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check that raises has failed; the others go on."""
    try:
        yield from check()
    except Exception as error:  # whatever it is, it belongs into the report
        if os.environ.get("AML_DEBUG"):
            raise
        if isinstance(error, ImportError | OSError | ValueError) and str(error):  # says what to mend, as for `aml`
            yield Finding(FAIL, what, str(error))
        else:
            yield Finding(FAIL, what, f"{type(error).__name__}: {error}", "AML_DEBUG=1 aml doctor shows where")


def packages() -> Iterator[Finding]:
    found, missing = [f"Python {platform.python_version()}", f"torch {torch.__version__}"], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    yield Finding(OK, "packages", ", ".join(found))
    if missing:
        yield Finding(FAIL, "packages", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")


def operators() -> Iterator[Finding]:
    """Each back end that would run on the devices that are here, against the reference."""
    from aml_kernels import _backend
    from aml_kernels.__main__ import MADE_FOR, self_check

    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        ran = []
        for backend in MADE_FOR[device]:
            if _backend.missing(backend, device) is None:
                problem = self_check(backend, device)
                ran.append(backend)
                what = f"{backend} on {device.upper()} tensors"
                if problem is None:
                    yield Finding(OK, "operators", f"{what}: as the reference")
                else:
                    yield Finding(FAIL, "operators", f"{what}: {problem}", "AML_KERNELS_BACKEND=reference avoids it")
        if device not in ran:  # the back end of this name is the fastest one there
            reason = _backend.missing(device, device)
            remedy = "python -m aml_kernels tells what was built; pip install --no-build-isolation . builds it"
            instead = _backend.choose(None, torch.device(device))
            yield Finding(WARN, "operators", f"{device.upper()} tensors run on {instead!r}, slower: {reason}", remedy)


def refused(settings: Config) -> Iterator[Finding]:
    """What `aml train` refuses before it begins."""
    for problem in training_problems(settings):
        name, _, remedy = problem.partition("; ")
        yield Finding(FAIL, "settings", name, remedy)


def weights(settings: Config, built: list[RISModel]) -> Iterator[Finding]:
    """Pretrained weights without a download. The model is put into `built`; with random weights, where others fail."""
    options, name = settings.model.options(), settings.model.name
    with offline():
        model = build_model(**{**options, "pretrained": False})
        finding = Finding(OK, "weights", f"{name}: none asked for")
        if settings.model.pretrained:
            try:
                model = build_model(**options)
                finding = Finding(OK, "weights", f"{name}: read without a download")
            except Exception as error:  # loaders raise many types
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                remedy = "start once where there is a network, or name files and folders in model.*; see docs/models.md"
                finding = Finding(FAIL, "weights", f"{name}: not all are on this machine ({reason})", remedy)
    built.append(model)
    yield finding


def training_step(settings: Config, built: list[RISModel]) -> Iterator[Finding]:
    """Forward and backward of two random images."""
    if not built or built[0].tokenizer is None:  # why, is said already
        return
    model = built[0]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).train()
    aligner = build_aligner(settings, model).to(device)
    size = model.image_size
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    tokens, text_mask = (tensor.to(device) for tensor in model.tokenize(["the black dog", "left"]))
    target = torch.zeros(2, size, size, dtype=torch.uint8, device=device)
    target[:, size // 4 : size // 2, size // 4 : size // 2] = 1
    batch = {"image": image, "tokens": tokens, "text_mask": text_mask, "target": target}
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.train.precision)
    with torch.autocast(device.type, half, enabled=half is not None):
        loss, _ = aligner.training_step(model, batch, 0)
    loss.backward()
    gradients = [p.grad for p in [*model.parameters(), *aligner.parameters()] if p.grad is not None]
    finite = math.isfinite(loss.item()) and all(bool(gradient.isfinite().all()) for gradient in gradients)
    count = sum(parameter.numel() for parameter in model.parameters())
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    text = f"{settings.model.name}, {count:,} parameters: forward and backward of 2 images {size} x {size} on {name}"
    if finite and gradients:
        yield Finding(OK, "model", f"{text}, loss {loss.item():.3f}")
    else:
        what = "loss or gradient is not finite" if gradients else "no parameter got a gradient"
        remedy = "AML_KERNELS_BACKEND=reference or train.precision=no tells whether operators or precision are to blame"
        yield Finding(FAIL, "model", f"{text}: {what}", remedy)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Hugging Face's libraries take what is in their cache, and ask no server."""
    import huggingface_hub.constants as constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def run_folder(settings: Config, each: int) -> Iterator[Finding]:
    """Whether train.out can be written to, and has room for the checkpoints of `each` bytes that a run keeps."""
    out = Path(settings.train.out)
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir():
        yield Finding(FAIL, "run folder", f"{existing} is a file", "give another train.out")
        return
    probe = existing / f".aml-doctor-{uuid.uuid4().hex}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        yield Finding(FAIL, "run folder", f"{out} cannot be written ({error})", "give another train.out")
        return
    free = shutil.disk_usage(existing).free
    count = settings.train.keep + 2  # the best one, and the one that is being written
    text = f"{out}: {free / 1e9:.1f} GB free; a checkpoint takes about {each / 1e9:.2f} GB, a run keeps up to {count}"
    level = FAIL if free < 2 * each else WARN if free < count * each else OK
    remedy = "" if level == OK else "make room, lower train.keep, or give another --out"
    yield Finding(level, "run folder", text, remedy)
    if (out / "checkpoints").is_dir():
        yield Finding(WARN, "run folder", f"{out} holds a run already", "aml train --resume, or give another --out")


def checkpoint_bytes(settings: Config, built: list[RISModel]) -> int:
    """About: weights; for each that is trained two numbers of the optimizer, and its average where there is one."""
    more = 2 if settings.train.ema is None else 3
    parameters = [parameter for model in built for parameter in model.parameters()]
    return sum(4 * p.numel() * (1 + more * p.requires_grad) for p in parameters)


def data(settings: Config) -> Iterator[Finding]:
    """Annotations, one photograph and one mask of train and val."""
    root = settings.data.root
    if not root:
        yield Finding(WARN, "data", "none given", "aml doctor --data DIR looks at it; aml demo renders its own")
        return
    remedy = f"aml data check {root}  looks at every file and says what is wrong"
    try:
        annotations = open_data(settings)
        for split in ("train", "val"):
            expressions = annotations.expressions(split)
            first = expressions[0]
            with Image.open(first.image_path) as image:
                size = to_rgb(image).size
            mask = annotations.mask(first)
            text = f"{annotations.name} {split}: {len(expressions)} sentences; {first.image_path.name} reads"
            if size == mask.shape[::-1]:
                yield Finding(OK, "data", text)
            else:
                text += f", but is {size[0]} x {size[1]}, its mask {mask.shape[1]} x {mask.shape[0]}"
                yield Finding(FAIL, "data", text, remedy)
    except Exception as error:  # readers raise many types for damaged files
        yield Finding(FAIL, "data", str(error), remedy)


def two_processes() -> Iterator[Finding]:
    """An all-reduce of two processes by gloo, as several ranks need it, with a limit of time."""
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = (Path(folder) / "rendezvous").as_uri()
        command = [sys.executable, "-c", _RANK]
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        processes = [
            subprocess.Popen(
                [*command, str(rank), rendezvous, str(COLLECTIVE_LIMIT_S)],
                env=environment | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            errors = [process.communicate(timeout=RANKS_LIMIT_S)[1] for process in processes]
        except subprocess.TimeoutExpired:
            errors = [f"no answer within {RANKS_LIMIT_S} s"]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    remedy = "on one machine GLOO_SOCKET_IFNAME=lo may help; training in one process needs none of this"
    if all(process.returncode == 0 for process in processes):
        yield Finding(OK, "two processes", "all-reduce by gloo")
    else:
        last = [text.strip().splitlines()[-1] for text in errors if text.strip()]
        yield Finding(FAIL, "two processes", "all-reduce by gloo: " + (last[0] if last else "a process died"), remedy)
