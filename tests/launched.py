"""What the two processes of tests/test_ranks.py do under a launcher: `torchrun ... tests/launched.py JOBS.json`.

A job is {"do": the name of a function below, ...its arguments}.
"""

import functools
import json
import os
import signal
import sys
from pathlib import Path

import tiny
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from aml import training
from aml.assembly import open_data
from aml.config import load
from aml.errors import Stopped


def train(words, breaks=None, dies=None):
    """Train; the rank `breaks` has a NaN among the pixels of step 2, the rank `dies` dies before step 3."""

    def step(self, batches, original=training._Trainer._step):
        if self.rank == dies and self.state.progress.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, batches)

    def learn(self, batch, step, original=training.Learner.learn):
        if self.accelerator.process_index == breaks and step == 2:
            batch["image"][0] = torch.nan
        return original(self, batch, step)

    before = training._Trainer._step, training.Learner.learn
    training._Trainer._step, training.Learner.learn = step, learn
    try:
        training.train(load(None, words))
    finally:
        training._Trainer._step, training.Learner.learn = before


def train_divided(words, stop=None, resume=False, by="BertLayer,Film"):
    """With FSDP. Accelerate takes it for GPUs only; told that these processes have one each, it does all the same."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": by}
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    agreed, run = training._Trainer._agreed, training._Trainer.run

    def run_divided(self):
        parameters = [p for p in self.learner.module.parameters() if p.ndim and len(p) > 1]
        assert all(p.to_local().numel() < p.numel() for p in parameters), "not divided"
        run(self)

    training._Trainer.run = run_divided
    training._Trainer._agreed = lambda self, _: signal.SIGTERM * (self.state.progress.step == stop)
    try:
        training.train(load(None, words), resume=resume)
    except Stopped:
        assert stop is not None
    finally:
        training._Trainer._agreed, training._Trainer.run = agreed, run
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
        del os.environ["ACCELERATE_USE_FSDP"]


def train_caris(words, divided):
    """A narrow one, by DDP and, with the words `divided`, by FSDP."""
    build = training.build_model
    training.build_model = functools.partial(build, backbone_options=tiny.NARROW_SWIN)
    train(words)
    train_divided(divided, by="BertLayer,SwinTransformerBlock,DecoderLayer")
    training.build_model = build


def evaluate(words, sizes):
    """Evaluate the first sentences of the validation split, so many of them, with untrained weights."""
    config = load(None, words)
    trainer = training._Trainer(config, training.open_accelerator(config), open_data(config))
    trainer._open_directory()
    trainer.learner.model.decoder.bias.data.fill_(10.0)  # or it would find nothing anywhere
    whole = trainer.val_set.expressions, trainer.val_set._sentences_of_item
    for size in sizes:
        trainer.val_set.expressions, trainer.val_set._sentences_of_item = (part[:size] for part in whole)
        trainer._evaluate()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        globals()[job.pop("do")](**job)
