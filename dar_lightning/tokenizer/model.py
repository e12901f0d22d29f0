"""SequentialDiffusionTokenizer: images to ordered tokens and back, with previews, streaming and training losses."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dar_lightning.errors import require
from dar_lightning.formats.pretrained import PretrainedMixin
from dar_lightning.layers import Generators, can_capture, draw_per_sample, skip_normals
from dar_lightning.tokenizer.conditioner import Conditioner
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.tokenizer.decoder import PixelDecoder
from dar_lightning.tokenizer.diffusion_step import Trajectory, call_steps, replay_steps
from dar_lightning.tokenizer.encoder import Encoder
from dar_lightning.tokenizer.flow import check_diffusion, sampling_times, shift_time
from dar_lightning.tokenizer.init import TokenizerInit, init_weights
from dar_lightning.tokenizer.quantizers import make_quantizer
from dar_lightning.tokenizer.schedule import GroupSchedule

# Names in training's losses that no quantizer may give one of its own.
NOT_OF_QUANTIZER = {"hidden", "quantizer", "read", "codes", "group", "latents"}
NOT_OF_QUANTIZER |= {"loss", "perceptual", "repa", "adversarial", "discriminator"}


class SequentialDiffusionTokenizer(nn.Module, PretrainedMixin):
    """Turns an image into N discrete tokens whose order is the order of diffusion time, and back.

    Images are float in [-1, 1], (B, 3, H, W). Groups of tokens drive diffusion steps in pixel space, so decoding can
    start before all tokens exist (arXiv 2505.23660, section 3.1).

    `init` says where initial weights differ from the official ones.
    """

    config_class = TokenizerConfig
    pipeline_part = "tokenizer"

    def __init__(self, config: TokenizerConfig, init: TokenizerInit = TokenizerInit()):  # noqa: B008  (frozen)
        super().__init__()
        self.config = config
        self.schedule = GroupSchedule.from_config(config)
        self.encoder = Encoder(config)
        sizes = config.codebook_size, config.codebook_dim
        self.quantizer = make_quantizer(config.quantizer, *sizes, config.quantizer_options)
        self.conditioner = Conditioner(config)
        self.decoder = PixelDecoder(config)
        init_weights(self, init)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype; images are cast to it, and noise where the decoder reads it."""
        return self.decoder.conv_in.weight.dtype

    # ---- images -> tokens

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Tokens of images: (B, 3, H, W) in [-1, 1] -> (B, N) int64. Never of the rest of the batch, in any mode."""
        self._check_size(images.shape[-2:])
        return self.quantizer.nearest(self.encoder(images.to(self.dtype), running_statistics=True))

    # ---- tokens -> images

    def _lookup(self, codes: Tensor) -> Tensor:
        """Codes (B, n) as values (B, n, codebook_dim), of the weights' dtype: some quantizers have no weights."""
        return self.quantizer.lookup(codes).to(self.conditioner.from_latent.weight.dtype)

    @torch.no_grad()
    def condition(self, codes: Tensor) -> Tensor:
        """The causal decoder's output for codes (B, n), n <= N: (B, n, D)."""
        self._check_codes(codes)
        return self.conditioner(self._lookup(codes))

    @torch.no_grad()
    def detokenize(
        self,
        codes: Tensor,
        noise: Tensor | None = None,
        solver: str = "adams2",
        groups: int | None = None,
        num_steps: int | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Decode tokens to images.

        Args:
            codes: (B, n) int64. All N tokens, or the whole groups that `groups` asks for.
            noise: (B, 3, H, W) standard normal start; its size is the image's size. None draws it at image_size.
            solver: "adams2" (official default), "euler" or "adams2_variable"; see flow.integrate.
            groups: m, from 1 to K: stop after the first m groups and return the preview. None decodes as many groups
                as `codes` holds.
            num_steps: diffusion steps of the full trajectory; None is K.
            generator: source of the drawn noise: one torch.Generator, or a list with one per image.

        Returns:
            (B, 3, H, W) float32 images, not clipped to [-1, 1].

        Raises:
            UserError: for a group, solver, size or number of tokens that cannot be decoded.
        """
        groups, cond = self._conditions(codes, groups)
        noise = self.draw_noise(len(codes), generator) if noise is None else noise
        return next(self._integrate(iter([(groups, cond)]), noise, solver, num_steps))

    @torch.no_grad()
    def previews(
        self,
        codes: Tensor,
        noise: Tensor | None = None,
        solver: str = "adams2",
        num_steps: int | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """All previews from one trajectory: (B, N) tokens -> (B, K, 3, H, W); [:, -1] equals detokenize(codes).

        The other arguments are those of detokenize.
        """
        groups, cond = self._conditions(codes, None)
        noise = self.draw_noise(len(codes), generator) if noise is None else noise
        conds = ((group, cond) for group in range(1, groups + 1))
        return torch.stack(list(self._integrate(conds, noise, solver, num_steps)), dim=1)

    def _conditions(self, codes: Tensor, groups: int | None) -> tuple[int, Tensor]:
        """How many groups are decoded, and the conditioning vectors that they need."""
        self._check_codes(codes)
        tokens, schedule, size = codes.shape[1], self.schedule, self.config.num_tokens // self.config.num_groups
        if groups is None:
            first = schedule.tokens_for_groups(1)
            more = f", and at least the {first} that the first step reads" if first > size else ""
            whole = tokens % size == 0 and tokens >= max(first, size)
            require(whole, f"codes hold {tokens} tokens: decoding needs a whole number of groups of {size}{more}")
            groups = max(m for m in range(1, self.config.num_groups + 1) if schedule.tokens_for_groups(m) <= tokens)
        needed = schedule.tokens_for_groups(groups)
        require(tokens >= needed, f"{groups} groups need {needed} tokens: the codes hold {tokens}")
        return groups, self.conditioner(self._lookup(codes[:, :needed]))

    @torch.no_grad()
    def stream(
        self,
        chunks: Iterable[Tensor],
        noise: Tensor,
        solver: str = "adams2",
        num_steps: int | None = None,
        check: bool = True,
        start: int = 0,
        correct: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Decode while tokens arrive: one preview (B, 3, H, W) after each group, the last one the image.

        `chunks` are consecutive tokens (B, any number). As soon as a group is complete, its tokens extend the causal
        conditioner (cached) and its diffusion steps run. The other arguments are those of detokenize, but for:

        Args:
            check: whether tokens are looked at, for whose answer the host waits; without, wrong ones are undefined
                behaviour.
            start: n, from 0 to K - 1: start at uniform time n / K, where `noise` is the state already. Previews come
                after groups n + 1 to K.
            correct: gives the velocity to use, of the network's: (B, 3, H, W) both.
        """
        conds = enumerate(self._extend_conditions(chunks, check), start=1)
        return self._integrate(conds, noise, solver, num_steps, start, correct)

    def _extend_conditions(self, chunks: Iterable[Tensor], check: bool) -> Iterator[Tensor]:
        """After each group, the conditioning vectors (B, tokens so far, D)."""
        chunks, cache, cond = iter(chunks), None, None
        waiting, done = [], 0
        for group in range(1, self.config.num_groups + 1):
            needed = self.schedule.tokens_for_groups(group) - done
            while sum(chunk.shape[1] for chunk in waiting) < needed:
                if (chunk := next(chunks, None)) is None:
                    return
                waiting.append(chunk)
            if needed > 0:
                tokens = torch.cat(waiting, dim=1)
                if check:
                    self._check_codes(tokens)
                cache = self.conditioner.make_cache(len(tokens)) if cache is None else cache
                # not compiled: what grows from call to call is no CUDA graph's
                more = self.conditioner.forward(self._lookup(tokens[:, :needed]), cache)
                cond = more if cond is None else torch.cat([cond, more], dim=1)
                waiting, done = [tokens[:, needed:]], done + needed
            yield cond

    @torch.no_grad()
    def _integrate(
        self,
        conds: Iterator[tuple[int, Tensor]],
        noise: Tensor,
        solver: str,
        num_steps: int | None,
        start: int = 0,
        correct: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """After each pair, groups and their conditioning vectors, the preview of the steps that they allow.

        `start` and `correct` are those of `stream`; pairs of no more than `start` groups allow none.
        """
        config, schedule, decoder = self.config, self.schedule, self.decoder
        check_diffusion(solver, num_steps)
        groups, beta = config.num_groups, config.time_shift
        num_steps = groups if num_steps is None else num_steps
        require(0 <= start < groups, f"start is {start}: it must be from 0 to {groups - 1} groups")
        self._check_size(noise.shape[-2:])
        first = start * num_steps // groups  # the step that the start lies in
        starts = tuple(schedule.start(schedule.group_of_step(step, num_steps)) for step in range(first, num_steps))
        times = (shift_time(start / groups, beta), *sampling_times(num_steps, beta)[first + 1 :])
        trajectory = Trajectory(times, starts, config.window, config.num_tokens, solver)
        allowed = ((schedule.steps_for_groups(m, num_steps) - first, cond) for m, cond in conds if m > start)
        static = noise.device.type == "cuda" if decoder.static is None else decoder.static
        replay = static and correct is None and can_capture(decoder)
        run = replay_steps if replay else partial(call_steps, correct=correct)
        for preview in run(decoder, trajectory, noise.float(), allowed):
            yield preview / config.data_std

    def draw_noise(self, batch: int, generator: Generators = None, size: tuple[int, int] | None = None) -> Tensor:
        """Standard normal noise (batch, 3, H, W), by default at image_size, on the model's device."""
        shape = batch, 3, *(size or (self.config.image_size, self.config.image_size))
        draw = partial(torch.randn, dtype=torch.float32)
        return draw_per_sample(draw, shape, generator, self.decoder.conv_in.weight.device)

    def set_noise_aside(self, batch: int, generator: Generators = None) -> Callable[[], Tensor]:
        """A function that draws `draw_noise(batch, generator)`, while the generators go on as if it had been drawn.

        On CUDA, noise of CPU generators can so be drawn beside the tokens; elsewhere it is drawn at once.
        """
        side, device = self.config.image_size, self.decoder.conv_in.weight.device
        copies = skip_normals(generator, 3 * side * side, batch) if device.type == "cuda" else None
        if copies is None:
            noise = self.draw_noise(batch, generator)
            return lambda: noise
        return partial(self.draw_noise, batch, copies)

    # ---- training

    def training_losses(self, images: Tensor, u: Tensor | None = None, noise: Tensor | None = None) -> dict[str, Any]:
        """Losses of one training step (paper, section 3.1).

        Args:
            images: (B, 3, H, W) in [-1, 1].
            u: (B,) uniform times in [0, 1]; None draws them.
            noise: like images; None draws it.

        Returns:
            "flow": squared error of the network's output, by config.prediction velocity or image, over data_std^2;
            the quantizer's losses by their names, which "quantizer" lists: for vq "vq" and "commit" (0.25 included);
            those per token are averages over the "read" tokens, those up to the last that a step reads;
            "flow_each" (B,), detached; "group" (B,), the group of tokens that each image trains, 0..K-1; "t" (B,), flow
            times; "x1_hat" (B, 3, H, W), the estimate of the image; "codes" (B, N); "latents" (B, N, codebook_dim),
            detached, on the unit sphere, before quantization; with a REPA head also "hidden" (B, D, h, w), its input.
        """
        self._check_size(images.shape[-2:])
        u = torch.rand(len(images), device=images.device) if u is None else u
        latents = self.encoder(images.to(self.dtype))
        window = self.schedule.windows(u)
        read = torch.arange(self.config.num_tokens, device=u.device) <= window[:, -1:]  # (B, N)
        quantized, codes, parts = self.quantizer(latents, read)
        losses = self._flow_loss(images, quantized, u, noise)
        taken = sorted(parts.keys() & (losses.keys() | NOT_OF_QUANTIZER))
        require(not taken, f"quantizer {self.config.quantizer} names a loss {', '.join(taken)}: give it another name")
        count = read.sum()
        losses |= {name: (part * read).sum() / count if part.ndim else part for name, part in parts.items()}
        return losses | {
            "quantizer": tuple(parts),
            "read": count,
            "codes": codes,
            "group": self.schedule.group_of_time(u).clamp(max=self.config.num_groups - 1),
            "latents": F.normalize(latents.detach().float(), dim=-1),
        }

    @torch.no_grad()
    def flow_of_codes(self, images: Tensor, codes: Tensor, u: Tensor, noise: Tensor) -> Tensor:
        """The flow loss of each image (B,) where the decoder reads these tokens (B, N), the image's own or others."""
        return self._flow_loss(images, self._lookup(codes), u, noise)["flow_each"]

    def _flow_loss(self, images: Tensor, latents: Tensor, u: Tensor, noise: Tensor | None) -> dict[str, Tensor]:
        config = self.config
        cond = self.conditioner(latents)
        window = self.schedule.windows(u)  # (B, n)
        cond = cond.gather(1, window[:, :, None].expand(-1, -1, cond.shape[-1]))
        x1 = config.data_std * images
        x0 = torch.randn_like(x1) if noise is None else noise
        t = shift_time(u, config.time_shift)
        share = t.view(-1, 1, 1, 1)  # of the image
        x_t = share * x1 + (1 - share) * x0
        output, hidden = self.decoder.predict(x_t, t, cond)
        # An image estimate is compared with the image: in velocity, the steps near t = 1 would drown all others.
        if config.prediction == "image":
            target, estimate = x1, output
        else:
            target, estimate = x1 - x0, x_t + (1 - share) * output
        flow = (output - target).square() / config.data_std**2
        losses = {"flow": flow.mean(), "flow_each": flow.detach().mean(dim=(1, 2, 3))}
        losses |= {"x1_hat": estimate / config.data_std, "t": t}
        return losses if hidden is None else losses | {"hidden": hidden}

    # ---- checks

    def _check_size(self, size) -> None:
        for name in ("encoder_patch_size", "decoder_patch_size"):
            patch = getattr(self.config, name)
            fits = not any(side % patch for side in size)
            require(fits, f"image size {tuple(size)} is not a multiple of {name} {patch}")

    def _check_codes(self, codes: Tensor) -> None:
        most, last = self.config.num_tokens, self.config.codebook_size - 1
        fits = codes.ndim == 2 and not codes.is_floating_point() and codes.shape[1] <= most
        require(fits, f"codes are {codes.dtype} {tuple(codes.shape)}: need integers (B, at most {most})")
        low, high = torch.stack(codes.aminmax()).tolist() if codes.numel() else (0, 0)  # one wait for the device
        require(0 <= low <= high <= last, f"codes are from {low} to {high}: need 0 to {last}")
