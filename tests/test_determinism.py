"""The C++ back end gives the same bits: run to run, in any process, at 1, 2 and 4 threads, at any address."""

import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import LAYOUTS, bits, coin, laid_out, loss_inputs, normal

from aml_kernels import aml_loss, filter_regions, masked_loss, pixel_text_similarity, sample_quantile


def everything(layout="contiguous", dtype=torch.float32):
    """Every operator with its gradients, on inputs large enough to be shared among threads."""
    inputs = {name: laid_out(x, layout) for name, x in
              loss_inputs(batch=2, logits=(150, 170), target=(300, 310), map=(14, 14), dtype=dtype).items()}
    features = normal(7, 2, 96, 30, 31, dtype=dtype), normal(8, 2, 9, 96, dtype=dtype)
    visual, text = (laid_out(x, layout) for x in features)
    mask = laid_out(coin(9, 2, 9) | (torch.arange(9) == 3), layout)
    options = {"quantile": 0.3, "class_weight": (0.9, 1.1), "return_stats": True, "reduction": "none", "backend": "cpu"}
    results = []

    def differentiate(function, *leaves):
        leaves = [x.detach().requires_grad_() for x in leaves]
        output = function(*leaves)
        outputs = output if isinstance(output, tuple) else (output,)
        outputs[0].sum().backward()
        flat = [value for x in outputs for value in (x if isinstance(x, tuple) else (x,))]
        results.extend([x.detach() for x in flat] + [leaf.grad for leaf in leaves])

    others = {name: x for name, x in inputs.items() if name != "logits"}
    differentiate(lambda z: masked_loss(z, **others, **options), inputs["logits"])
    same = others | {"target": others["target"][:, :150, :170], "valid": others["valid"][:, :150, :170]}
    differentiate(lambda z: masked_loss(z, **same, **options), inputs["logits"])
    for softmax in (False, True):
        similarity = functools.partial(pixel_text_similarity, softmax=softmax, scale=5.0, backend="cpu")
        differentiate(lambda v, t, f=similarity: f(v, t, mask), visual, text)
    rest = {name: others[name] for name in ("target", "valid")}
    differentiate(lambda z: aml_loss(z, visual=visual, text=text, text_mask=mask, **rest, **options), inputs["logits"])
    results.append(sample_quantile(inputs["logits"], 0.3, backend="cpu"))
    results.append(sample_quantile(inputs["logits"], 0.7, valid=same["valid"], backend="cpu"))
    image = laid_out(normal(3, 2, 3, 120, 130, dtype=dtype), layout)
    results.extend(filter_regions(image, inputs["similarity"], quantile=0.5, block_size=8, seed=5, backend="cpu"))
    return results


def assert_same(results, expected, what):
    for index, (a, b) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(bits(a), bits(b)), f"{what}: result {index} of everything() differs"


def test_run_to_run_and_thread_counts(cpu, threads):
    threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        expected = everything(dtype=dtype)
        for count in (1, 2, 4, 1, 4):
            threads(count)
            assert_same(everything(dtype=dtype), expected, f"{count} threads, {dtype}")
        threads(1)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(cpu, layout):
    assert_same(everything(layout), everything(), layout)


def test_addresses(cpu):
    """Where a row begins in memory changes where a vector loop begins, and must not change a sum."""
    results = []
    for offset in range(4):
        memory = torch.empty(37 * 41 + 4)
        logits = memory[offset : offset + 37 * 41].view(1, 37, 41).copy_(normal(0, 1, 37, 41)).requires_grad_()
        loss = masked_loss(logits, coin(1, 1, 37, 41), backend=cpu)
        loss.backward()
        results.append((loss.detach(), logits.grad))
    for result in results[1:]:
        assert_same(result, results[0], "address")


DIGEST = """
import sys
sys.path[:0] = {path!r}
import hashlib
import test_determinism
print(test_determinism.digest())
"""


def digest():
    return hashlib.sha256(b"".join(bits(x).numpy().tobytes() for x in everything())).hexdigest()


def test_processes(cpu):
    here = Path(__file__).parent
    script, found = DIGEST.format(path=[str(here), str(here.parent)]), {digest()}
    for count in ("1", "3"):
        environment = os.environ | {"OMP_NUM_THREADS": count}
        run = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300,
        )
        assert run.returncode == 0, run.stderr
        found.add(run.stdout.strip())
    assert len(found) == 1


def test_plain_pytorch_run_to_run(conditions):
    inputs = loss_inputs(logits=(20, 20), target=(80, 80))
    first, second = (masked_loss(**inputs, quantile=0.3, return_stats=True, backend="reference") for _ in range(2))
    assert_same((first[0], *first[1]), (second[0], *second[1]), "reference")
