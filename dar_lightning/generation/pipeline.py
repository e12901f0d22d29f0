"""DARPipeline: tokenizer and AR model together; generate, or stream a preview after each group of tokens."""

from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

from dar_lightning.ar.guidance import Guidance, GuidanceSchedule, guidance_schedule
from dar_lightning.ar.model import ARModel
from dar_lightning.ar.order import IN_GROUPS
from dar_lightning.ar.pass_layout import check_groups
from dar_lightning.ar.sampling import check_guided, stream_in_place
from dar_lightning.devices import dtype_name
from dar_lightning.errors import UserError, require
from dar_lightning.files import read_json, write_json
from dar_lightning.formats.pretrained import resolve_folder
from dar_lightning.generation.inpainting import EVIDENCE, Edit
from dar_lightning.generation.overlap import run_ahead
from dar_lightning.layers import Generators
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer
from dar_lightning.weights.lightning import load_model

PIPELINE_CONFIG = "config.json"
EXPORTED = "export.json"  # where `dar export` notes which weights these are


@dataclass(frozen=True)
class Preview:
    """What `DARPipeline.stream` yields after each group of tokens."""

    images: Tensor  # (B, 3, H, W), not clipped to [-1, 1]: the picture as the tokens so far foresee it
    codes: Tensor  # (B, m) int64, all tokens so far
    group: int  # number of groups decoded, 1 to K; at K the images are final


