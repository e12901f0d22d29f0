"""What is measured: each row builds the work of one call, and says how many images it makes and its FLOPs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import counting
from benchmarks.frechet import gaussian
from benchmarks.machine import CPU, ROOT
from dar_lightning import ARConfig, ARModel, DARPipeline, SequentialDiffusionTokenizer, TokenizerConfig
from dar_lightning.commands.extract import extract
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.shards import ShardIndex
from dar_lightning.layers import compile_blocks
from dar_lightning.metrics.frechet import frechet_distance

TOKENIZERS, AR_MODELS = ("tiny", "light", "v1"), ("tiny", "B", "L", "XL")
SHARDS = ROOT / "data" / "fruit64" / "val"
PHOTOS = ShardIndex.load(SHARDS).num_samples
GUIDANCE = 4.0


def compile_graphs(*parts: nn.Module) -> None:
    """Compile modules that return a tensor, each as one CUDA graph, in place, to be called without gradients.

    The next graph overwrites a CUDA graph's outputs, so they are copied.
    """

    def copying(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs, **options: function(*inputs, **options).clone()

    for part in parts:
        part.static = False  # a graph within another one
        part.compile(mode="reduce-overhead")
        part._compiled_call_impl = copying(part._compiled_call_impl)


@dataclass(frozen=True)
class Setting:
    """How rows are measured."""

    size: str  # preset of the model; of a pipeline, that of its AR model
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32  # of the weights in sampling, of autocast in training
    batch: int = 1  # images per call
    compile: str = "none"  # or "default", or "reduce-overhead", which is default in training, else CUDA graphs

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

    def tokenizer(self, training: bool = False) -> SequentialDiffusionTokenizer:
        """A new one."""
        return self.prepare(SequentialDiffusionTokenizer(TokenizerConfig.preset(self.size)), training)

    def images(self, side: int) -> Tensor:
        """(batch, 3, side, side) in [-1, 1]."""
        generator = torch.Generator().manual_seed(0)
        return torch.rand(self.batch, 3, side, side, generator=generator).mul(2).sub(1).to(self.device)

    def codes(self, size: int, num_tokens: int) -> Tensor:
        """(batch, num_tokens) int64."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(size, (self.batch, num_tokens), generator=generator).to(self.device)


class Row(NamedTuple):
    """One kind of work."""

    build: Callable[[Setting], Callable[[], object]]  # what is called
    flops: Callable[[Setting], float | None]  # operations per image, None where they are not what takes time
    sizes: tuple[str, ...]  # presets it exists for
    batches: tuple[int, ...] = (1, 8)  # images per call that are measured
    compiles: bool = True  # whether blocks can be compiled for it
    lowers: bool = True  # whether another dtype than float32 changes it
    images: Callable[[Setting], int] = lambda setting: setting.batch  # that a call is for, or 0


def encode(setting: Setting):
    model = setting.tokenizer()
    return partial(model.tokenize, setting.images(model.config.image_size))


def decode(setting: Setting):
    model = setting.tokenizer()
    codes = setting.codes(model.config.codebook_size, model.config.num_tokens)
    return partial(model.detokenize, codes, model.draw_noise(setting.batch))


def quantize(setting: Setting):
    config = TokenizerConfig.preset(setting.size)
    quantizer = SequentialDiffusionTokenizer(config).quantizer.to(setting.device)
    shape = setting.batch, config.num_tokens, config.codebook_dim
    latents = torch.randn(shape, device=setting.device, requires_grad=True)

    def call():
        quantized, _, *losses = quantizer(latents)
        losses = losses[0].values() if len(losses) == 1 else losses  # two tensors in revisions before this one
        (quantized.mean() + sum(loss.mean() for loss in losses)).backward()

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
    model = setting.tokenizer(training=True)
    images = setting.images(model.config.image_size)
    return training_call(setting, model, lambda: counting.tokenizer_loss(model, images))


def train_ar(setting: Setting):
    model = setting.prepare(ARModel(ARConfig.preset(setting.size)), training=True)
    codes = setting.codes(model.config.vocab_size, model.config.num_tokens)
    labels = torch.zeros(setting.batch, dtype=torch.long, device=setting.device)
    loss = nn.functional.cross_entropy
    return training_call(setting, model, lambda: loss(model(labels, codes).flatten(0, 1), codes.flatten()))


