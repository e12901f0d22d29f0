"""Model card of a pipeline: the README.md of its folder, as Hugging Face's Hub shows it."""

import shlex
from pathlib import Path

from dar_lightning.ar.conditions import Condition
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.generation.pipeline import DARPipeline

CARD, NOTES = "README.md", "NOTES.md"  # the card, and what people have to say about the model, which it ends with
TEXT = """---
library_name: dar-lightning
tags: [d-ar, image-generation, autoregressive, diffusion]
---

# {name}

Draws images of {size}x{size} pixels by Diffusion via Autoregressive Models (D-AR,
[arXiv 2505.23660](https://arxiv.org/abs/2505.23660)): the AR model writes {tokens} tokens in {groups} groups, and the
picture sharpens with each group. Written by `dar export` of dar_lightning.

| | tokenizer | AR model |
|---|---|---|
{rows}
{classes}
```bash
dar sample --pipeline {source}{option} --output drawn
dar serve --pipeline {source}
```

```python
{imports}from dar_lightning import DARPipeline

pipe = DARPipeline.from_pretrained("{source}")
images = pipe.generate({asked})  # (2, 3, {size}, {size}), not clipped to [-1, 1]
```
"""


def how_to_ask(condition: Condition) -> dict[str, str]:
    """What the commands and the Python of a card say to a model of this condition, for two images."""
    if condition.takes == "prompts":
        option = f" --prompt {shlex.quote(condition.example)} --guidance 3"
        return {"imports": "", "option": option, "asked": f"prompts={[condition.example] * 2!r}, guidance=3.0"}
    guided = condition.takes == "labels"
    labels = f"torch.tensor([0, {1 if condition.num_labels > 1 else 0}])"
    option, asked = (" --guidance 3", f"{labels}, guidance=3.0") if guided else ("", labels)
    return {"imports": "import torch\n", "option": option, "asked": asked}


def model_card(pipe: DARPipeline, source: str, notes: str = "") -> str:
    """The card of a pipeline in Markdown: sizes, hashes and classes, how to draw, then the notes.

    Args:
        pipe: with its weights as they are stored, whose SHA-256 it gives.
        source: folder, repository or shipped name, which its commands name.
        notes: Markdown: training, measurements, limits, licences.
    """
    tokenizer, ar = pipe.tokenizer.config, pipe.ar.config
    models, averages = {"tokenizer": pipe.tokenizer, "ar": pipe.ar}, {True: "yes", False: "no", None: "not noted"}
    parts = {
        "parameters": [f"{sum(p.numel() for p in model.parameters()):,}" for model in models.values()],
        "size": [
            f"{tokenizer.num_tokens} tokens of {tokenizer.codebook_size:,} codes, {tokenizer.num_groups} groups",
            f"width {ar.dim}, {ar.depth} blocks, {ar.num_heads} heads",
        ],
        "weights": [pipe.dtypes[name] for name in models],
        "averaged over training (EMA)": [averages[pipe.averaged[name]] for name in models],
        "SHA-256": [f"`{model_sha256(model)[:16]}`" for model in models.values()],
    }
    rows = "\n".join(f"| {what} | {' | '.join(both)} |" for what, both in parts.items())
    names = ", ".join(f"{name} ({i})" for i, name in enumerate(pipe.classes))
    classes = f"\nClasses: {names}.\n" if names else ""
    name = Path(source).name.replace("_", " ")
    given = dict(name=name, source=source, size=tokenizer.image_size, tokens=ar.num_tokens, groups=pipe.num_groups)
    given |= how_to_ask(pipe.ar.condition)
    return TEXT.format(**given, rows=rows, classes=classes) + (f"\n{notes.strip()}\n" if notes.strip() else "")
