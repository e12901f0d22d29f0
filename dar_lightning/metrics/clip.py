"""CLIP score: how well images fit their captions, by torchmetrics and a CLIP of transformers; safetensors only."""

import hashlib
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dar_lightning.errors import UserError, one_line
from dar_lightning.files import read_json
from dar_lightning.formats.text_encoder import LOCAL, UNREADABLE, encoder_files, weights_sha256
from dar_lightning.metrics.images import ImageSet, with_progress


class CLIP(nn.Module):
    """A CLIP model and its processor, in float32, in the form that torchmetrics' CLIPScore asks for.

    Args:
        source: a local folder or a Hugging Face repository of transformers' CLIP, with its tokenizer and image
            processor, and weights as safetensors.
        option: what the user calls it, for error lines.

    Raises:
        UserError: transformers is missing, there is no such folder, or it holds no CLIP.
    """

    def __init__(self, source: str | Path, option: str = "clip"):
        super().__init__()
        folder, files = encoder_files(source, option)
        from transformers import CLIPModel, CLIPProcessor

        if (kind := read_json(folder / "config.json").get("model_type")) != "clip":
            raise UserError(f"{option}: {source} has a model of type {kind}; give a CLIP")
        try:
            options = LOCAL | {"attn_implementation": "eager", "use_safetensors": True}
            self.network = CLIPModel.from_pretrained(folder, dtype=torch.float32, **options).eval()
            self.processor = CLIPProcessor.from_pretrained(folder, **LOCAL)
        except UNREADABLE as error:
            raise UserError(f"{option}: transformers cannot read {source}: {one_line(error)}") from error
        self.requires_grad_(False)
        self.config = self.network.config
        self.length = self.config.text_config.max_position_embeddings
        self.facts = {"model": str(source), "sha256": weights_sha256(files)}

    def prepare(self, images: list[Tensor] | None = None, text: list[str] | None = None, **options: Any) -> Any:
        """Inputs of the network: images, resized by its processor, or texts, cut to its length with their end token."""
        if text is None:
            return self.processor(images=images, return_tensors="pt")
        return self.processor.tokenizer(text, truncation=True, max_length=self.length, **options)

    def get_image_features(self, pixels: Tensor) -> Tensor:
        """(B, D) projected features of prepared images."""
        found = self.network.get_image_features(pixels)
        return getattr(found, "pooler_output", found)  # as torchmetrics expects it, which is transformers 4's

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, D) projected features of prepared texts."""
        found = self.network.get_text_features(ids, mask)
        return getattr(found, "pooler_output", found)


@torch.no_grad()
def clip_score(images: ImageSet, option: str, clip: CLIP, device: torch.device, batch_size: int) -> float:
    """CLIPScore without its factor 2.5: 100 times the mean cosine of each image with its caption, at least 0.

    Source: Hessel et al., arXiv 2104.08718, as torchmetrics computes it.

    Args:
        images: a set with captions (`check_captions`).
        option: what the user calls it, for the progress bar.
        clip: the model.
        device: where to compute.
        batch_size: images at a time.
    """
    from torchmetrics.multimodal import CLIPScore  # it has it where transformers is installed

    metric, texts = CLIPScore(lambda: (clip, clip.prepare)).to(device), iter(images.captions)
    for pixels, _ in with_progress(images, batch_size, f"{option}, CLIP"):
        metric.update(pixels.to(device), list(islice(texts, len(pixels))))
    return float(metric.compute())


def check_captions(images: ImageSet, option: str) -> None:
    """UserError for a set of which an image has no caption."""
    if missing := sum(not text for text in images.captions):
        raise UserError(
            f"{option}: {missing} of {len(images)} images have no caption, which the CLIP score needs; give shards "
            "with captions, or samples.npz of dar sample --prompt with the samples.json beside it"
        )


def captions_sha256(captions: Sequence[str]) -> str:
    """SHA-256 of a set's captions, in any order: scores of other captions are of another task."""
    return hashlib.sha256(json.dumps(sorted(captions)).encode()).hexdigest()
