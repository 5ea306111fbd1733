"""Whatever a caller gets wrong, a Python exception names the argument, what was given and what is accepted."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FOR_GPUS, coin, here, normal, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

import aml_kernels
from aml_kernels import aml_loss, filter_regions, masked_loss, pixel_text_similarity, sample_quantile

LOSS = {
    "logits": normal(0, 2, 4, 5), "target": coin(1, 2, 8, 10), "similarity": normal(2, 2, 3, 3),
    "valid": coin(3, 2, 8, 10), "map_valid": torch.ones(2, 3, 3, dtype=torch.bool), "quantile": 0.3, "threshold": None,
    "protect_target": True, "bce_weight": 1.0, "dice_weight": 1.0, "class_weight": (0.9, 1.1), "smooth": 1e-5,
    "reduction": "mean",
}
WORDS = {
    "visual": normal(4, 2, 6, 3, 3), "text": normal(5, 2, 4, 6), "text_mask": torch.ones(2, 4, dtype=torch.bool),
    "normalize": True, "scale": 1.0, "softmax": False,
}
CALLS = {
    "sample_quantile": {
        "values": normal(6, 2, 7), "q": 0.5, "valid": torch.ones(2, 7, dtype=torch.bool), "interpolation": "linear",
    },
    "pixel_text_similarity": WORDS,
    "masked_loss": LOSS,
    "aml_loss": {name: x for name, x in LOSS.items() if name != "similarity"} | WORDS,
    "filter_regions": {
        "image": normal(7, 2, 3, 8, 10), "similarity": normal(8, 2, 3, 3), "quantile": 0.3, "threshold": None,
        "drop_ratio": 0.5, "block_size": 4, "protect": coin(9, 2, 8, 10), "fill": 0.0, "seed": 1,
    },
}
TENSORS = [(name, key) for name, call in CALLS.items() for key, x in call.items() if isinstance(x, torch.Tensor)]
OPTIONAL = {"valid", "map_valid", "text_mask", "protect"}  # None is accepted
FREE = {  # sizes that no other argument fixes
    ("target", 1), ("target", 2), ("logits", 1), ("logits", 2), ("similarity", 1), ("similarity", 2), ("values", 1),
    ("visual", 2), ("visual", 3), ("text", 1), ("image", 1), ("image", 2), ("image", 3),
}

BAD = {  # option: values that are not accepted
    "q": (
        -0.1, 1.1, float("nan"), float("inf"), "0.5", None, True, [0.5], torch.tensor(0.5), torch.zeros(3),
        torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64),
    ),
    "quantile": (-0.1, 1.1, float("nan"), float("inf"), "0.5", True, [0.5], torch.tensor([0.5, 0.5])),
    "interpolation": ("cubic", None, 0, "LINEAR"),
    "normalize": (1, None, "yes"), "softmax": (0, None, "no"), "protect_target": (1, None),
    "scale": (float("nan"), float("inf"), "1", None, True, torch.tensor(1.0), np.float32("inf"), np.True_, np.ones(1)),
    "bce_weight": (float("nan"), float("inf"), "1", None, True),
    "dice_weight": (float("nan"), -float("inf"), "1", None),
    "class_weight": (
        (1.0,), (1.0, 2.0, 3.0), 1.0, "ab", (-1.0, 1.0), (1.0, float("nan")), torch.ones(2), (None, 1.0),
    ),
    "smooth": (0.0, -1.0, float("nan"), float("inf"), None, "1"),
    "reduction": ("average", None, 0, "MEAN"),
    "drop_ratio": (-0.1, 1.1, float("nan"), None, "1"),
    "block_size": (0, -1, 2**31, 2**63, 4.0, None, True, "4", np.int64(0), np.float32(4)),
    "seed": (-1, 2**64, 1.0, None, True, "1"),
    "fill": ((1.0, 2.0), float("nan"), "black", None, (1.0, None, 2.0), torch.zeros(2, 2), True),
}
OPTIONS = [(name, key, value) for name, call in CALLS.items() for key in call if key in BAD for value in BAD[key]]


def assert_refused(name, arguments, *named, error=(TypeError, ValueError), given="got"):
    """The call raises, and the message begins with the argument's name and says what is expected and what was given."""
    with pytest.raises(error) as caught:
        getattr(aml_kernels, name)(**here(arguments))
    message = str(caught.value)
    assert re.match(rf"({'|'.join(named)})\b", message), f"{name}: names none of {named}: {message!r}"
    assert "expected" in message and given in message, f"{name}: {message!r}"
    return message


