"""A run that takes seconds: rendered scenes, a narrow text encoder, a backbone of 80 000 weights."""

import contextlib
import datetime
import multiprocessing
import os
import signal
import time
from pathlib import Path

import psutil

from aml.data.scenes import render_scenes

#: Of CARIS: `backbone_options` that go with model.backbone=swin_tiny_patch4_window7_224
NARROW_SWIN = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (2, 4, 4, 8)}


def write_data(root: Path, train: int = 6, val: int = 2) -> Path:
    return render_scenes(root, train=train, val=val, image_size=64, seed=3)


def write_text_encoder(folder: Path) -> Path:
    """A folder that transformers reads: configuration and tokenizer, no weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = "the a red blue green yellow circle square triangle star large small left right of on in".split()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    BertConfig(
        vocab_size=len(special + words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    ).save_pretrained(folder)
    return folder


def settings(data: Path, text_encoder: Path, out: Path, *more: str) -> list[str]:
    """Words for `aml.config.load`. The text encoder is trained, so that its dropout draws random numbers."""
    return [
        f"data.root={data}",
        f"train.out={out}",
        "model.backbone=test_efficientnet",
        f"model.text_encoder={text_encoder}",
        "model.pretrained=false",
        "model.freeze_encoders=false",
        "model.image_size=64",
        "model.max_tokens=12",
        "model.dim=64",
        "model.layers=1",
        "alignment.dim=8",
        "train.batch_size=4",
        "train.workers=0",
        "train.log_every=2",
        *more,
    ]


# Child processes come from a server that has done the slow imports once, and has run no thread of torch.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["aml.training"])


def start(function, *arguments):
    process = _processes.Process(target=function, args=arguments)
    process.start()
    return process


def left_of(group: int, seconds: float = 30) -> list[str]:
    """What a process group still runs after so long. Nothing runs in a process that ended and waits to be asked for."""
    deadline = time.monotonic() + seconds
    while True:
        running = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                    running.append(" ".join(process.cmdline()))
        if not running or time.monotonic() > deadline:
            return running
        time.sleep(0.05)


def train(words: list[str], moment: int | None = None) -> None:
    """words: of `aml train`. moment: at which the process dies, see `dying.die_at`."""
    import dying
    import torch

    from aml import cli

    os.setsid()  # a process group of its own, to be signalled as a whole, with the loader's processes in it
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    if moment is not None:
        dying.die_at(moment)
    raise SystemExit(cli.main(["train", *words]))


def have_alone(folder: Path) -> None:
    """Ends with 3 where another run writes to the folder."""
    from aml.errors import LaunchError
    from aml.runlock import only_run

    try:
        with only_run(folder):
            pass
    except LaunchError:
        raise SystemExit(3) from None


def command(arguments: list[str], errors: Path) -> None:
    """`aml` with these arguments. errors: the file that gets what it prints as errors."""
    import torch

    from aml import cli

    with open(errors, "w") as file:
        os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    raise SystemExit(cli.main(arguments))


def join_ranks(rank: int, rendezvous: str, seconds: float = 60) -> None:
    """Make this process one of two. seconds: how long it waits for the other one."""
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "GLOO_SOCKET_IFNAME": "lo"}
    import torch

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=seconds)
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timeout)


def train_as_rank(
    rank: int, rendezvous: str, jobs: list[tuple[list[str], int | None, bool]], moment: int | None = None
) -> None:
    """One of two processes. jobs: (settings, step at which to stop or None, whether to resume).

    moment: at which this process dies, see `dying.die_at`.
    """
    os.setsid()  # a process group of its own, with the loader's processes in it
    multiprocessing.set_start_method("fork", force=True)
    join_ranks(rank, rendezvous)
    import dying
    import torch

    from aml import training
    from aml.config import load
    from aml.errors import Stopped

    if moment is not None:
        dying.die_at(moment)
    for words, stop, resume in jobs:
        training._Trainer._agreed = lambda self, _, stop=stop: signal.SIGTERM * (self.state.progress.step == stop)
        try:
            training.train(load(None, words), resume=resume)
            assert stop is None
        except Stopped:
            assert stop is not None
    torch.distributed.destroy_process_group()
