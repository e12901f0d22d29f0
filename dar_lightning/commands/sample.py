"""`dar sample`: draw images with a pipeline, and show how they came to be."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dar_lightning.data.transforms import center_crop, to_float, to_tensor, to_uint8
from dar_lightning.devices import choose_device
from dar_lightning.errors import UserError
from dar_lightning.figures import image_grid, save_png
from dar_lightning.files import atomic_path, write_text
from dar_lightning.pipeline import DARPipeline
from dar_lightning.weights import fingerprint


def sample(
    pipeline: str,
    output: str,
    classes: str = "all",
    per_class: int = 4,
    seed: int = 0,
    guidance: float | tuple[float, float] = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    solver: str = "adams2",
    num_steps: int | None = None,
    layout: str | None = None,
    prefix: int | None = None,
    batch_size: int = 32,
    device: str = "auto",
) -> None:
    """Draw images of some classes; write pictures, arrays and everything needed to repeat it.

    Writes `samples.png` (a row per class), `previews.png` (a film strip for the first image of each class: the
    preview after each group of tokens), `samples.npz` (`arr_0` uint8 (n, H, W, 3), `labels`) and `samples.json`. With
    `layout`, `layout.png`: the reference image, and for each class the images that share its first tokens.

    Args:
        pipeline: folder or Hugging Face repository.
        output: folder to write to.
        classes: class names or numbers, separated by commas, or "all".
        per_class: images per class.
        seed: image i of a class is a function of (seed, class, i) alone, whatever the batch size.
        guidance: scale of classifier-free guidance, or [a, b], linear over the tokens.
        temperature: of the token distribution.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens with this much probability.
        solver: "adams2", "euler" or "adams2_variable".
        num_steps: diffusion steps; None is the number of groups.
        layout: an image file whose first tokens every sample keeps.
        prefix: how many tokens to keep of it; None is one group.
        batch_size: images at a time.
        device: where to compute: auto, cpu, cuda, cuda:N or mps.
    """
    place = choose_device(device)
    pipe = DARPipeline.from_pretrained(pipeline).to(place)
    names = [str(label) for label in range(pipe.ar.config.num_classes)] if classes == "all" else classes.split(",")
    labels = [pipe.label(name.strip()) for name in names]
    if per_class < 1 or batch_size < 1:
        raise UserError(f"per_class {per_class} and batch_size {batch_size} must be at least 1")
    kept, reference = None, None
    if layout is not None:
        reference = _read_image(layout, pipe.tokenizer.config.image_size)
        count = pipe.tokenizer.config.window if prefix is None else prefix
        if not 1 <= count < pipe.tokenizer.config.num_tokens:
            raise UserError(f"prefix is {count}: keep from 1 to {pipe.tokenizer.config.num_tokens - 1} tokens")
        kept = pipe.tokenizer.tokenize(to_float(reference[None]).to(place))[:, :count]
    elif prefix is not None:
        raise UserError("prefix is set without layout: give the image whose tokens are to be kept")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)

    options = {
        "guidance": guidance,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "solver": solver,
        "num_steps": num_steps,
    }
    jobs = [(label, number) for label in labels for number in range(per_class)]
    finals, strips = [], []  # (3, H, W) of every image; (K, 3, H, W) of the first one of each class
    for start in tqdm(range(0, len(jobs), batch_size), desc="sample", unit="batch"):
        batch = jobs[start : start + batch_size]
        generators = [torch.Generator().manual_seed(_image_seed(seed, *job)) for job in batch]
        stream = pipe.stream(
            torch.tensor([label for label, _ in batch]),
            prefix=None if kept is None else kept.expand(len(batch), -1),
            generator=generators,
            **options,
        )
        previews = torch.stack([to_uint8(preview.images).cpu() for preview in stream], dim=1)  # (B, K, 3, H, W)
        finals += previews[:, -1].unbind()
        strips += [strip for strip, (_, number) in zip(previews, batch, strict=True) if number == 0]
    images = torch.stack(finals).unflatten(0, (len(labels), per_class))  # (classes, per_class, 3, H, W)

    rows = [pipe.classes[label] if pipe.classes else str(label) for label in labels]
    groups = [f"group {m}" for m in range(1, pipe.tokenizer.config.num_groups + 1)]
    save_png(image_grid(torch.stack(strips), rows, groups), folder / "previews.png")
    if reference is None:
        save_png(image_grid(images, rows), folder / "samples.png")
    else:
        first = reference.expand(len(labels), 1, -1, -1, -1)
        columns = ["reference", *[f"seed {seed}.{number}" for number in range(per_class)]]
        save_png(image_grid(torch.cat([first, images.to(first)], dim=1), rows, columns), folder / "layout.png")
    _save_arrays(images.flatten(0, 1), torch.tensor(labels).repeat_interleave(per_class), folder)
    record = options | {
        "pipeline": pipeline,
        "tokenizer": fingerprint(pipe.tokenizer),
        "ar": fingerprint(pipe.ar),
        "classes": rows,
        "per_class": per_class,
        "seed": seed,
        "layout": layout,
        "prefix": None if kept is None else kept[0].tolist(),
    }
    text = json.dumps(record, indent=2) + "\n"
    write_text(folder / "samples.json", text)
    print(f"{output}: {len(jobs)} images of {len(labels)} classes")


def _image_seed(seed: int, label: int, number: int) -> int:
    digest = hashlib.sha256(f"{seed}/{label}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # a torch seed has 63 bits


def _read_image(path: str, size: int) -> Tensor:
    try:
        with Image.open(path) as image:
            return to_tensor(center_crop(image.convert("RGB"), size))
    except OSError as error:
        raise UserError(f"layout: {path} is not a readable image ({error})") from error


def _save_arrays(images: Tensor, labels: Tensor, folder: Path) -> None:
    # A file object, since savez would add .npz to a name.
    with atomic_path(folder / "samples.npz") as part, open(part, "wb") as file:
        np.savez_compressed(file, arr_0=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
