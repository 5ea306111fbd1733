"""Small runs of training, and what it means that two of them are the same."""

import torch

from aml import checkpoint
from aml.runlog import read_log


def lines(run) -> list[dict]:
    """The log without its timings."""
    return [{k: v for k, v in line.items() if k != "speed"} for line in read_log(run / "metrics.jsonl")]


def assert_same_run(run, expected) -> None:
    """In log, weights, averages, optimizer, generators, loss scale and progress, to the bit."""
    assert lines(run) == lines(expected)
    for name in ("best", "last"):
        a, b = (checkpoint.resolve(folder / "checkpoints" / name) for folder in (run, expected))
        assert a.name == b.name
        weights = sorted(file.name for file in a.glob("*.safetensors"))
        assert weights == sorted(file.name for file in b.glob("*.safetensors"))
        for file in weights:
            assert (a / file).read_bytes() == (b / file).read_bytes(), file
        first, second = checkpoint.read(a), checkpoint.read(b)
        assert first.state == second.state
        assert_equal(first.optimizer, second.optimizer)
        assert_equal(first.ranks, second.ranks)


def assert_equal(a, b) -> None:
    """Nested containers of tensors."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b
