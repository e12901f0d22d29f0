"""GenerationModule: a pipeline under Trainer.predict, to draw many images."""

from itertools import groupby
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from dar_lightning.ar import gumbel
from dar_lightning.ar.guidance import Guidance, read_guidance
from dar_lightning.ar.jacobi import check_jacobi
from dar_lightning.ar.sampling import check_filter
from dar_lightning.errors import check_range
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.generation.drawing import ROWS, draw_rows
from dar_lightning.generation.pipeline import DARPipeline
from dar_lightning.tokenizer.flow import check_diffusion


class GenerationModule(LightningModule):
    """Draws images by number: each is a function of (seed, number, label), whatever the batch or the rank.

    Every forward pass has `rows` rows, see `drawing.draw_rows`. Numbers that start and end at multiples of `rows` waste
    nothing.

    Args:
        pipeline: folder or Hugging Face repository of a pipeline.
        seed: with its number it seeds an image's generator, 0 to 2^31 - 1.
        guidance: scale of classifier-free guidance, (a, b), linear over the tokens, or another schedule as text
            (`ar.guidance`).
        temperature: of the token distribution.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens with this much probability.
        solver: see tokenizer.flow.integrate.
        num_steps: diffusion steps; None is the number of groups.
        groups: draw only the tokens of the first groups and take the preview after them; None draws all.
        rows: images per forward pass. Another number gives, up to rounding, the same images.
        jacobi: draw a window of so many tokens at once until they are those of drawing one by one (`ar.jacobi`); 0 is
            off.
    """

    def __init__(
        self,
        pipeline: str,
        seed: int = 0,
        guidance: Guidance = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        solver: str = "adams2",
        num_steps: int | None = None,
        groups: int | None = None,
        rows: int = ROWS,
        jacobi: int = 0,
    ) -> None:
        super().__init__()
        check_range(0, 2**31 - 1, seed=seed)
        check_range(1, rows=rows)
        check_diffusion(solver, num_steps)
        check_filter(temperature, top_k, top_p)
        self.path, self.seed, self.rows = pipeline, seed, rows
        self.pipeline = pipe = DARPipeline.from_pretrained(pipeline)
        self.tokenizer, self.ar = pipe.tokenizer, pipe.ar  # so that Lightning moves them
        self.num_classes = pipe.num_labels
        guidance = read_guidance(guidance)
        pipe.guidance_scales(guidance)  # says so if it does not fit
        self.options = dict(guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p, solver=solver)
        check_jacobi(pipe.ar.config, jacobi)
        self.options |= {"jacobi": jacobi} if jacobi else {}
        self.options["num_steps"] = pipe.tokenizer.config.num_groups if num_steps is None else num_steps
        self.options["groups"] = pipe.num_groups if groups is None else groups

    @property
    def protocol(self) -> dict[str, Any]:
        """What somebody needs to know to draw the same images, for JSON."""
        dtypes = self.pipeline.dtypes
        return {
            "pipeline": self.path,
            "tokenizer_sha256": model_sha256(self.tokenizer),
            "ar_sha256": model_sha256(self.ar),
            "ema": self.pipeline.averaged,
            "image_size": self.tokenizer.config.image_size,
            "seed": self.seed,
            "token_draws": gumbel.METHOD,
            **self.options,
            "num_tokens": self.tokenizer.schedule.tokens_for_groups(self.options["groups"]),
            "rows": self.rows,
            "dtype": dtypes["ar"] if len({*dtypes.values()}) == 1 else dtypes,
        }

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """{"index": (B,), "label": (B,)} -> uint8 images (B, 3, H, W)."""
        members = zip(batch["index"].tolist(), batch["label"].tolist(), strict=True)
        blocks = [list(block) for _, block in groupby(members, key=lambda member: member[0] // self.rows)]
        return torch.cat([draw_rows(self.pipeline, block, self.seed, self.rows, self.options) for block in blocks])
