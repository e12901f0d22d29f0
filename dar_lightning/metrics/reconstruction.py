"""PSNR and SSIM of reconstructions, on the 8-bit images that a viewer would see."""

from torchmetrics import MetricCollection
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

# Recorded beside every value: both figures change with each of these choices.
RECONSTRUCTION_PROTOCOL = {
    "images": "uint8",
    "data_range": 255,
    "psnr": "mean over images, each over all pixels and channels",
    "ssim": "mean over images, Gaussian window 11x11, sigma 1.5, each RGB channel, borders reflected and counted",
}


def reconstruction_metrics() -> MetricCollection:
    """PSNR (dB) and SSIM.

    Returns:
        A collection whose `update(reconstructions, originals)` takes two uint8 tensors (B, 3, H, W) converted by
        `.float()`, values 0 to 255, and whose `compute()` returns {"psnr", "ssim"}. SSIM's window needs H, W >= 11.
    """
    return MetricCollection(
        {
            "psnr": PeakSignalNoiseRatio(data_range=255.0, reduction="elementwise_mean", dim=(1, 2, 3)),
            "ssim": StructuralSimilarityIndexMeasure(data_range=255.0),
        },
        compute_groups=False,
    )
