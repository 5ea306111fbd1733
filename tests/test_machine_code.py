"""The machine code of the CUDA kernels, per architecture: no spills, no fp64, wide loads, as many blocks as claimed."""

import re
import shutil

import kernel_names
import machine_code
import pytest

ROOT = machine_code.ROOT

#: Fewest 128-bit loads and stores of a kernel: one for each that its source issues at once for what it streams.
STREAMING = {
    r"aml_loss_forward<\w+, Direct<\w+, \w+>>": (5 + 2, 0),  # features, and rows of packed logits
    r"aml_loss_forward<\w+, (Resized|General)>": (5, 0),
    r"masked_loss_forward<Direct<\w+, \w+>, .*>": (2, 0),
    r"masked_loss_backward_pixels<Direct<\w+, \w+>>": (2, 1),
    r"similarity_(forward|coefficients)<\w+>": (5, 0),  # two packs of cells and one more, two packs of channels
    r"similarity_gradients<float, \w+>": (8, 4),
    r"similarity_gradients<(bf16|f16), \w+>": (4, 0),  # four gradients of 16 bits are a store of 64
    r"quantile_by_(block|team)<\w+>": (2, 0),
    r"filter_image_regions": (4, 4),  # elements of 1, 2, 4 and 8 bytes
}
#: Any strides, any size: read by one element, or four labels, through the cache.
ELEMENTWISE = r"masked_loss_(forward<(Resized|General), \w+>|backward_pixels<General>|backward_gather<\w+>)"

pytestmark = pytest.mark.skipif(machine_code.missing() is not None, reason=str(machine_code.missing()))


@pytest.fixture(scope="module", params=machine_code.ARCHITECTURES)
def kernels(request):
    return [kernel for kernel in machine_code.kernels() if kernel.architecture == request.param]


def test_every_kernel_is_there(kernels):
    assert {kernel.name.partition("<")[0] for kernel in kernels} == kernel_names.of_cuda()


def test_registers_are_never_spilled(kernels):
    spilled = {kernel.name: kernel.stack for kernel in kernels if kernel.stack or kernel.local_accesses}
    assert not spilled, f"bytes of local memory: {spilled}"


def test_nothing_is_computed_in_fp64(kernels):
    doubles = {kernel.name: kernel.double_instructions for kernel in kernels if kernel.double_instructions}
    assert not doubles, f"instructions: {doubles}"


def test_atomics_are_of_integers_and_histograms_count_equal_bins_at_once(kernels):
    for kernel in kernels:
        atomics = {opcode for opcode in kernel.opcodes if re.match(r"(ATOM|RED)[A-Z]*\.", opcode)}
        assert not any(re.search(r"\.F(16|32|64)|BF16", opcode) for opcode in atomics), f"{kernel.name}: {atomics}"
        if re.match(r"quantile|filter|aml_loss_forward|masked_loss_forward", kernel.name):
            assert kernel.count(r"ATOMS\.POPC\.INC\.32") > 0, f"{kernel.name}: {atomics}"


def test_as_many_blocks_run_at_once_as_claimed(kernels):
    for kernel in kernels:
        limits = f"{kernel.registers} registers, {kernel.shared} bytes of shared memory, {kernel.threads} threads"
        assert kernel.blocks >= kernel.claimed_blocks > 0, f"{kernel.name}: {limits} let {kernel.blocks} blocks run"


def test_inputs_are_streamed_in_128_bits(kernels):
    for kernel in kernels:
        if re.fullmatch(ELEMENTWISE, kernel.name):
            continue
        loads, stores = next(fewest for name, fewest in STREAMING.items() if re.fullmatch(name, kernel.name))
        seen = f"{kernel.name}: {kernel.wide_loads} loads and {kernel.wide_stores} stores of 128 bits"
        assert kernel.wide_loads >= loads and kernel.wide_stores >= stores, f"{seen}, expected {loads} and {stores}"


def test_features_are_copied_in_128_bits_wherever_their_rows_begin(kernels):
    """All copies to shared memory, of which there is one code for aligned rows and others."""
    for kernel in kernels:
        copies = kernel.count(r"LDGSTS\..*")
        assert kernel.wide_copies == copies, f"{kernel.name}: {copies} copies, {kernel.wide_copies} of 128 bits"
        if re.match("similarity|aml_loss_forward", kernel.name):
            assert copies >= 5, f"{kernel.name}: {copies} copies, expected 5"


def test_tensor_cores_multiply_16_bits_and_fp32_keeps_its_own(kernels):
    for kernel in kernels:
        products = kernel.count(r"HMMA\..*")
        compares = re.match(r"(similarity_forward|similarity_coefficients|aml_loss_forward)<(bf16|f16)", kernel.name)
        assert products >= 16 if compares else products == 0, f"{kernel.name}: {products} products by tensor cores"
        assert kernel.count(r"HMMA\.16816\.F32(\.BF16)?") == products, f"{kernel.name}: {kernel.opcodes}"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_table_in_the_documentation_is_this():
    document = (ROOT / "docs" / "verification.md").read_text()
    version = re.search(r"\(nvcc ([\d.]+)\)", document)[1]
    if f"V{version}" not in machine_code.nvcc_version() or machine_code.built():
        pytest.skip(f"the table is that of the sources compiled by nvcc {version}; another gives out other registers")
    assert machine_code.table() in document, "put the output of tests/verification.py into docs/verification.md"


BAD_KERNEL = """
__global__ void __launch_bounds__(1024, 2) bad(const float* from, float* to, int n) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[i] = from[i * n + threadIdx.x];
  double sum = 0;
  for (int i = 0; i < 64; ++i) sum += values[values[i] > 0 ? i : 63 - i];
  for (int i = 0; i < 64; ++i) to[i * n + threadIdx.x] = values[i] * float(sum);
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_bad_kernel_is_seen(tmp_path):
    (tmp_path / "bad.cu").write_text(BAD_KERNEL)
    for kernel in machine_code.read(machine_code.compile_source(tmp_path / "bad.cu", tmp_path / "bad.fatbin")):
        assert kernel.stack > 0 and kernel.local_accesses > 0 and kernel.double_instructions > 0
        assert kernel.wide_loads == 0 and (kernel.threads, kernel.claimed_blocks) == (1024, 2)
