"""How an operator gets its schema, fake kernel and derivative, and how eager calls avoid most of the dispatch cost.

The schema lives here so that it exists, and can be traced, whether or not the extension was built. Each operator has
two names: `<name>`, which PyTorch dispatches by device to the extension's kernels, or on a GPU that these were not
built for to Triton's; and `<name>_triton`, for where Triton was asked for and is not what `<name>` runs.

A traced call (`torch.compile`, `torch.export`, functional transforms) goes through the operator. An eager call goes
through a `torch.autograd.Function` around the same kernels and the same derivative: PyTorch's own wrapper for
derivatives registered in Python costs several times as much.
"""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _backend

LIBRARY = torch.library.Library("aml_kernels", "DEF")

# What is_traced asks, found once: looking it up takes half the time of asking.
_is_compiling = torch.compiler.is_compiling
_transforms = torch._C._functorch.peek_interpreter_stack
_modes = torch.utils._python_dispatch._len_torch_dispatch_stack
_PLAIN = (Tensor, torch.nn.Parameter)


class Operator:
    """An operator under its two names, with what it returns for tensors without data.

    Its Triton launcher is the function of the same name in `aml_kernels.triton.<module of fake>`, imported by the
    first call that needs it.
    """

    def __init__(self, schema: str, fake: Callable) -> None:
        name, parenthesis, rest = schema.partition("(")
        module = f"{__package__}.triton.{fake.__module__.rpartition('.')[2]}"
        self._load = functools.cache(lambda: getattr(importlib.import_module(module), name))
        for variant in (name, f"{name}_triton"):
            LIBRARY.define(variant + parenthesis + rest, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"aml_kernels::{variant}", fake, lib=LIBRARY)
        LIBRARY.impl(f"{name}_triton", self.launch, "CUDA")
        if _backend.INTERPRETED:
            LIBRARY.impl(f"{name}_triton", self.launch, "CPU")
        if _backend.CUDA_MISSING is not None:
            LIBRARY.impl(name, self.launch, "CUDA")
        self.default = getattr(torch.ops.aml_kernels, name).default
        self.triton = getattr(torch.ops.aml_kernels, f"{name}_triton").default
        types = [str(argument.type) for argument in self.default._schema.arguments]
        self._floats = [i for i, kind in enumerate(types) if kind in ("float", "Optional[float]")]

    def launch(self, *arguments):
        """Triton's kernels, without the dispatcher.

        As by the dispatcher, a whole number given for a float becomes one: Triton would compile another program for it.
        """
        converted = list(arguments)
        for i in self._floats:
            if type(converted[i]) is int:
                converted[i] = float(converted[i])
        return self._load()(*converted)

    def variant(self, backend: str, device_type: str) -> torch._ops.OpOverload:
        """The operator that runs `backend` for tensors of `device_type`."""
        return self.triton if backend == "triton" != _backend.default(device_type) else self.default

    def __call__(self, backend: str, *arguments):
        """Run it without a derivative. The first argument is a tensor."""
        if is_traced(arguments[0]):  # PyTorch lets the results require grad if an argument does
            constants = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
            return self.variant(backend, arguments[0].device.type)(*constants)
        with torch._C._AutoDispatchBelowAutograd():
            return (self.launch if backend == "triton" else self.default)(*arguments)


def differentiable(forward: Operator, backward: Operator, inputs: int, setup: Callable) -> Callable:
    """`forward` with its derivative, as a function of a back end and the operator's arguments.

    inputs: how many leading arguments are tensors that may require grad.
    setup(arguments, outputs) returns the tensors and the options of the derivative, which is
    backward(grad, *tensors, *options) -> the gradients of the leading arguments. Only the first output has a gradient.
    """
    default = _eager(forward.default, forward.default, backward.default, backward.default, inputs, setup)
    triton = _eager(forward.triton, forward.launch, backward.triton, backward.launch, inputs, setup)

    def call(backend: str, *arguments):
        if not _is_compiling() and forward_ad._current_level >= 0:
            refuse_tangents(forward.default, arguments[:inputs])
        if is_traced(*arguments[:inputs]):
            return forward.variant(backend, arguments[0].device.type)(*arguments)
        if torch.is_grad_enabled() and any(x.requires_grad for x in arguments[:inputs]):
            return (triton if backend == "triton" else default).apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return (forward.launch if backend == "triton" else forward.default)(*arguments)

    return call


def _eager(
    op: torch._ops.OpOverload, run: Callable, backward_op: torch._ops.OpOverload, run_backward: Callable, inputs: int,
    setup: Callable,
) -> type[torch.autograd.Function]:
    """Give `op` its derivative; return the same as a Function that calls `run` and `run_backward`."""

    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*_tuple(output)[1:])
        ctx.set_materialize_grads(False)
        ctx.arguments = len(inputs)
        tensors, ctx.options = setup(inputs, output)
        ctx.save_for_backward(*tensors)

    def backward(ctx, differentiate, saved, grad):
        given = (None,) * inputs if grad is None else _tuple(differentiate(grad, *saved, *ctx.options))
        return (*given, *(None,) * (ctx.arguments - inputs))

    def traced_backward(ctx, grad, *_):
        return backward(ctx, backward_op, ctx.saved_tensors, grad)

    torch.library.register_autograd(op, traced_backward, setup_context=setup_context, lib=LIBRARY)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            with torch._C._AutoDispatchBelowAutograd():
                output = run(*arguments)
            setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx, grad, *_):
            saved = ctx.saved_tensors  # under checkpointing this runs the forward again, with autograd
            if torch.is_grad_enabled():  # create_graph=True: recorded, so that a second derivative is refused
                return backward(ctx, backward_op, saved, grad)
            with torch._C._AutoDispatchBelowAutograd():
                return backward(ctx, run_backward, saved, grad)

    Eager.__name__ = Eager.__qualname__ = str(op)
    return Eager


def once_only(operator: Operator) -> None:
    """Make a second derivative through the backward `operator` an error instead of a silent zero."""
    for op in (operator.default, operator.triton):

        def backward(ctx, *grads, op=op):
            raise RuntimeError(f"{op}: aml_kernels operators can be differentiated once only")

        torch.library.register_autograd(op, backward, lib=LIBRARY)


def refuse_tangents(op: torch._ops.OpOverload, tensors: tuple[Tensor, ...]) -> None:
    """PyTorch would take the derivative forward (`jvp`) of an operator that has none for 0."""
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(f"{op}: has a derivative for the backward pass only, none for forward mode (jvp)")


def is_traced(*tensors: Tensor) -> bool:
    """Whether the call is recorded or transformed, so that it has to be seen by the dispatcher."""
    if _is_compiling() or _transforms() is not None or _modes() > 0:
        return True
    for x in tensors:
        if type(x) not in _PLAIN:
            return True
    return False


def _tuple(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)