class DARPipeline:
    """Image generation by a tokenizer and an AR model (paper, section 3), of classes, or of what the model takes.

    Args:
        tokenizer: decodes tokens.
        ar: predicts all tokens, or those of the first groups, after which the preview is the image.
        classes: names of the classes, in the order of the labels; empty if they have none.
    """

    def __init__(self, tokenizer: SequentialDiffusionTokenizer, ar: ARModel, classes: tuple[str, ...] = ()):
        theirs, ours = ar.config.vocab_size, tokenizer.config.codebook_size
        if theirs != ours:
            raise UserError(f"the AR model has vocab_size {theirs}, the tokenizer {ours}: they are of different runs")
        schedule, tokens = tokenizer.schedule, ar.config.num_tokens
        counts = {schedule.tokens_for_groups(m): m for m in range(1, schedule.num_groups + 1)}
        if tokens not in counts:
            raise UserError(
                f"the AR model has num_tokens {tokens}, the tokenizer {schedule.num_tokens}: they are of different "
                f"runs, or that is no whole number of groups ({', '.join(map(str, counts))})"
            )
        self.num_groups = counts[tokens]  # that the tokens of the AR model give
        if ar.config.order in IN_GROUPS:
            check_groups(ar.config, schedule.num_tokens // schedule.num_groups)
        ends = [schedule.tokens_for_groups(m) for m in range(1, self.num_groups)]
        # the group of each token in the order of writing; orders drawn per sample have none, and count as written
        self.token_groups = [1 + bisect(ends, place) for place in ar.config.fixed_order().tolist()]
        if classes and len(classes) != (count := ar.condition.num_labels):
            raise UserError(f"{len(classes)} class names for an AR model of {count} classes")
        self.tokenizer, self.ar, self.classes = tokenizer, ar, tuple(classes)

    @torch.no_grad()
    def stream(
        self,
        labels: Tensor | None = None,
        guidance: Guidance | GuidanceSchedule = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        prefix: Tensor | None = None,
        noise: Tensor | None = None,
        solver: str = "adams2",
        num_steps: int | None = None,
        generator: Generators = None,
        overlap: bool | None = None,
        prompts: Sequence[str] | None = None,
        image: Tensor | None = None,
        known: Tensor | None = None,
        start: int = 0,
        evidence: float = EVIDENCE,
        static: bool | None = None,
        jacobi: int = 0,
    ) -> Iterator[Preview]:
        """Generate, and show the picture after each group of tokens.

        The first preview is there when the first group is: 1/K of the tokens and one diffusion step. An AR model with
        another order than coarse to fine has to write all tokens first. Closing the returned generator (or leaving a
        loop over it) stops the work.

        Args:
            labels: (B,) int64 classes; or a batch (B, ...) of the AR model's own condition. Of a model without
                condition only B counts.
            guidance: scale, (a, b), linear over the tokens, or another schedule (`ar.guidance`).
            temperature: of the token distribution.
            top_k: keep the k most likely tokens; 0 keeps all.
            top_p: keep the most likely tokens with this much probability.
            prefix: (B, m) tokens that are kept as they are (layout control), m < N.
            noise: (B, 3, H, W) start of the diffusion; None draws it at the tokenizer's image_size.
            solver: see tokenizer.flow.integrate.
            num_steps: diffusion steps; None is K.
            generator: a torch.Generator, or a list with one per image: then an image does not depend on its batch.
            overlap: write the next tokens while a diffusion step runs, on a thread and stream of their own; the images
                are the same. None does so on CUDA, where neither fills the device alone.
            prompts: instead of labels, B texts, for a model that takes them.
            image: (B or 1, 3, H, W) in [-1, 1]: what to keep, to start from or to resemble (`generation.inpainting`).
            known: (B or 1, 1, H, W) bool: its pixels that are kept as they are, in every preview.
            start: n of K groups: start the diffusion from the noised image instead of from noise, n steps later.
            evidence: how much the image's tokens are preferred: 8 to go on as it does, 0 to 4 to change it.
            static: draw the tokens by a step of static shapes (`ar.decode_step`), or not; None does so on CUDA.
            jacobi: draw a window of so many tokens at once until they are those of drawing one by one (`ar.jacobi`);
                for one image or a few. 0 is off.

        Yields:
            K previews (`num_groups`), K - n with `start`; the last one is what `generate` returns for the same
            arguments.
        """
        require(labels is None or prompts is None, "labels and prompts are both given: a model takes one of the two")
        condition = self.condition(labels if prompts is None else prompts)
        groups = self.preview_groups(None, start)
        if noise is not None or image is not None:
            noise = self.tokenizer.draw_noise(len(condition), generator) if noise is None else noise.to(self.device)
        edit = Edit(self.tokenizer, noise, image, known, start, evidence)
        # drawn where the tokens are, or on the CPU while the first of them are written: the same random numbers
        aside = self.tokenizer.set_noise_aside(len(condition), generator) if noise is None else None
        options = dict(guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p)
        options |= dict(token_groups=self.token_groups, bias=edit.bias, static=static, jacobi=jacobi)
        tokens = stream_in_place(self.ar, condition, prefix=prefix, generator=generator, **options)
        overlap = self.device.type == "cuda" if overlap is None else overlap
        codes: list[Tensor] = []
        with closing(run_ahead(tokens, self.device) if overlap else tokens) as tokens:

            def read() -> Iterator[Tensor]:
                for column in tokens:
                    codes.append(column)
                    yield column[:, None]

            columns = read()
            first = next(columns)
            state = aside() if noise is None else edit.state
            # the prefix is checked before, and what the model draws is a token
            tokens_so_far = chain([first], columns)
            previews = self.tokenizer.stream(tokens_so_far, state, solver, num_steps, False, start, edit.correct)
            for group, images in zip(groups, previews, strict=True):
                yield Preview(edit.paste(images), torch.stack(codes, dim=1), group)

    def generate(self, labels: Tensor | None = None, groups: int | None = None, **options) -> Tensor:
        """Generate images of classes (B,), or of prompts: (B, 3, H, W), not clipped to [-1, 1]. Options as in `stream`.

        With `groups`, from 1 to K, only the tokens of so many groups are drawn and the preview after them is returned.
        """
        previews = self.preview_groups(groups, options.get("start", 0))
        for preview in islice(self.stream(labels, **options), len(previews)):  # noqa: B007
            pass
        return preview.images

    def preview_groups(self, groups: int | None, start: int = 0) -> range:
        """The groups after which there are previews, if only so many are drawn, from diffusion step `start` on."""
        count, least = self.num_groups, start + 1
        require(0 <= start < count, f"start is {start}: it must be from 0 to {count - 1} groups")
        if groups is not None and not least <= groups <= count:
            more = f", those after start {start} from {least}" if start else ""
            raise UserError(f"groups is {groups}: this pipeline decodes from 1 to {count}{more}")
        return range(least, 1 + (count if groups is None else groups))

    def condition(self, asked: Tensor | Sequence[str] | Sequence[int] | None) -> Tensor:
        """What is asked for, prompts or labels, as a batch of the AR model's condition, on the device of the models."""
        if asked is None or len(asked) == 0:
            raise UserError(f"nothing to draw: this model takes {self.ar.condition.takes}, give some")
        if not isinstance(asked, Tensor):
            text = isinstance(asked[0], str)
            asked = self.ar.condition.from_prompts(asked) if text else torch.tensor(asked)
        return asked.to(self.device)

    @property
    def num_labels(self) -> int:
        """Labels are below it: classes, or 1 without condition. UserError for a model that takes text."""
        if not (count := self.ar.condition.num_labels):
            raise UserError(f"this model takes {self.ar.condition.takes}, not classes: need prompt (dar sample)")
        return count

    def guidance_scales(self, guidance: Guidance | GuidanceSchedule) -> list[float]:
        """The guidance scale of each token, as `stream` takes it; UserError for one that this pipeline cannot have."""
        scales = guidance_schedule(guidance, len(self.token_groups), self.token_groups)
        check_guided(self.ar, scales, guidance)
        return scales

    def label(self, name_or_index: str | int) -> int:
        """The label of a class, by its name or by its number (as int or digits)."""
        text = str(name_or_index)
        if text in self.classes:
            return self.classes.index(text)
        if text.isascii() and text.isdigit() and int(text) < self.num_labels:
            return int(text)
        names = f" or one of {', '.join(self.classes)}" if 0 < len(self.classes) <= 20 else ""
        raise UserError(f"class {text!r} is unknown: give 0 to {self.num_labels - 1}{names}")

    @property
    def averaged(self) -> dict[str, bool | None]:
        """Whether each model's weights are an average over training steps (EMA); None where nobody has noted it."""
        return {"tokenizer": self.tokenizer.averaged, "ar": self.ar.averaged}

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype of each model's weights."""
        return {"tokenizer": dtype_name(self.tokenizer.dtype), "ar": dtype_name(self.ar.head.weight.dtype)}

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.ar.head.weight.device

    def to(self, *args, **kwargs) -> "DARPipeline":
        """Move both models, as nn.Module.to."""
        self.tokenizer.to(*args, **kwargs)
        self.ar.to(*args, **kwargs)
        return self

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder with `tokenizer/`, `ar/` and the class names."""
        path = Path(path)
        self.tokenizer.save_pretrained(path / "tokenizer")
        self.ar.save_pretrained(path / "ar")
        write_json(path / PIPELINE_CONFIG, {"classes": list(self.classes)}, ensure_ascii=False)

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path) -> "DARPipeline":
        """Read a folder that save_pretrained wrote, or a Hugging Face Hub repository with those files."""
        folder = resolve_folder(path_or_repo, ["config.json", "*/config.json", "*/model.safetensors"])
        classes = read_json(folder / PIPELINE_CONFIG).get("classes", [])
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise UserError(f"{folder / PIPELINE_CONFIG}: classes must be a list of names")
        tokenizer = SequentialDiffusionTokenizer.from_pretrained(folder / "tokenizer")
        return cls(tokenizer, ARModel.from_pretrained(folder / "ar"), tuple(classes))

    @classmethod
    def from_parts(cls, tokenizer: str | Path, ar: str | Path, classes: tuple[str, ...] = ()) -> "DARPipeline":
        """Put a pipeline together from two trainings, each a checkpoint of `dar fit`, a folder or a Hub repository."""
        return cls(load_model(tokenizer, SequentialDiffusionTokenizer), load_model(ar, ARModel), classes)
