"""Recorded once, replayed on other numbers: CUDA graphs, by hand and by torch.compile(mode="reduce-overhead")."""

import pytest
import steps
import torch
from helpers import same_bits
from torch._dynamo.utils import counters


def test_a_captured_step_replays_on_new_numbers(backend):
    """Capture fails on any synchronisation of the host; bits differ if anything depended on the first numbers."""
    inputs = steps.arguments(seed=0)
    for name in steps.LEAVES:
        inputs[name].requires_grad_()
    leaves = [inputs[name] for name in steps.LEAVES]

    def run():
        outputs = steps.step(backend, inputs)
        return *outputs, *torch.autograd.grad(outputs[0], leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and allocates what a first call compiles and allocates
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (0, 100, 200):
        new = steps.arguments(seed)
        with torch.no_grad():
            for name, tensor in inputs.items():
                tensor.copy_(new[name])
        graph.replay()
        torch.cuda.synchronize()
        for actual, expected in zip(captured, steps.results(lambda x: steps.step(backend, x), new), strict=True):
            assert same_bits(actual, expected)


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compiled_with_reduced_overhead(backend, dynamic):
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(
        lambda x: steps.step(backend, x), fullgraph=True, mode="reduce-overhead", dynamic=dynamic,
    )
    for seed in range(4):  # the first calls warm up and record
        torch.compiler.cudagraph_mark_step_begin()
        inputs = steps.arguments(seed)
        actual = [x.clone() for x in steps.results(compiled, inputs)]
        expected = steps.results(lambda x: steps.step(backend, x), inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    assert not counters["inductor"]["cudagraph_skips"]
