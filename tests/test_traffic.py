"""The CUDA operators move hardly more bytes than they have to, in the launches that they are said to take."""

from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "verification.md"

LAUNCHES = {
    "aml_loss": ["aml_loss_forward"],
    "masked_loss": ["masked_loss_forward"],
    "masked_loss_backward": ["masked_loss_backward_pixels"],
    "masked_loss_backward, resized": ["masked_loss_backward_gather"],
    "pixel_text_similarity": ["similarity_forward"],
    "pixel_text_similarity_backward": ["similarity_coefficients", "similarity_gradients"],
    "sample_quantile": ["quantile_by_block"],
    "sample_quantile, long": ["quantile_by_team"],
    "filter_regions": ["filter_image_regions"],
}
