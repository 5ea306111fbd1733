"""Where and when kernels run: no host synchronisation, the current stream, the tensors' own device; and all of them."""

import re

import every_kernel
import kernel_names
import pytest
import steps
import torch
from helpers import same_bits
from torch.profiler import ProfilerActivity, profile

CYCLES = 100_000_000  # some 50 ms


def run(backend, inputs):
    return steps.results(lambda x: steps.step(backend, x), inputs)


def test_the_host_never_waits(backend):
    inputs = steps.arguments()
    run(backend, inputs)  # compiled by now
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(backend, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_host_is_done_before_the_device(backend):
    """While the device is busy with something else: also a synchronisation that PyTorch does not see would wait."""
    inputs = steps.arguments()
    run(backend, inputs)
    torch.cuda.synchronize()
    torch.cuda._sleep(20 * CYCLES)
    run(backend, inputs)
    busy = not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert busy


def test_kernels_follow_the_current_stream(backend):
    """Numbers that arrive late in a side stream: a kernel in any other stream reads those from before."""
    inputs, new = steps.arguments(seed=0), steps.arguments(seed=100)
    run(backend, inputs)
    expected = run(backend, new)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        for name, tensor in inputs.items():
            tensor.copy_(new[name])
        actual = run(backend, inputs)
    side.synchronize()
    for a, b in zip(actual, expected, strict=True):
        assert same_bits(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_kernels_run_on_the_device_of_their_tensors(backend):
    inputs = steps.arguments()
    expected = run(backend, inputs)
    assert torch.cuda.current_device() == 0
    actual = run(backend, {name: tensor.to("cuda:1") for name, tensor in inputs.items()})
    assert torch.cuda.current_device() == 0
    for a, b in zip(actual, expected, strict=True):
        assert a.device == torch.device("cuda:1") and same_bits(a.to("cuda:0"), b)


def test_run_to_run(backend):
    inputs = steps.arguments(size=(240, 320), map=(30, 40), dtype=torch.bfloat16)
    expected = run(backend, inputs)
    for _ in range(20):
        for a, b in zip(run(backend, inputs), expected, strict=True):
            assert same_bits(a, b)


def test_the_script_for_the_sanitizer_runs_every_kernel(backend):
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        with torch.device("cpu"):
            every_kernel.run(backend)
    launched = {event.name for event in record.events()}
    expected = kernel_names.of_cuda() if backend == "cuda" else {name for _, name in kernel_names.of_triton()}
    assert not {name for name in expected if not any(re.search(rf"\b{name}\b", event) for event in launched)}
