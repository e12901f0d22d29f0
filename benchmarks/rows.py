"""What is measured: each row builds the work of one call, and says how many images it makes and its FLOPs."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import counting
from benchmarks.frechet import gaussian
from benchmarks.machine import ROOT
from dar_lightning import ARConfig, ARModel, DARPipeline, SequentialDiffusionTokenizer, TokenizerConfig
from dar_lightning.commands.extract import extract
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.shards import ShardIndex
from dar_lightning.layers import compile_blocks, compile_graphs
from dar_lightning.metrics.frechet import frechet_distance

TOKENIZERS, AR_MODELS = ("tiny", "light", "v1"), ("tiny", "B", "L", "XL")
SHARDS = ROOT / "data" / "fruit64" / "val"
GUIDANCE = 4.0


@dataclass(frozen=True)
class Setting:
    """How rows are measured.

    Args:
        size: preset of the model; of a pipeline, that of its AR model.
        device: where.
        dtype: of the weights in sampling, of autocast in training.
        batch: images per call.
        compile: "none", "default", or "reduce-overhead", which is default in training, else CUDA graphs.
    """

    size: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    batch: int = 1
    compile: str = "none"

    def prepare(self, model: nn.Module, training: bool = False) -> nn.Module:
        """Put a new model where and as it is measured."""
        model = model.to(self.device, torch.float32 if training else self.dtype).train(training)
        if not training:
            model.requires_grad_(False)
        if self.compile != "none":
            parts = [part for part in (model, *model.children()) if hasattr(part, "blocks")]
            graphs = self.compile == "reduce-overhead" and not training
            (compile_graphs if graphs else compile_blocks)(*parts)
        return model

    def images(self, side: int) -> Tensor:
        """(batch, 3, side, side) in [-1, 1]."""
        generator = torch.Generator().manual_seed(0)
        return torch.rand(self.batch, 3, side, side, generator=generator).mul(2).sub(1).to(self.device)

    def codes(self, config: TokenizerConfig | ARConfig) -> Tensor:
        """(batch, N) int64."""
        size = config.codebook_size if isinstance(config, TokenizerConfig) else config.vocab_size
        generator = torch.Generator().manual_seed(0)
        return torch.randint(size, (self.batch, config.num_tokens), generator=generator).to(self.device)


class Row(NamedTuple):
    """One kind of work.

    Attributes:
        build: setting -> the call.
        flops: setting -> operations per image, or None where they are not what takes time.
        sizes: presets it exists for.
        batches: images per call that are measured.
        compiles: whether blocks can be compiled for it.
        lowers: whether another dtype than float32 changes it.
        images: setting -> images that a call is for, or 0.
    """

    build: Callable[[Setting], Callable[[], object]]
    flops: Callable[[Setting], float | None]
    sizes: tuple[str, ...]
    batches: tuple[int, ...] = (1,)
    compiles: bool = True
    lowers: bool = True
    images: Callable[[Setting], int] = lambda setting: setting.batch


def tokenizer(setting: Setting, training: bool = False) -> SequentialDiffusionTokenizer:
    """A new one."""
    return setting.prepare(SequentialDiffusionTokenizer(TokenizerConfig.preset(setting.size)), training)


def encode(setting: Setting):
    model = tokenizer(setting)
    images = setting.images(model.config.image_size)
    return lambda: model.tokenize(images)


def decode(setting: Setting):
    model = tokenizer(setting)
    codes, noise = setting.codes(model.config), model.draw_noise(setting.batch)
    return lambda: model.detokenize(codes, noise)


def quantize(setting: Setting):
    quantizer = SequentialDiffusionTokenizer(TokenizerConfig.preset(setting.size)).quantizer.to(setting.device)
    config = TokenizerConfig.preset(setting.size)
    latents = torch.randn(setting.batch, config.num_tokens, config.codebook_dim, device=setting.device)
    latents.requires_grad_(True)

    def call():
        quantized, _, vq, commit = quantizer(latents)
        (quantized.mean() + vq.mean() + commit.mean()).backward()

    return call


def training_call(setting: Setting, model: nn.Module, loss: Callable[[], Tensor]):
    """Forward and backward pass under autocast, and a step of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def call():
        with torch.autocast(setting.device.type, setting.dtype, enabled=setting.dtype != torch.float32):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def train_tokenizer(setting: Setting):
    model = tokenizer(setting, training=True)
    images = setting.images(model.config.image_size)

    def loss() -> Tensor:
        losses = model.training_losses(images)
        total = losses["flow"] + losses["vq"] + losses["commit"]
        if "hidden" in losses:
            total = total + model.decoder.project_hidden(losses["hidden"], counting.REPA_GRID).mean()
        return total

    return training_call(setting, model, loss)


def train_ar(setting: Setting):
    model = setting.prepare(ARModel(ARConfig.preset(setting.size)), training=True)
    codes, labels = setting.codes(model.config), torch.zeros(setting.batch, dtype=torch.long, device=setting.device)
    return training_call(
        setting, model, lambda: nn.functional.cross_entropy(model(labels, codes).flatten(0, 1), codes.flatten())
    )


