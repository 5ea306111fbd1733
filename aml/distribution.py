"""Processes, devices and mixed precision, which are Accelerate's, with what it lets pass refused."""

from __future__ import annotations

import datetime
import os

import accelerate
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch.distributed.fsdp import MixedPrecisionPolicy

from aml.config import Config, ConfigError
from aml.errors import LaunchError

# A rank that has not answered for so long ends the run with an error. Longer than any one thing that a rank does while
# the others wait, such as writing a checkpoint.
PATIENCE = datetime.timedelta(minutes=10)


def open_accelerator(config: Config) -> accelerate.Accelerator:
    """Joins the process group, where `torchrun` or `accelerate launch` has made one. Collective.

    Raises ConfigError for settings that FSDP cannot have, LaunchError where Accelerate would go on otherwise than it
    was asked to.
    """
    AcceleratorState._reset_state()  # or a second run in this process could not have another precision
    made = accelerate.Accelerator(
        cpu=not torch.accelerator.is_available(),  # untold, it takes CPU processes for separate runs
        mixed_precision=config.train.precision,
        # As a number, ACCELERATE_GRADIENT_ACCUMULATION_STEPS of the environment would come before it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(config.train.accumulate),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if made.num_processes != launched:
        raise LaunchError(
            f"WORLD_SIZE={launched}, but Accelerate sees {made.num_processes} process(es): start them all with "
            "torchrun or accelerate launch; for one process unset WORLD_SIZE"
        )
    if made.distributed_type == DistributedType.FSDP:
        _prepare_fsdp(made, config)
    elif os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise LaunchError(
            f"FSDP was asked for, but Accelerate takes it for several GPUs only, and sees {made.num_processes} "
            f"process(es) on {made.device.type}: launch without --use_fsdp"
        )
    return made


def _prepare_fsdp(accelerator: accelerate.Accelerator, config: Config) -> None:
    if not accelerator.is_fsdp2:
        raise LaunchError("FSDP version 1 is not supported: launch with --fsdp_version 2")
    if config.train.ema is not None:
        raise ConfigError(["train.ema: not with FSDP, which divides the weights; launch without --use_fsdp"])
    # Every rank makes the same weights from the seed. The launcher asks for them to be read on rank 0 alone, which
    # transformers does by this variable and leaves the other ranks' encoders empty.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    # Accelerate would have weights, sums of gradients and the loss in half precision, in place of autocast. What needs
    # single precision would not get it.
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
