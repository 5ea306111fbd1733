"""Worker processes that read ahead end with the process that they read for, even by kill -9."""

import itertools
import multiprocessing
import os
import signal
import time

import pytest
import tiny
import torch.utils.data._utils.worker

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
