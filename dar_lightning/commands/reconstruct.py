"""`dar reconstruct`: reconstruct images with a tokenizer; PSNR, SSIM, codebook use and token influence."""

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dar_lightning.devices import Dtype, choose_device, dtype_name, torch_dtype
from dar_lightning.errors import UserError, begin_work, check_range, naming
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.generation.drawing import image_generator
from dar_lightning.generation.grids import image_grid, save_png
from dar_lightning.layers import check_compiler, compile_blocks
from dar_lightning.metrics.codebook import CodebookUse
from dar_lightning.metrics.images import ShardImages
from dar_lightning.metrics.reconstruction import (
    TOKEN_INFLUENCE_PROTOCOL,
    mean_scores,
    reconstruct_all,
    reconstruction_protocol,
    reconstruction_scores,
    token_influence,
    token_influence_names,
)
from dar_lightning.records.pixels import image_digests, set_sha256
from dar_lightning.records.protocol import Protocol, write_metrics
from dar_lightning.records.provenance import provenance
from dar_lightning.tokenizer.flow import check_diffusion
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer


@torch.no_grad()
def reconstruct(
    tokenizer: str,
    shards: str,
    output: str,
    solver: str = "adams2",
    num_steps: int | None = None,
    num_shown: int = 12,
    num_exchanged: int = 64,
    batch_size: int = 64,
    seed: int = 0,
    device: str = "auto",
    dtype: Dtype | None = None,
    compile: bool = False,
) -> None:
    """Encode and decode all images of some shards; write metrics and pictures.

    Writes `reconstructions.png` (original, then the preview after each group of tokens, coarse to fine; a row per
    image) and `reconstruction.json` (PSNR, SSIM, codebook use, and how much the tokens decide, with their protocol).

    Args:
        tokenizer: folder or Hugging Face repository of a tokenizer.
        shards: image shards: a folder, one tar, or a brace pattern. Images are centre crops at the tokenizer's size.
        output: folder to write to.
        solver: "adams2", "euler" or "adams2_variable".
        num_steps: diffusion steps; None is the tokenizer's number of groups.
        num_shown: rows of the picture, spread over the shards.
        num_exchanged: images, spread over the shards, that are also decoded from other noise and with another image's
            tokens, five times each; they are kept in memory. 0 measures none.
        batch_size: images at a time.
        seed: of the noise that decoding starts from.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: of the weights: float32, or bfloat16, which rounds more, so that some tokens are others; None: as stored.
        compile: torch.compile encoder and pixel decoder; on a CPU this needs a C++ compiler.
    """
    check_diffusion(solver, num_steps)
    check_range(1, batch_size=batch_size, num_shown=num_shown)
    check_range(0, num_exchanged=num_exchanged)
    if num_exchanged == 1:
        raise UserError(f"num_exchanged is {num_exchanged}: another image's tokens need 2 images or more; 0 for none")
    place = choose_device(device)
    model = SequentialDiffusionTokenizer.from_pretrained(tokenizer)
    weights = model_sha256(model)  # as they are stored
    model.to(device=place, dtype=torch_dtype(dtype))
    made = provenance(place, dtype_name(model.dtype))
    if compile:
        check_compiler(place)
        compile_blocks(model.encoder, model.decoder)
    config = model.config
    image_set = ShardImages(shards, "shards", config.image_size, labels=False)
    folder, count = Path(output), len(image_set)
    with naming("output", OSError):
        folder.mkdir(parents=True, exist_ok=True)
    # numbers of images, evenly spread
    shown, exchanged = (
        set(torch.linspace(0, count - 1, min(number, count)).long().tolist()) for number in (num_shown, num_exchanged)
    )
    begin_work()
    codebook = CodebookUse(config.codebook_size).to(place)
    decoding = {"solver": solver, "num_steps": num_steps}
    scores, digests, rows, kept = [], [], [], []
    for batch in reconstruct_all(model, image_set, batch_size, seed, previews=True, **decoding):
        scores.append(reconstruction_scores(batch.decoded[:, -1], batch.images))
        codebook.update(batch.codes)
        digests += image_digests(batch.images.permute(0, 2, 3, 1).cpu().numpy())
        for number, image, codes, previews in zip(*batch, strict=True):
            if number in shown:
                rows.append(torch.cat([image[None], previews]))
            if number in exchanged:
                kept.append((number, image.clone(), codes.clone()))  # not the whole batch
    use, perplexity = map(float, codebook.compute())
    metrics = mean_scores(scores) | {"codebook_use": use, "codebook_perplexity": perplexity}
    methods: dict[str, Any] = {"reconstruction": reconstruction_protocol()}
    psnr = "PSNR infinite" if metrics["psnr"] is None else f"PSNR {metrics['psnr']:.2f} dB"
    if len(kept) > 1:
        numbers, images, codes = zip(*kept, strict=True)
        images, codes = torch.stack(images), torch.stack(codes)
        others, parts = codes.roll(-1, dims=0), []
        for part in tqdm(torch.arange(len(kept)).split(batch_size), desc="exchange tokens", unit="batch"):
            generators = [image_generator(seed, numbers[i]) for i in part]
            parts.append(token_influence(model, images[part], codes[part], others[part], generators, **decoding))
        means = torch.cat(parts).mean(dim=0).tolist()
        metrics |= zip(token_influence_names(config.num_groups), means, strict=True)
        sha256 = set_sha256(digests[number] for number in numbers)
        methods["token_influence"] = {"images": {"n": len(kept), "sha256": sha256}} | TOKEN_INFLUENCE_PROTOCOL
        own, other, same = (metrics[f"psnr_{name}_tokens"] for name in ("own", "other", "same"))
        psnr += f" ({own:.2f} with own, {other:.2f} with other tokens; {same:.2f} between two noises)"
    samples = {"reconstructions": "of the reference", "tokenizer_sha256": weights, "ema": {"tokenizer": model.averaged}}
    samples |= {"seed": seed, "solver": solver, "steps": num_steps or config.num_groups}
    samples |= {"dtype": dtype_name(model.dtype), "compile": compile, "n": count}
    reference = image_set.protocol | {"n": count, "sha256": set_sha256(digests)}
    protocol = Protocol(samples, reference, 2 * [config.image_size], methods, made)
    write_metrics(folder / "reconstruction.json", metrics, protocol)
    columns = ["original", *(f"{model.schedule.tokens_for_groups(m)} tokens" for m in range(1, config.num_groups + 1))]
    save_png(image_grid(torch.stack(rows), captions=columns), folder / "reconstructions.png")
    print(f"{output}: {psnr}, SSIM {metrics['ssim']:.3f}, {use:.1%} of the codes in use")
