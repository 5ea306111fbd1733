"""The operators in Triton: `<operator>.py` holds its kernels and, under the operator's name, what launches them.

Each launcher has the signature of its operator. None of them waits for the GPU, and nothing that is compiled in
depends on the sizes, so that a program compiles once for each combination of types and options.
"""
