"""Fused operators for alignment-aware masked learning in referring image segmentation.

`pixel_text_similarity`, `sample_quantile`, `masked_loss`, `aml_loss`, `filter_regions`; definitions in
`aml_kernels.reference`. `python -m aml_kernels` tells what was built and what would run.
"""

from .aml_loss import AMLStats, aml_loss
from .masked_loss import MaskedLossStats, masked_loss
from .quantile import sample_quantile
from .region_filter import filter_regions
from .similarity import pixel_text_similarity

__version__ = "0.1.0"
__all__ = [
    "AMLStats", "MaskedLossStats", "aml_loss", "filter_regions", "masked_loss", "pixel_text_similarity",
    "sample_quantile",
]
