"""The definition of every operator, in plain PyTorch: readable, correct in fp64, and the oracle of the tests.

The public functions of `aml_kernels` check the arguments. They run anywhere, are differentiable by
autograd, and are what `backend="reference"` runs.
"""

from .aml_loss import aml_loss
from .masked_loss import masked_loss
from .quantile import sample_quantile
from .region_filter import filter_regions
from .resize import resize_bilinear
from .similarity import pixel_text_similarity

__all__ = [
    "aml_loss", "filter_regions", "masked_loss", "pixel_text_similarity", "resize_bilinear", "sample_quantile",
]
