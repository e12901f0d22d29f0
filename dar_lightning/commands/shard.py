"""`dar shard`: convert image folders, ImageNet archives and Hugging Face data sets to WebDataset shards."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from dar_lightning.data.prepare.hf_dataset import hf_dataset, is_saved
from dar_lightning.data.prepare.ilsvrc import VAL_NAME, first_names, train_archive, val_archive
from dar_lightning.data.prepare.packing import SKIPPED, make_shards
from dar_lightning.data.prepare.sources import (
    Source,
    check_classes,
    choose_classes,
    image_folder,
    shards,
    with_safe_keys,
)
from dar_lightning.errors import MOST_PIXELS, UserError, check_range, require
from dar_lightning.files import find_shipped, is_url

HUB = "hf://"
SHOWN = 10  # skipped images that are named on the screen; the file has all


def shard(
    input: str,
    output: str,
    size: int | None = None,
    quality: int = 95,
    max_per_shard: int = 1000,
    val_fraction: float = 0.0,
    classes: str | None = None,
    labels: str | None = None,
    split: str | None = None,
    seed: int | None = 0,
    workers: int | None = None,
    max_bad_share: float = 0.01,
    unlabelled: bool = False,
    captions: str | None = None,
) -> None:
    """Make WebDataset shards for ImageNetDataModule.

    Images in a folder that has no folders have no labels. Captions, where there are some, go into each image's `.json`.

    Every shard is written whole or not at all, and the index last: repeat the command after an interruption, and it
    keeps the shards that are there and makes what is missing. The same input and options give the same bytes, with
    any number of workers. Images that cannot be decoded are left out, counted and named in `skipped.json`.

    Args:
        input: A folder with a folder of images per class, or with images; ILSVRC2012_img_train.tar or
            ILSVRC2012_img_val.tar as distributed; a folder or brace pattern of shards to pack anew; a Hugging Face data
            set: hf://NAME or a folder that `save_to_disk` wrote.
        output: Folder for the shards and their index.json.
        size: Short side in pixels: larger images are scaled as in ADM and stored as JPEG. Left out, and for images
            that are not larger, the bytes stay as they are.
        quality: Of those JPEGs, 1 to 100; their colours are kept at full resolution.
        max_per_shard: Images per shard.
        val_fraction: Share of each class that goes to OUTPUT/val; the rest goes to OUTPUT/train. With 0, all shards
            go to OUTPUT itself.
        classes: Class names separated by commas, or a file with one per line: only these, labelled in this order.
        labels: Of ILSVRC2012_img_val.tar: the devkit (its .tar.gz or its folder), or a text file with a WordNet ID
            per image. Left out, ILSVRC2012_devkit_t12.tar.gz beside the images' archive.
        split: Of a Hugging Face data set that has several.
        seed: Of the order of the images, and of the choice for OUTPUT/val; null keeps the order of the source.
        workers: Processes that work at the same time; one per core when left out.
        max_bad_share: Stop when more than this share of the images cannot be used.
        unlabelled: Leave the labels away: the folders of a folder are no classes, and images in it count too.
        captions: The column or JSON field that holds captions, where it is none of captions, caption and text. They
            come from `.txt` and `.json` files beside images, a folder's metadata.csv or metadata.jsonl (with
            `file_name`), samples of shards, or a column of a Hugging Face data set.

    Raises:
        UserError: The input is not as described, or `output` holds something else.
    """
    check_range(1, MOST_PIXELS, size=size)
    check_range(1, max_per_shard=max_per_shard, workers=workers)
    check_range(1, 100, quality=quality)
    check_range(0, 1, val_fraction=val_fraction, max_bad_share=max_bad_share)
    folder = Path(input).resolve()
    if folder.is_dir() and Path(output).resolve().is_relative_to(folder):  # it would be a part of its own input
        raise UserError(f"output: {output} is input or lies in it; choose a folder elsewhere")
    if unlabelled and (labels is not None or classes is not None):
        raise UserError("unlabelled is set, and so is labels or classes, which are of labels: leave one out")
    source = open_source(input, labels, split, unlabelled, captions)
    if unlabelled:
        source = replace(source, classes=(), samples=[sample._replace(label=-1) for sample in source.samples])
    if classes is not None:
        source = choose_classes(source, classes)
    elif source.samples:
        check_classes(source)
    source = replace(source, samples=with_safe_keys(source.samples))
    total, label_of = len(source.samples), {sample.name: sample.label for sample in source.samples}
    require(total > 0, f"input: {input} holds no images")
    of = f"of {len(source.classes) or 'unnamed'} classes"
    of = of if any(sample.label >= 0 for sample in source.samples) else "without labels"
    captioned = sum(bool(sample.captions) for sample in source.samples)
    print(f"{input}: {source.kind}, {total} images {of}" + (f", {captioned} with captions" if captioned else ""))
    if source.ignored:
        print(f"{len(source.ignored)} files are not named like images and left out: {source.ignored[0]!a}, ...")
    if source.hidden:
        print(f"{len(source.hidden)} hidden or system files and folders are left out: {source.hidden[0]!a}, ...")
    options = {"size": size, "quality": None if size is None else quality, "max_per_shard": max_per_shard}
    options |= {"val_fraction": val_fraction, "seed": seed}
    options |= {} if captions is None else {"captions": captions}
    made = make_shards(source, Path(output), options, workers, max_bad_share)
    skipped = [each for _, bad in made for each in bad]
    size_in_mb = sum(entry.bytes for entry, _ in made) / 1e6
    print(f"{output}: {total - len(skipped)} images in {len(made)} shards, {size_in_mb:.1f} MB")
    for each in skipped[:SHOWN]:
        print(f"  skipped {each['shard']}/{each['key']}: {each['reason']}")
    good = Counter(sample.label for sample in source.samples)
    good.subtract(label_of[each["name"]] for each in skipped)
    for label, name in enumerate(source.classes):
        if not good[label] and label in good:
            print(f"WARNING: none of the images of class {name} can be used")
    if skipped:
        print(f"{len(skipped)} of {total} images skipped; {SKIPPED} beside the index names all")


def open_source(
    input: str, labels: str | None, split: str | None, unlabelled: bool = False, captions: str | None = None
) -> Source:
    """Recognize an input of `dar shard` and list its images; options of other inputs are refused."""
    if is_url(input) and not input.startswith(HUB):
        raise UserError(f"input: {input} is an address; copy it to this machine first, or give hf://NAME")
    path = Path(find_shipped(input))
    first = first_names(path) if path.is_file() and path.suffix == ".tar" else []
    is_val = any(VAL_NAME.search(name) for name in first) and not any(name.endswith(".cls") for name in first)
    is_hf = input.startswith(HUB) or is_saved(path)
    if labels is not None and not is_val:
        raise UserError(f"labels is {labels}: only ILSVRC2012_img_val.tar needs them, input is {input}")
    if split is not None and not is_hf:
        raise UserError(f"split is {split}: only Hugging Face data sets have splits, input is {input}")
    if is_hf:
        return hf_dataset(input.removeprefix(HUB), split, captions)
    if is_val:
        return val_archive(path, labels)
    if any(name.endswith(".tar") for name in first):
        return train_archive(path)
    if input.endswith(".tar") or (path.is_dir() and any(path.glob("*.tar"))):
        return shards(input)
    if path.is_dir():
        return image_folder(path, unlabelled, captions)
    what = "is a file of another kind" if path.exists() else "does not exist"
    raise UserError(f"input: {input} {what}; give a folder, an ILSVRC2012 archive, shards or hf://NAME")
