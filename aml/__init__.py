"""Referring image segmentation with alignment-aware masked learning, on top of `aml_kernels`."""

__version__ = "0.1.0"
