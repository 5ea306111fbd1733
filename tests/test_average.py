"""The average of the weights: what is trained moves, what is frozen is not touched."""

import torch
from torch import nn

from aml.learner import TrainingStep, _Average


def test_only_what_is_trained_moves():
    model, aligner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Linear(2, 1)
    model[0].requires_grad_(False)
    model[0].weight.data[0, 0] = -torch.inf
    step = TrainingStep(model, aligner)
    average = _Average(step, 0.75, torch.device("cpu"))
    averaged, own = average.modules
    before = averaged[0].weight.clone(), averaged[1].weight.clone(), own.weight.clone()
    with torch.no_grad():
        for parameter in (model[1].weight, aligner.weight):
            parameter += 4
        model[1].running_mean += 3
    for skipped, moved in ((True, 0), (False, 1)):
        average.update(step, torch.tensor(skipped))
        assert torch.equal(averaged[0].weight, before[0]) and averaged[0].weight._version == 0
        torch.testing.assert_close(averaged[1].weight, before[1] + moved)
        torch.testing.assert_close(own.weight, before[2] + moved)
        assert torch.equal(averaged[1].running_mean, model[1].running_mean)
