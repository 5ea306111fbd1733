"""How an operator gets its schema, fake kernel and derivative, and how eager calls avoid most of the dispatch cost.

The schema lives here so that it exists, and can be traced, whether or not the extension was built; the extension
registers its kernels under it. A traced call (`torch.compile`, `torch.export`, functional transforms) goes through
the operator. An eager call goes through a `torch.autograd.Function` around the same kernels and the same derivative:
PyTorch's own wrapper for derivatives registered in Python costs several times as much.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LIBRARY = torch.library.Library("aml_kernels", "DEF")


def define(schema: str, fake: Callable) -> torch._ops.OpOverload:
    """Define an operator by its schema and by what it returns for tensors without data."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"aml_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.aml_kernels, name).default


def differentiable(
    op: torch._ops.OpOverload, inputs: int, setup: Callable, gradients: Callable,
) -> Callable:
    """`op` with a derivative, as a function of the same arguments.

    inputs: how many leading arguments are tensors that may require grad.
    setup(ctx, arguments, outputs) stores what the derivative needs; gradients(ctx, saved, grad) returns the gradients
    of the leading `inputs` arguments from the saved tensors. Only the first output has a gradient.
    """

    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*_outputs(output)[1:])
        ctx.set_materialize_grads(False)
        ctx.arguments = len(inputs)
        setup(ctx, inputs, output)

    def backward(ctx, saved, grad):
        given = (None,) * inputs if grad is None else gradients(ctx, saved, grad)
        return (*given, *(None,) * (ctx.arguments - inputs))

    def traced_backward(ctx, grad, *_):
        return backward(ctx, ctx.saved_tensors, grad)

    torch.library.register_autograd(op, traced_backward, setup_context=setup_context, lib=LIBRARY)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*arguments)
            setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx, grad, *_):
            saved = ctx.saved_tensors  # under checkpointing this runs the forward again, with autograd
            if torch.is_grad_enabled():  # create_graph=True: recorded, so that a second derivative is refused
                return backward(ctx, saved, grad)
            with torch._C._AutoDispatchBelowAutograd():
                return backward(ctx, saved, grad)

    Eager.__name__ = Eager.__qualname__ = str(op)

    def call(*arguments):
        if is_traced(*arguments[:inputs]):
            return op(*arguments)
        if torch.is_grad_enabled() and any(x.requires_grad for x in arguments[:inputs]):
            return Eager.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    return call


def once_only(op: torch._ops.OpOverload) -> None:
    """Make a second derivative through the backward operator `op` an error instead of a silent zero."""

    def backward(ctx, *grads):
        raise RuntimeError(f"{op}: aml_kernels operators can be differentiated once only")

    torch.library.register_autograd(op, backward, lib=LIBRARY)


def is_traced(*tensors: Tensor) -> bool:
    """Whether the call is recorded or transformed, so that it has to be seen by the dispatcher."""
    return (
        torch.compiler.is_compiling()
        or any(type(x) is not Tensor and type(x) is not torch.nn.Parameter for x in tensors)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.utils._python_dispatch._len_torch_dispatch_stack() > 0
    )


def _outputs(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)