def generate(setting: Setting, **options):
    """Of the two models, the tokenizer alone is compiled: v1, but tiny with tiny."""
    ar = replace(setting, compile="none").prepare(ARModel(ARConfig.preset(setting.size)))
    tokenizer = replace(setting, size="tiny" if setting.size == "tiny" else "v1").tokenizer()
    labels = torch.arange(setting.batch) % ar.config.num_classes
    return partial(DARPipeline(tokenizer, ar).generate, labels, **options)


def generation_flops(setting: Setting, guided: bool = True, groups: int | None = None) -> float:
    """AR tokens and diffusion steps of one image."""
    config = TokenizerConfig.preset("tiny" if setting.size == "tiny" else "v1")
    groups = groups or config.num_groups
    tokens = config.num_tokens // config.num_groups * groups
    shown = counting.condition(config) * groups / config.num_groups + groups * counting.diffusion_step(config)
    return shown + counting.ar_tokens(ARConfig.preset(setting.size), tokens, guided)


def extraction(setting: Setting):
    """`dar extract`, from shards on disk to token shards on disk, of as many crops as make a batch."""
    folder = TemporaryDirectory(prefix="benchmark-")
    path, runs = Path(folder.name), iter(range(10**6))
    SequentialDiffusionTokenizer(TokenizerConfig.preset(setting.size)).save_pretrained(path / "tokenizer")
    options = {"crops": "center", "batch_size": setting.batch, "devices": 1}
    options |= {"accelerator": setting.device.type.replace("cuda", "gpu")}
    options |= {"precision": "32-true" if setting.dtype == torch.float32 else "bf16-mixed"}
    return lambda folder=folder: extract(str(path / "tokenizer"), str(SHARDS), str(path / f"{next(runs)}"), **options)


def loading(setting: Setting):
    """An epoch of decoded, cropped training batches, without workers: per core."""
    data = ImageNetDataModule(str(SHARDS), image_size=64, batch_size=setting.batch, num_workers=0)
    data.setup("fit")
    loader = data.train_dataloader()
    return lambda: [batch["image"] for batch in loader]


def of_tokenizer(flops: Callable[[TokenizerConfig], float]) -> Callable[[Setting], float]:
    """FLOPs by config -> FLOPs by setting."""
    return lambda setting: flops(TokenizerConfig.preset(setting.size))


def search_flops(config: TokenizerConfig) -> int:
    """Of the products with all codes."""
    return 2 * config.num_tokens * config.codebook_size * config.codebook_dim


def ar_step_flops(setting: Setting) -> int:
    config = ARConfig.preset(setting.size)
    return counting.ar_step(config) - counting.causal_half(config)


def unknown(setting: Setting) -> None:
    """Not operations are what takes time."""


FIXED = {"compiles": False, "lowers": False}
FIRST, ALL = partial(generation_flops, groups=1), (1, 8, 64)
ROWS = {
    "encode": Row(encode, of_tokenizer(counting.encode), TOKENIZERS),
    "decode": Row(decode, of_tokenizer(counting.decode), TOKENIZERS),
    "tokenizer_step": Row(train_tokenizer, of_tokenizer(counting.tokenizer_step), TOKENIZERS),
    "quantizer": Row(quantize, of_tokenizer(search_flops), TOKENIZERS, **FIXED),
    "ar_step": Row(train_ar, ar_step_flops, AR_MODELS),
    "generate": Row(generate, partial(generation_flops, guided=False), AR_MODELS, ALL),
    "generate_guided": Row(partial(generate, guidance=GUIDANCE), generation_flops, AR_MODELS, ALL),
    "first_preview": Row(partial(generate, guidance=GUIDANCE, groups=1), FIRST, AR_MODELS),
    "extraction": Row(
        extraction, of_tokenizer(counting.encode), TOKENIZERS, (64,), compiles=False, images=lambda s: PHOTOS
    ),
    "loading": Row(loading, unknown, ("fruit64",), (64,), images=lambda s: PHOTOS // s.batch * s.batch, **FIXED),
    "frechet": Row(
        lambda s: partial(frechet_distance, gaussian(3000, 2048, 1), gaussian(3000, 2048, 2)),
        unknown,
        ("2048",),
        (1,),
        images=lambda s: 0,
        **FIXED,
    ),
}
