"""Worker processes that read ahead end with the process that they read for, even by kill -9."""

import contextlib
import itertools
import multiprocessing
import os
import resource
import signal
import time

import pytest
import tiny
import torch.utils.data._utils.worker

from aml.data.dataset import full_targets
from aml.data.loading import read_batches


def read_until_killed(method, sending):
    """Reads with workers made by this start method, and tells that they work."""
    os.setsid()
    multiprocessing.set_start_method(method, force=True)
    torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 600  # or PyTorch's own look might end forked ones
    batches = read_batches([{"index": 0}], itertools.repeat([0]), 2, "cpu")
    assert next(batches)["index"].tolist() == [0]
    assert len(multiprocessing.active_children()) == 2
    sending.send("reading")
    time.sleep(600)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_with_a_process_that_is_killed(method):
    receiving, sending = multiprocessing.Pipe(duplex=False)
    process = tiny.start(read_until_killed, method, sending)
    assert receiving.poll(60)
    process.kill()
    process.join()
    left = tiny.left_of(process.pid)
    if left:
        os.killpg(process.pid, signal.SIGKILL)
    assert not left


class Masks(torch.utils.data.Dataset):
    """Small samples of an evaluation set, the first of which is late, so that batches of other workers wait."""

    def __getitem__(self, index):
        if index == 0:
            time.sleep(2)
        mask = torch.full((2 + index % 3, 4), index % 251, dtype=torch.uint8)
        return {"image": torch.zeros(3, 2, 2), "index": index, "sample_id": str(index), "full_target": mask}


def read_with_few_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    batches = [range(first, first + 100) for first in range(0, 1600, 100)]
    with contextlib.closing(read_batches(Masks(), batches, 4, "cpu")) as read:
        for keys, batch in zip(batches, read, strict=True):
            masks = full_targets(batch)
            assert [int(mask[0, 0]) for mask in masks] == [key % 251 for key in keys]


def test_a_batch_takes_few_files_however_large_it_is():
    """Each tensor from a worker takes one, of which a process may often have no more than 1024."""
    process = tiny.start(read_with_few_files)
    process.join(120)
    code = process.exitcode
    process.kill()
    assert code == 0
