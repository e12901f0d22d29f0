"""`dar export`: the model inside a Lightning checkpoint becomes a folder in our format."""

from pathlib import Path

from dar_lightning.checkpoint import Weights
from dar_lightning.weights import fingerprint, load_lightning_checkpoint


def export(ckpt: Path, output: Path, weights: Weights = "auto") -> None:
    """Write the tokenizer or the AR model of a training checkpoint in our format.

    Args:
        ckpt: a checkpoint of `dar fit`.
        output: folder for config.json and model.safetensors.
        weights: "ema", the averaged weights; "raw", those that the optimizer works on; "auto", EMA if the run kept one.
    """
    model = load_lightning_checkpoint(ckpt, weights)
    model.save_pretrained(output)
    print(f"{output}: {type(model).__name__}, fingerprint {fingerprint(model)[:12]}")
