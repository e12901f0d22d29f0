"""`dar sample`: image grids of classes or prompts, previews, animations and layout control with a pipeline."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dar_lightning.ar import gumbel
from dar_lightning.ar.decode_road import choose_road
from dar_lightning.ar.guidance import Guidance, read_guidance
from dar_lightning.ar.jacobi import check_jacobi
from dar_lightning.ar.sampling import check_filter
from dar_lightning.devices import Dtype, choose_device, torch_dtype
from dar_lightning.errors import UserError, begin_work, check_range, naming, require
from dar_lightning.files import file_sha256
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.generation.drawing import Job, draw_images
from dar_lightning.generation.editing import draw_alike, middle, prefix_lengths, read_edit, read_photo, tokenize
from dar_lightning.generation.grids import image_grid, save_animation, save_png, stream_frames, to_image
from dar_lightning.generation.npz import write_npz
from dar_lightning.generation.pipeline import DARPipeline
from dar_lightning.layers import check_compiler, compile_blocks
from dar_lightning.records.drawn import NAMES, write_drawn
from dar_lightning.records.provenance import provenance
from dar_lightning.tokenizer.flow import check_diffusion

ANIMATED = 16  # images in the animation, at most
PREVIEW_SECONDS = 0.5  # that it shows each preview for
GREY = 128  # where the grid shows what was drawn anew
METADATA = "dar"  # the text chunk of a PNG


def sample(
    output: str,
    pipeline: str | None = None,
    tokenizer: str | None = None,
    ar: str | None = None,
    classes: str = "all",
    per_class: int = 4,
    numbers: str | int | None = None,
    seed: int = 0,
    guidance: Guidance = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    solver: str = "adams2",
    num_steps: int | None = None,
    groups: int | None = None,
    num_previews: int | None = None,
    frames: int = 4,
    layout: str | None = None,
    variations: bool = False,
    prefix: str | int | None = None,
    variation_strength: float | None = None,
    image: str | None = None,
    mask: str | None = None,
    start: int = 0,
    evidence: float | None = None,
    batch_size: int = 32,
    device: str = "auto",
    dtype: Dtype | None = None,
    compile: bool = False,
    prompt: list[str] | str | None = None,
    encoder: str | None = None,
    static: bool | None = None,
    jacobi: int = 0,
) -> None:
    """Draw images of some classes, or of prompts; write pictures, arrays and everything needed to repeat it.

    Writes `samples.png` (a row per class or prompt), `previews.png` (a film strip for the first image of each: the
    preview after each group, with the number of tokens below it), `stream.webp` (the same as an animation, of up to 16
    images), `images/` (a PNG per image, which carries its seed, class and settings), `samples.npz` (`arr_0` uint8
    (n, H, W, 3), and `labels` of classes) and `samples.json`. With `layout`, `variations` or `image`, `layout.png`,
    `variations.png` or `edited.png` takes the place of `samples.png`.

    Args:
        output: folder to write to.
        pipeline: folder, Hugging Face repository, or "fruit64", which comes with the package.
        tokenizer: instead of a pipeline, with `ar`: a folder or repository, or a checkpoint of `dar fit`.
        ar: the same for the AR model; its classes have numbers and no names.
        classes: class names or numbers, separated by commas, or "all".
        per_class: images per class or prompt.
        numbers: draw these images of each class or prompt, separated by commas, instead of the first ones: of drafts,
            those to finish. With variations, the one image that is varied.
        seed: image i of a class or prompt is a function of (seed, class or prompt, i) alone, whatever the batch size.
        guidance: scale of classifier-free guidance, "a,b", linear over the tokens, "power_cosine,SCALE,POWER",
            "interval,SCALE,FROM_GROUP,TO_GROUP", or "my_file.MyClass,VALUE,...".
        temperature: of the token distribution.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens with this much probability.
        solver: "adams2", "euler" or "adams2_variable".
        num_steps: diffusion steps; None is the number of groups.
        groups: draw only the tokens of the first groups, and take the preview after them: drafts.
        num_previews: how many of the previews the film strip shows, evenly spaced, the last one always; None is all.
        frames: frames of the animation per preview; those in between fade from one to the next.
        layout: an image file whose first tokens every sample keeps (paper, Fig. 6).
        variations: every sample keeps the first tokens of the class's first image, and draws the others anew.
        prefix: how many tokens to keep for layout or variations, or several numbers, separated by commas; None is one
            group. With image: how many of its first tokens to keep; None is none.
        variation_strength: with variations: keep all tokens instead, and mix the noise with new noise; 0 changes
            nothing, 1 takes new noise alone.
        image: an image file to edit: what mask, start and evidence are about. Its middle square is used.
        mask: an image file of the same size: white is drawn anew, black is kept, pixel by pixel. Without a mask nothing
            is kept as it is.
        start: how many groups' diffusion steps to leave out: the drawing starts from the noised image.
        evidence: how much the image's tokens are preferred; None is 8, which continues it, 0 to 4 change it.
        batch_size: images at a time.
        device: where to compute: auto, cpu, cuda, cuda:N or mps.
        dtype: of the weights: float32, or bfloat16, which rounds more, so that some tokens are others; None: as stored.
        compile: torch.compile the pixel decoder, for many images; on a CPU this needs a C++ compiler.
        prompt: instead of classes, what to draw in words, for a model that takes text; or a list of such texts.
        encoder: the text encoder of a model of features, where it is not where it was in training: a folder or Hugging
            Face repository.
        static: draw the tokens by a step of static shapes, on CUDA as a graph, or by calls of the model; None does the
            first on CUDA.
        jacobi: draw a window of so many tokens at once until they are those of drawing one by one: faster for one image
            or a few (docs/beyond.md). 0 is off.
    """
    place = choose_device(device)
    check_diffusion(solver, num_steps)
    check_filter(temperature, top_k, top_p)
    check_range(1, batch_size=batch_size)
    check_range(1, 10**6, per_class=per_class)  # all are in memory; `dar predict` draws more
    check_range(1, 1000, frames=frames)
    sources = {"pipeline": pipeline, "tokenizer": tokenizer, "ar": ar}
    if {name for name, source in sources.items() if source is not None} not in ({"pipeline"}, {"tokenizer", "ar"}):
        raise UserError("give pipeline (a folder, a repository or fruit64), or else tokenizer and ar")
    pipe = DARPipeline.from_parts(tokenizer, ar) if pipeline is None else DARPipeline.from_pretrained(pipeline)
    weights = {"tokenizer": model_sha256(pipe.tokenizer), "ar": model_sha256(pipe.ar)}  # as they are stored
    pipe.to(device=place, dtype=torch_dtype(dtype))
    if compile:
        check_compiler(place)
        compile_blocks(pipe.tokenizer.decoder)
    config = pipe.tokenizer.config
    use_encoder(pipe, encoder)
    labels = choose_labels(pipe, classes, prompt)
    seen = pipe.preview_groups(groups, start)
    shown = preview_numbers(num_previews, len(seen))
    given = [name for name, value in (("layout", layout), ("variations", variations), ("image", image)) if value]
    require(len(given) <= 1, f"{' and '.join(given)} are both set: tokens are kept of one image, give one of them")
    keeps = layout is not None or variations or (image is not None and prefix is not None)
    if prefix is not None and not keeps:
        raise UserError("prefix is set without layout, variations or image: give the image whose tokens are to be kept")
    wanted = image_numbers(numbers, per_class)
    if variation_strength is not None and (not variations or prefix is not None or groups is not None):
        raise UserError("variation_strength is for variations without prefix and groups: all tokens are kept")
    check_range(0, 1, variation_strength=variation_strength)
    if variations and numbers is not None and len(wanted) > 1:
        raise UserError(f"numbers is {numbers}: variations are of one image")
    lengths = prefix_lengths(prefix, config.num_tokens, config.num_groups) if keeps else [0]
    options: dict[str, Any] = dict(guidance=read_guidance(guidance), temperature=temperature, top_k=top_k, top_p=top_p)
    options |= dict(solver=solver, num_steps=num_steps)
    options |= {} if static is None else {"static": static}
    options |= {"jacobi": jacobi} if jacobi else {}
    check_jacobi(pipe.ar.config, jacobi, static)
    pipe.guidance_scales(options["guidance"])  # says so if it does not fit
    edit = read_edit(pipe, image, mask, start, evidence)

    firsts: dict[str, Tensor] = {}  # title: the images (classes, 3, H, W) that the rows of the grid begin with
    kept = torch.empty(len(labels), 0, dtype=torch.long)
    photo = {"layout_sha256": None, "kept_tokens": None}  # the command names a file, which may change
    special = {"numbers": numbers, "groups": groups, "variation_strength": variation_strength, "start": start or None}
    if (source := image if layout is None else layout) is not None:
        which = "image" if layout is None else "layout"
        picture = read_photo(source, f"{which}: {source}")
        firsts["original" if layout is None else "reference"] = middle(pipe, picture).expand(len(labels), -1, -1, -1)
        kept = tokenize(pipe, picture).expand(len(labels), -1)
        photo |= {f"{which}_sha256": file_sha256(Path(source)), "kept_tokens": kept[0, : max(lengths)].tolist()}
    if mask is not None:
        firsts["to draw"] = torch.where(edit["known"], firsts["original"], GREY)
        photo["mask_sha256"] = file_sha256(Path(mask))
    if variations:
        picked, wanted = wanted[0], range(wanted[0] + 1, wanted[0] + 1 + per_class)
        originals = draw_images(pipe, [Job(label, picked) for label in labels], seed, batch_size, options)
        first, kept = map(torch.stack, zip(*((previews[-1], codes) for previews, codes in originals), strict=True))
        firsts[f"seed {seed}.{picked}"] = first
        lengths = lengths if variation_strength is None else [kept.shape[1]]
    special |= {"image": image, "mask": mask, "evidence": edit.get("evidence")}
    special = {name: value for name, value in special.items() if value is not None}
    begin_work()
    jobs = [
        Job(label, number, tokens[:length])
        for length in lengths
        for label, tokens in zip(labels, kept, strict=True)
        for number in wanted
    ]
    class_names = [pipe.classes[each] if pipe.classes else str(each) for each in labels]
    numbered = {label: label if prompt is None else number for number, label in enumerate(labels)}
    drawn_with = {"token_draws": gumbel.METHOD, "weights": weights, "dtype": pipe.dtypes, "compile": compile}
    calls = False if edit.get("evidence") else static  # a bias is added to what the model says
    drawn_with["decoding"] = "Jacobi" if jacobi else choose_road(pipe.ar, calls)
    made = provenance(place, ", ".join(sorted({*pipe.dtypes.values()})))
    folder = Path(output)
    with naming("output", OSError):
        folder.mkdir(parents=True, exist_ok=True)

    images, strips = [], []  # (3, H, W) of every image; (K, 3, H, W) of the first one of each class
    if variation_strength is None:
        drawn = draw_images(pipe, jobs, seed, batch_size, options | edit | {"static": calls}, groups)
    else:
        drawn = draw_alike(pipe, jobs, picked, seed, variation_strength, batch_size, solver=solver, num_steps=num_steps)
    for job, (previews, codes) in zip(jobs, drawn, strict=True):
        images.append(previews[-1])
        if job.number == wanted[0] and len(strips) < len(labels):
            strips.append(previews)
        about = {"class": class_names[labels.index(job.label)], "label": job.label}
        about = {"prompt": job.label} if prompt is not None else about
        about |= {"seed": seed, "number": job.number}
        about |= options | special | drawn_with | {"kept_tokens": len(job.kept), "codes": codes.tolist()}
        suffix = f"-{len(job.kept)}" if len(lengths) > 1 else ""
        name = f"images/{numbered[job.label]:03d}-{job.number}{suffix}.png"
        save_png(to_image(images[-1]), folder / name, {METADATA: json.dumps(about)})

    strips = torch.stack(strips)  # (classes, K, 3, H, W)
    counts = [pipe.tokenizer.schedule.tokens_for_groups(m) for m in seen]
    columns = [f"{counts[m - 1]} tokens" for m in shown]
    strip = image_grid(strips[:, [m - 1 for m in shown]], class_names, captions=columns)
    save_png(strip, folder / "previews.png")
    animation = stream_frames(strips[:ANIMATED], class_names[:ANIMATED], counts, frames)
    save_animation(animation, folder / "stream.webp", PREVIEW_SECONDS / frames)
    grid = torch.stack(images).unflatten(0, (len(lengths), len(labels), len(wanted)))
    grid = grid.transpose(0, 1).flatten(1, 2)  # (classes, lengths * wanted, 3, H, W)
    name, columns = "samples", None
    if firsts:
        name = "variations" if variations else "layout" if layout is not None else "edited"
        grid = torch.cat([*(first[:, None] for first in firsts.values()), grid], dim=1)
        how = [f"{length} kept, " if keeps else "" for length in lengths]
        columns = [*firsts, *(f"{each}{seed}.{number}" for each in how for number in wanted)]
    save_png(image_grid(grid, class_names, columns), folder / f"{name}.png")

    pixels = torch.stack(images).permute(0, 2, 3, 1).numpy()  # (n, H, W, 3)
    classed = pipe.ar.condition.takes == "labels"
    classed = np.array([job.label for job in jobs]) if classed else None
    digest = write_npz(folder / "samples.npz", [pixels], pixels.shape, classed)
    asked = {"classes": ",".join(map(str, labels))} if prompt is None else {"prompt": labels, "encoder": encoder}
    given = sources | special | asked | {"per_class": per_class, "seed": seed} | options
    given |= {"num_previews": num_previews, "frames": frames, "layout": layout, "variations": variations or None}
    prefixed = keeps and variation_strength is None
    given |= {"prefix": ",".join(map(str, lengths)) if prefixed else None, "batch_size": batch_size}
    given |= {"dtype": dtype, "compile": compile or None}
    record = given | drawn_with | photo | {"ema": pipe.averaged, "classes": class_names, "provenance": made}
    record[NAMES] = list(pipe.classes)
    record["steps"] = config.num_groups if num_steps is None else num_steps
    record["command"] = command_line("sample", given | {"output": output})
    write_drawn(folder / "samples.npz", record, digest)
    print(f"{output}: {len(jobs)} images of {len(labels)} {'classes' if prompt is None else 'prompts'}")


def choose_labels(pipe: DARPipeline, classes: str, prompt: list[str] | str | None) -> list[int] | list[str]:
    """What the options ask for: labels of classes, or prompts; each once."""
    if prompt is None:
        names = map(str, range(pipe.num_labels)) if classes == "all" else classes.split(",")
        labels = [pipe.label(name.strip()) for name in names]
        option, what = f"classes is {classes}", "class"
    else:
        require(classes == "all", "classes and prompt are both set: a model takes one of the two")
        labels = [prompt] if isinstance(prompt, str) else list(prompt)
        pipe.condition(labels)  # says so if it cannot be read
        option, what = f"prompt is {labels}", "prompt"
    require(len({*labels}) == len(labels), f"{option}: name each {what} once (per_class draws more of it)")
    return labels


def use_encoder(pipe: DARPipeline, encoder: str | None) -> None:
    """Load the text encoder of a pipeline of its features, if it is one; None: from where it was in training."""
    if hasattr(pipe.ar.condition, "use_encoder"):
        pipe.ar.condition.use_encoder(encoder)
    elif encoder is not None:
        raise UserError(f"encoder is {encoder}: condition {pipe.ar.config.condition!r} needs none, leave it out")


def image_numbers(numbers: str | int | None, per_class: int) -> list[int]:
    """The numbers of the images of each class: those of the option, else 0 to per_class - 1."""
    words = [] if numbers is None else str(numbers).split(",")
    found = [int(word) if word.strip().isdecimal() else -1 for word in words]
    if -1 in found or len({*found}) < len(found):
        raise UserError(f"numbers is {numbers}: give numbers from 0, each once, separated by commas")
    return found or list(range(per_class))


def preview_numbers(count: int | None, num_groups: int) -> list[int]:
    """Which previews, 1 to num_groups, a strip of so many shows: evenly spaced, the last one always."""
    count = num_groups if count is None else count
    require(1 <= count <= num_groups, f"num_previews is {count}: this tokenizer has from 1 to {num_groups}")
    return [-(-num_groups * (i + 1) // count) for i in range(count)]


def command_line(verb: str, options: dict[str, Any]) -> str:
    """The command that gives these options; those that are None are left out."""
    words = ["dar", verb]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", json.dumps(value) if isinstance(value, list | tuple | bool) else str(value)]
    return shlex.join(words)