def pipeline(setting: Setting) -> tuple[DARPipeline, Tensor]:
    """The AR model with v1 (tiny: with tiny), and labels. Of the two, the tokenizer alone is compiled."""
    images = replace(setting, size="tiny" if setting.size == "tiny" else "v1")
    ar = replace(setting, compile="none").prepare(ARModel(ARConfig.preset(setting.size)))
    pipe = DARPipeline(tokenizer(images), ar)
    return pipe, torch.arange(setting.batch) % pipe.ar.config.num_classes


def generate(setting: Setting, guidance: float = 1.0):
    pipe, labels = pipeline(setting)
    return lambda: pipe.generate(labels, guidance=guidance)


def first_preview(setting: Setting):
    pipe, labels = pipeline(setting)
    return lambda: pipe.generate(labels, guidance=GUIDANCE, groups=1)


def generation_flops(setting: Setting, guided: bool, groups: int | None = None) -> float:
    """AR tokens and diffusion steps of one image."""
    config = TokenizerConfig.preset("tiny" if setting.size == "tiny" else "v1")
    groups = config.num_groups if groups is None else groups
    tokens = config.num_tokens // config.num_groups * groups
    shown = counting.condition(config) * groups / config.num_groups + groups * counting.diffusion_step(config)
    return shown + counting.ar_tokens(ARConfig.preset(setting.size), tokens, guided)


def extraction(setting: Setting):
    """`dar extract`, from shards on disk to token shards on disk, of as many crops as make a batch."""
    folder = TemporaryDirectory(prefix="benchmark-")
    path = Path(folder.name)
    tokenizer(replace(setting, device=torch.device("cpu"), dtype=torch.float32, compile="none")).save_pretrained(
        path / "tokenizer"
    )
    runs = iter(range(10**6))
    precision = "32-true" if setting.dtype == torch.float32 else "bf16-mixed"
    options = dict(
        crops="center", batch_size=setting.batch, accelerator=setting.device.type.replace("cuda", "gpu"), devices=1
    )

    def call(folder=folder):
        extract(str(path / "tokenizer"), str(SHARDS), str(path / f"{next(runs)}"), precision=precision, **options)

    return call


def loading(setting: Setting):
    """An epoch of decoded, cropped training batches, without workers: per core."""
    data = ImageNetDataModule(str(SHARDS), image_size=64, batch_size=setting.batch, num_workers=0)
    data.setup("fit")
    loader = data.train_dataloader()
    return lambda: [batch["image"] for batch in loader]


def frechet(setting: Setting):
    one, other = gaussian(3000, 2048, 1), gaussian(3000, 2048, 2)
    return lambda: frechet_distance(one, other)


def of_tokenizer(flops: Callable[[TokenizerConfig], float]) -> Callable[[Setting], float]:
    """FLOPs by config -> FLOPs by setting."""
    return lambda setting: flops(TokenizerConfig.preset(setting.size))


def quantizer_flops(config: TokenizerConfig) -> float:
    """The products of all tokens and codes."""
    return 2 * config.num_tokens * config.codebook_size * config.codebook_dim


def of_ar_step(setting: Setting) -> float:
    """Of one sequence, without what is masked."""
    config = ARConfig.preset(setting.size)
    return counting.ar_step(config) - counting.causal_half(config)


ROWS = {
    "encode": Row(encode, of_tokenizer(counting.encode), TOKENIZERS, (1, 8)),
    "decode": Row(decode, of_tokenizer(counting.decode), TOKENIZERS, (1, 8)),
    "tokenizer_step": Row(train_tokenizer, of_tokenizer(counting.tokenizer_step), TOKENIZERS, (1, 8)),
    "quantizer": Row(quantize, of_tokenizer(quantizer_flops), TOKENIZERS, (1, 8), compiles=False, lowers=False),
    "ar_step": Row(train_ar, of_ar_step, AR_MODELS, (1, 8)),
    "generate": Row(generate, lambda s: generation_flops(s, False), AR_MODELS, (1, 8, 64)),
    "generate_guided": Row(lambda s: generate(s, GUIDANCE), lambda s: generation_flops(s, True), AR_MODELS, (1, 8, 64)),
    "first_preview": Row(first_preview, lambda s: generation_flops(s, True, groups=1), AR_MODELS, (1, 8)),
    "extraction": Row(
        extraction,
        of_tokenizer(counting.encode),
        TOKENIZERS,
        (64,),
        compiles=False,
        images=lambda s: ShardIndex.load(SHARDS).num_samples,
    ),
    "loading": Row(
        loading,
        lambda s: None,
        ("fruit64",),
        (64,),
        compiles=False,
        lowers=False,
        images=lambda s: ShardIndex.load(SHARDS).num_samples // s.batch * s.batch,
    ),
    "frechet": Row(frechet, lambda s: None, ("2048",), compiles=False, lowers=False, images=lambda s: 0),
}