def test_the_calls_are_good(backend):
    for name, arguments in CALLS.items():
        getattr(aml_kernels, name)(**here(arguments), backend=backend)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("real", "whole"), ((np.float16, np.uint8), (np.float32, np.int64), (np.float64, np.int32)))
def test_scalars_of_numpy_are_numbers(backend, name, real, whole):
    """The same bits as with the numbers that they stand for."""

    def scalar(value):
        if isinstance(value, tuple):
            return tuple(map(scalar, value))
        return (whole if isinstance(value, int) else real)(value)

    def meant(value):
        return tuple(map(meant, value)) if isinstance(value, tuple) else value.item()

    options = {key: scalar(x) for key, x in CALLS[name].items() if type(x) in (int, float, tuple)}
    calls = [options]
    if "quantile" in options:
        calls.append({key: x for key, x in options.items() if key != "quantile"} | {"threshold": real(0.3)})
    for call in calls:
        rest = {"quantile": None, "threshold": None} if "quantile" in options else {}
        results = [
            getattr(aml_kernels, name)(**here(CALLS[name] | rest | values), backend=backend)
            for values in (call, {key: meant(x) for key, x in call.items()})
        ]
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in results), strict=True):
            assert same_bits(a, b)


@settings(max_examples=300)
@given(case=st.sampled_from(TENSORS), data=st.data())
def test_wrong_tensors(backend, case, data):
    name, key = case
    device = torch.get_default_device().type
    tensor = CALLS[name][key]
    kind = data.draw(st.sampled_from(("no tensor", "rank", "size", "empty", "dtype", "device")))
    named = [key]
    if kind == "no tensor":
        others = (3, 0.5, "x", [[1.0]], tensor.numpy(), *(() if key in OPTIONAL else (None,)))
        value = data.draw(st.sampled_from(others))
        given = "None" if value is None else type(value).__name__
    elif kind == "rank":
        accepted = {"logits": (3, 4), "values": range(1, 9)}.get(key, (tensor.dim(),))
        accepted = (3, 4) if (name, key) == ("pixel_text_similarity", "visual") else accepted
        dims = data.draw(st.sampled_from([d for d in range(10) if d not in accepted]))
        value = tensor.flatten()[0].expand((2,) * dims)
        given = str(list(value.shape))
    elif kind == "size":
        fixed = [d for d in range(tensor.dim()) if (key, d) not in FREE]
        dim = data.draw(st.sampled_from(fixed))
        value = torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
        given = str(list(value.shape))
        named = list(CALLS[name])  # the other side of the mismatch may be the one that is named
    elif kind == "empty":
        dim = data.draw(st.integers(0, tensor.dim() - 1))
        value = tensor.narrow(dim, 0, 0)
        given = str(list(value.shape))
    elif kind == "dtype":
        wrong = torch.float32 if tensor.dtype == torch.bool and key != "target" else torch.int16
        value = tensor.to(data.draw(st.sampled_from((torch.int64, torch.complex64, torch.int8, wrong))))
        given = str(value.dtype).removeprefix("torch.")
    else:
        value, given, named = tensor.to("meta"), "meta", list(CALLS[name])
    message = assert_refused(name, CALLS[name] | {key: value, "backend": backend}, *named)
    if kind != "size":
        assert given in message or kind == "device" and device in message, f"{given!r} is not in {message!r}"


@pytest.mark.parametrize(("name", "key", "value"), OPTIONS, ids=lambda x: str(x).replace("\n", ""))
def test_wrong_options(backend, name, key, value):
    assert_refused(name, CALLS[name] | {key: value, "backend": backend}, key)


SHAPES = st.lists(st.integers(0, 4), max_size=5)
TYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.uint8, torch.int64))


