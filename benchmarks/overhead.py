"""What a call costs apart from its work: operators on one 8 x 8 image, in microseconds."""

import importlib
import time
from collections.abc import Callable

import cases
import measure
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: operator: the module that defines it, the operator of its derivative
DEFINED = {
    "pixel_text_similarity": ("similarity", "pixel_text_similarity_backward"),
    "masked_loss": ("masked_loss", "masked_loss_backward"), "aml_loss": ("aml_loss", "masked_loss_backward"),
}


def host_overhead(device: str, backend: str, *, calls: int, rounds: int) -> list[dict]:
    """One row per operator, pass and way to call it:

    fused        the public function, argument checks included
    torch.ops    the registered operator: PyTorch's dispatcher and its wrapper for derivatives written in Python
    custom_op    `torch.library.custom_op` with the same schema and derivative around the same kernel
    eager        the definition in plain PyTorch, for scale
    """
    at = {"dtype": torch.float32, "device": device}
    tiny = [
        cases.similarity(1, 8, 8, 8, **at), cases.masked_loss(1, 8, 8, 8, **at), cases.aml_loss(1, 8, 8, 8, 8, **at),
    ]

    def sample(call: measure.Call) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    rows = []
    for workload in tiny:
        fused = workload.fused(backend)
        op, arguments = recorded(fused, workload.inputs)
        ways = {
            "fused": (fused, workload.inputs), "torch.ops": (as_provider(op), arguments),
            "custom_op": (as_provider(python_custom_op(workload.op, op)), arguments),
            "eager": (workload.eager, workload.inputs),
        }
        for name in workload.passes:
            timed = {way: workload.call(provider, name, inputs) for way, (provider, inputs) in ways.items()}
            samples = measure.alternate(timed, sample, seconds=0, least=rounds)
            for way, seconds in samples.items():
                p20, p50, p80 = (1e6 * s for s in measure.percentiles(seconds))
                rows.append({
                    "op": workload.op, "pass": name, "call": way, "p20_us": p20, "p50_us": p50, "p80_us": p80,
                    "samples": rounds, "calls_per_sample": calls,
                })
    return rows


def recorded(provider: cases.Provider, inputs: tuple[Tensor, ...]) -> tuple[torch._ops.OpOverload, tuple]:
    """The registered operator behind a public function, and what the function passes to it."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "aml_kernels":
                seen.append((op, args))
            return op(*args, **(kwargs or {}))

    seen: list[tuple] = []
    with Recorder():
        provider(*inputs)
    return seen[0]


def as_provider(op: Callable) -> cases.Provider:
    def provider(*arguments):
        output = op(*arguments)
        return output if isinstance(output, tuple) else (output,)

    return provider


def python_custom_op(name: str, op: torch._ops.OpOverload) -> Callable:
    """The same operator in the way of PyTorch's tutorial for custom operators in Python."""
    module, derivative = DEFINED[name]
    store = importlib.import_module(f"aml_kernels.{module}")._setup
    variant = op.name().partition("::")[2].removeprefix(name)  # "" or "_triton"
    differentiate = getattr(torch.ops.aml_kernels, derivative + variant)

    def setup(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.arguments = len(inputs)
        tensors, ctx.options = store(inputs, output)
        ctx.save_for_backward(*tensors)

    def backward(ctx, grad, *_):
        gradients = differentiate(grad, *ctx.saved_tensors, *ctx.options)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        return (*gradients, *(None,) * (ctx.arguments - len(gradients)))

    schema = str(op._schema)
    custom = torch.library.custom_op(
        f"aml_benchmark::{name}", lambda *arguments: op(*arguments), mutates_args=(), schema=schema[schema.index("("):],
    )
    custom.register_autograd(backward, setup_context=setup)
    return custom
