"""One optimizer step: forward and backward passes, and the update, which is skipped where it would do harm.

A gradient that is not finite must reach neither weights nor optimizer state nor averages, on any rank, and to ask the
device for it in every step would make the host wait for the whole step before it can queue the next. So the device
decides. A loss that is not finite is multiplied with NaN; that makes the gradient of every rank NaN, as ranks exchange
their gradients anyway; so the norm of the gradient tells all ranks alike. The fused AdamW takes that as a tensor, as it
does from a gradient scaler, and then leaves everything as it is. The host learns of it at the next line of the log.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from aml import checkpoint, sharding
from aml.alignment import AlignmentLoss
from aml.config import Config
from aml.errors import CheckpointError
from aml.models import RISModel


class TrainingStep(nn.Module):
    """Model and loss as one module, so that DDP and FSDP see a single forward pass."""

    def __init__(self, model: RISModel, aligner: AlignmentLoss):
        super().__init__()
        self.model, self.aligner = model, aligner

    def forward(self, batch: dict[str, Tensor], step: int, draw: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.aligner.training_step(self.model, batch, step, draw)


class Learner:
    """The weights, what moves them, and on request their exponential moving average."""

    def __init__(self, config: Config, accelerator: accelerate.Accelerator, model: RISModel, aligner: AlignmentLoss):
        self.accelerator, self.model, self.aligner = accelerator, model, aligner
        self.clip_norm, self.accumulate = config.optim.clip_norm, config.train.accumulate
        self.accumulated = 0  # batches of the present step
        groups = model.parameter_groups(config.optim.lr, config.optim.weight_decay)
        own = list(aligner.parameters())
        groups += [{"name": "aligner", "params": own, "lr": config.optim.lr, "weight_decay": 0.0}] * bool(own)
        self.fixed = [{name: group[name] for name in ("lr", "weight_decay")} for group in groups]
        step = TrainingStep(model, aligner)
        self.average = None if config.train.ema is None else _Average(step, config.train.ema, accelerator.device)
        if config.train.compile:
            model.compile()
        self.module, wrapped = accelerator.prepare(step, torch.optim.AdamW(groups, fused=True))
        # Accelerate's wrapper would ask the device whether a step was skipped; without it, the scaler is ours to call.
        self.optimizer, self.scaler = wrapped.optimizer, accelerator.scaler
        # Batch norm's running statistics are weights that a forward pass changes.
        trained = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
        self.statistics = [buffer for module in trained for buffer in module.buffers()]
        self.statistics_before: list[Tensor] = []
        self.clipped = [part for part in (model, aligner) if any(p.requires_grad for p in part.parameters())]
        self.skipped = torch.zeros((), dtype=torch.bool, device=accelerator.device)

    @property
    def evaluated(self) -> tuple[RISModel, AlignmentLoss]:
        """What is worth evaluating: the averaged weights, where there are any."""
        return (self.model, self.aligner) if self.average is None else self.average.modules

    # ------------------------------------------------------------------------------------------------- one step

    def set_rates(self, factor: float) -> None:
        for group, fixed in zip(self.optimizer.param_groups, self.fixed, strict=True):
            group["lr"] = fixed["lr"] * factor

    def learn(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Forward and backward; with the last batch of an accumulated step also the update, and `gradient_norm`.

        Returns the loss's record. `skipped`, a tensor, then says whether the update was. Collective, and nothing in it
        waits for the device but what the model may do: the BERT of transformers looks at its mask, that of CARIS not.
        """
        if not self.statistics_before:
            self.statistics_before = [buffer.clone() for buffer in self.statistics]
        with self.accelerator.accumulate(self.module):
            with self.accelerator.autocast():  # which Accelerate wraps around DDP's forward pass, but not around FSDP's
                loss, record = self.module(batch, step, self._draw(step))
            self.accelerator.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))
            self.accumulated += 1
            if self.accelerator.sync_gradients:
                self.accumulated = 0
                record = record | {"gradient_norm": self._update()}
        return record

    def _draw(self, step: int) -> int:
        """The number of this rank's batch among all of the run."""
        batch = step * self.accumulate + self.accumulated
        return batch * self.accelerator.num_processes + self.accelerator.process_index

    def _update(self) -> Tensor:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        # Each by itself, or the projection's gradient would shrink the model's, even where nothing is left out.
        norms = [
            sharding.gathered(torch.nn.utils.clip_grad_norm_(part.parameters(), self.clip_norm))
            for part in self.clipped
        ]
        self.skipped = ~torch.stack(norms).isfinite().all()
        self.optimizer.found_inf = self.skipped.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad()
        for buffer, before in zip(self.statistics, self.statistics_before, strict=True):
            buffer.copy_(torch.where(self.skipped, before, buffer))
        self.statistics_before = []
        if self.average is not None:
            self.average.update(self.module, self.skipped)
        return norms[0]

    # -------------------------------------------------------------------------------------------- save and restore

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The files of a checkpoint, with full tensors. Collective."""
        frozen = {name for name, p in self.model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        state = sharding.gathered(self.model.state_dict())
        files = {
            "model": {name: tensor for name, tensor in state.items() if name not in frozen},
            "aligner": sharding.gathered(self.aligner.state_dict()),
        }
        if frozen:
            files[checkpoint.FROZEN] = {name: state[name] for name in sorted(frozen)}
        if self.average is not None:
            model, aligner = (part.state_dict() for part in self.average.modules)
            files["ema"] = {name: tensor for name, tensor in model.items() if name not in frozen}
            files["ema-aligner"] = aligner
        return files

    def optimizer_state(self) -> dict[str, Any]:
        """With full tensors. Collective."""
        return sharding.gathered(self.optimizer.state_dict())

    def load(self, path: Path, optimizer_state: dict[str, Any], scaler_state: dict[str, Any] | None) -> None:
        """From a checkpoint, of any number of ranks. An average that it does not hold starts at its weights.

        Raises CheckpointError where it is of another model, or others of its parameters are trained.
        """
        checkpoint.load_weights(path, averaged=False, model=self.model, aligner=self.aligner)
        if self.average is not None:
            model, aligner = self.average.modules
            checkpoint.load_weights(path, model=model, aligner=aligner)
        try:
            self.optimizer.load_state_dict(sharding.optimizer_state_like(optimizer_state, self.optimizer))
        except (ValueError, IndexError) as error:
            raise CheckpointError(
                f"{path / 'optimizer.pt'} is of a run that trained other parameters ({error}); restore the settings "
                f"that choose them, such as model.freeze_encoders, from {path / 'config.yaml'}"
            ) from error
        for group, fixed in zip(self.optimizer.param_groups, self.fixed, strict=True):
            group.update(fixed)  # the present settings, not those in the checkpoint
        if self.scaler is not None and scaler_state is not None:
            self.scaler.load_state_dict(scaler_state)


class _Average:
    """Exponential moving average of what is trained of model and aligner, which does not move in a skipped step."""

    def __init__(self, step: TrainingStep, decay: float, device: torch.device):
        self.step = copy.deepcopy(step).to(device)  # it starts at the first weights
        self.decay = decay

    @property
    def modules(self) -> tuple[RISModel, AlignmentLoss]:
        return self.step.model, self.step.aligner

    @torch.no_grad()
    def update(self, module: nn.Module, skipped: Tensor) -> None:
        pairs = zip(self.step.parameters(), module.parameters(), strict=True)
        averaged, current = zip(*(pair for pair in pairs if pair[1].requires_grad), strict=True)
        changes = torch._foreach_sub(current, averaged)
        torch._foreach_mul_(changes, (1 - self.decay) * (~skipped).float())
        torch._foreach_add_(averaged, changes)
        for own, buffer in zip(self.step.buffers(), module.buffers(), strict=True):
            own.copy_(buffer)