@settings(max_examples=300)
@given(name=st.sampled_from(sorted(CALLS)), data=st.data())
def test_any_tensors_work_or_are_refused(backend, name, data):
    """Shapes and types at random, near right ones: no third way."""
    arguments = dict(CALLS[name])
    keys = st.sampled_from([key for owner, key in TENSORS if owner == name])
    for key in data.draw(st.sets(keys, min_size=1, max_size=3)):
        shape = data.draw(SHAPES | st.permutations(list(arguments[key].shape)) | st.just(list(arguments[key].shape)))
        dtype = data.draw(TYPES | st.just(arguments[key].dtype))
        arguments[key] = torch.full(shape, data.draw(st.integers(0, 1)), dtype=dtype)
    try:
        result = getattr(aml_kernels, name)(**here(arguments), backend=backend)
    except (TypeError, ValueError) as error:
        assert re.match(r"\w+: expected .*got", str(error)), str(error)
    except RuntimeError as error:  # from within: only for what depends on the numbers
        assert re.search(r"\b(text_mask|target): expected", str(error)), str(error)
    else:
        results = result if isinstance(result, tuple) else (result,)
        assert not any(x.is_floating_point() and x.isinf().any() for x in results)


@pytest.mark.parametrize("name", ("masked_loss", "aml_loss", "filter_regions"))
def test_limits(backend, name):
    call = CALLS[name] | {"backend": backend}
    assert_refused(name, call | {"threshold": 0.5}, "quantile, threshold")
    assert_refused(name, call | {"threshold": torch.zeros(2)}, "quantile, threshold")
    call["quantile"] = None
    wrong = torch.zeros(3), torch.zeros(2, 1), torch.tensor(0.5), torch.zeros(2, dtype=torch.int64)
    for bad in (float("nan"), "0.5", True, *wrong):
        assert_refused(name, call | {"threshold": bad}, "threshold")
    if name == "filter_regions":
        assert_refused(name, call, "quantile, threshold")


def test_a_limit_needs_a_map(backend):
    call = LOSS | {"similarity": None, "map_valid": None, "backend": backend}
    for limit in ({"quantile": 0.5}, {"quantile": None, "threshold": 0.5}):
        assert_refused("masked_loss", call | limit, "similarity")


def test_two_channels_are_told_how_to_fold(backend):
    message = assert_refused("masked_loss", LOSS | {"logits": normal(0, 2, 2, 4, 5), "backend": backend}, "logits")
    assert "logits[:, 1] - logits[:, 0]" in message


@pytest.mark.parametrize("name", ("pixel_text_similarity", "aml_loss"))
def test_a_sample_without_a_word(backend, name):
    mask = torch.tensor([[True] * 4, [False] * 4])
    call = CALLS[name] | {"text_mask": mask, "backend": backend}
    if backend in FOR_GPUS:  # looking would stall the device
        result = getattr(aml_kernels, name)(**here(call | ({"return_stats": True} if name == "aml_loss" else {})))
        similarity = result[1].similarity if name == "aml_loss" else result
        assert similarity[0].any() and not similarity[1].any()
        return
    message = assert_refused(name, call, "text_mask", error=(ValueError, RuntimeError))
    assert "1" in message  # which sample


@pytest.mark.parametrize("columns", (10, 12), ids=("odd", "words"))  # four labels to a word
@pytest.mark.parametrize("resized", (False, True), ids=("same", "resized"))
@pytest.mark.parametrize("name", ("masked_loss", "aml_loss"))
@pytest.mark.parametrize("value", (2, 255, 1.25, -0.5, float("nan"), float("inf")), ids=str)
def test_a_kept_target_outside_its_range(backend, name, resized, columns, value):
    """An index mask, 0 to 255 or NaN is no target. What is left out may be: see test_masking."""
    target = torch.zeros(2, 8, columns, dtype=torch.uint8 if isinstance(value, int) else torch.float32)
    target[1, 3, 4] = value
    logits = normal(0, 2, 4, 5) if resized else normal(0, 2, 8, columns)
    call = CALLS[name] | {"logits": logits, "target": target, "quantile": None, "backend": backend}
    call["valid"] = torch.ones(2, 8, columns, dtype=torch.bool)
    if backend in FOR_GPUS:  # looking would stall the device
        assert getattr(aml_kernels, name)(**here(call | {"reduction": "none"})).isnan().tolist() == [False, True]
    else:
        assert_refused(name, call, "target", error=(ValueError, RuntimeError), given="sample 1")
    call["valid"][1, 3, 4] = False
    assert getattr(aml_kernels, name)(**here(call)).isfinite()


def test_gradients_that_do_not_exist(backend):
    soft = coin(1, 2, 8, 10).float().requires_grad_()
    for name in ("masked_loss", "aml_loss"):
        assert_refused(name, CALLS[name] | {"target": soft, "backend": backend}, "target", given="target.detach()")
        with torch.no_grad():
            getattr(aml_kernels, name)(**here(CALLS[name] | {"target": soft, "backend": backend}))
    image = normal(7, 2, 3, 8, 10).requires_grad_()
    call = CALLS["filter_regions"] | {"image": image, "backend": backend}
    assert_refused("filter_regions", call, "image", given="image.detach()")


def test_unknown_arguments_are_refused():
    for function in (aml_loss, filter_regions, masked_loss, pixel_text_similarity, sample_quantile):
        with pytest.raises(TypeError, match="quantil"):
            function(**CALLS[function.__name__], quantil=0.5)


# The operators themselves are callable too, without the checks in Python: an exception, not the end of the process.
RAW = """
import torch, aml_kernels
z, y, s = torch.randn(2, 4, 5), torch.zeros(2, 8, 10, dtype=torch.uint8), torch.randn(2, 3, 3)
v, u = torch.randn(2, 6, 3, 3), torch.randn(2, 4, 6)
rest = (None, None, 0.3, True, False, 1.0, 1.0, 1.0, 1.0, 1e-5, 0)
ops = torch.ops.aml_kernels
calls = [
    lambda: ops.masked_loss(z[:1], y, s, None, None, *rest), lambda: ops.masked_loss(z, y, s[:1], None, None, *rest),
    lambda: ops.masked_loss(z, y, None, None, None, *rest), lambda: ops.masked_loss(z[0], y, s, None, None, *rest),
    lambda: ops.masked_loss(z, y, s, y[:1].bool(), None, *rest),
    lambda: ops.masked_loss(z, y.long(), s, None, None, *rest),
    lambda: ops.masked_loss(z, y, s, None, s[:, :2] > 0, *rest),
    lambda: ops.masked_loss(z.long(), y, s, None, None, *rest),
    lambda: ops.masked_loss(z, y, s, None, None, torch.zeros(1), None, None, *rest[3:]),
    lambda: ops.pixel_text_similarity(v, u[:, :, :5], None, True, 1.0, False),
    lambda: ops.pixel_text_similarity(v, u[:1], None, True, 1.0, False),
    lambda: ops.pixel_text_similarity(v, u, torch.ones(2, 3).bool(), True, 1.0, False),
    lambda: ops.pixel_text_similarity(v[0], u, None, True, 1.0, False),
    lambda: ops.sample_quantile(s, 0.5, None, s[:1] > 0, 0, True),
    lambda: ops.sample_quantile(s, 0.5, None, s.reshape(1, 18) > 0, 0, True),
    lambda: ops.sample_quantile(s, 0.5, torch.zeros(1), None, 0, True),
    lambda: ops.sample_quantile(s.long(), 0.5, None, None, 0, True),
    lambda: ops.filter_regions(torch.zeros(2, 3, 8, 10), s[:1], None, None, None, 0.5, True, 0.5, 4, [0.0] * 3, 1),
    lambda: ops.filter_regions(torch.zeros(2, 3, 8, 10), s, None, None, None, 0.5, True, 0.5, 4, [0.0], 1),
    lambda: ops.filter_regions(torch.zeros(2, 3, 8, 10), s, None, None, None, 0.5, True, 0.5, 0, [0.0] * 3, 1),
]
for index, call in enumerate(calls):
    try:
        call()
    except (RuntimeError, ValueError, TypeError):
        print(index, flush=True)
    else:
        print("accepted", index, flush=True)
"""


def test_operators_called_without_the_public_functions(cpu):
    run = subprocess.run(
        [sys.executable, "-c", RAW], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300,
    )
    assert run.returncode == 0, f"died with {run.returncode} after\n{run.stdout}{run.stderr}"
    assert run.stdout.splitlines() == [str(i) for i in range(RAW.count("lambda:"))]
