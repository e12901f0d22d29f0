"""Rebuild data/emoji64 byte for byte: 64x64 pictures of things in three styles, with captions, as WebDataset shards.

The pictures are the animals, food, activities, places and objects among the emoji of three vendors, as packaged on npm:
Noto Emoji (Apache-2.0), Twemoji (CC BY 4.0), Fluent Emoji flat (MIT). Names: Unicode CLDR, by emojibase-data.
data/emoji64/NOTICE holds the licences. What is done to them:

1. On white, at 64x64 (Noto and Twemoji come at this size, Fluent is drawn from vectors), as lossless WebP of the
   smallest palette that keeps 44 dB and every channel within 16 of 255; where none does, of all colours.
2. A caption each: the name in lower case ASCII, and the style ("red apple, noto style").
3. Three splits: train; `val`, names that are not in train in any style; `val_styles`, pictures whose name is in train
   in other styles only.
4. An exact copy of a drawing under another name is left out.

Needs npm for the packages (143 MB, mostly sheets that are not used; nothing of them is executed), and
`pip install pillow==13.0.0 resvg-py==0.5.0`: other versions may give other bytes. Usage:

    python data/build_emoji64.py [--packages DIR] [--output data/emoji64] [--check]
"""

import argparse
import base64
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageStat

from dar_lightning.data.shards import ShardIndex, write_shard

PACKAGES = {  # what for: name, version, integrity (SHA-512) as the registry gives it
    "noto": (
        "emoji-datasource-google",
        "15.1.2",  # Noto Emoji v2.042; later ones are of a version whose licence file changed
        "RzBMQtclTnSDgjf/QbcNAkgZmA7al3TSnQxKJvZNwdDjOOlYdzBSmkvGYP9ZzHpBS4HBQ8IOQDsueV1YCA64LA==",
    ),
    "twemoji": (
        "emoji-datasource-twitter",
        "16.0.0",
        "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
    ),
    "fluent": (
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "names": (
        "emojibase-data",
        "17.0.0",
        "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    ),
}
STYLES = ("noto", "twemoji", "fluent")
VENDORS = {"noto": "google", "twemoji": "twitter"}
CATEGORIES = ("animals-nature", "food-drink", "travel-places", "activities", "objects")  # CLDR's order
SIZE = 64
VAL_FRACTION = 0.1  # of the names
STYLE_FRACTION = 0.05  # of the pictures of the other names
SHARD_SAMPLES = 512
SPLITS = ("train", "val", "val_styles")


@dataclass(frozen=True)
class Name:
    """One emoji: its code points ("1f34e"), name in words, category, subgroup and keywords."""

    code: str
    words: str
    category: str
    subgroup: str
    keywords: tuple[str, ...]


def package(folder: Path, which: str) -> Path:
    """The .tgz of a package, packed by npm where it is not in the folder yet, and checked."""
    name, version, integrity = PACKAGES[which]
    file = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, check=True)
    if base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode() != integrity:
        sys.exit(f"{file}: its SHA-512 is not that of {name} {version}")
    return file


def plain(code: str) -> str:
    """Code points without the variation selector, which some vendors write and some do not: 2764-FE0F -> 2764."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def words(label: str) -> str:
    """A name in lower case ASCII, without colons and brackets."""
    text = unicodedata.normalize("NFKD", label.replace("’", "'")).encode("ascii", "ignore").decode().lower()
    return re.sub(r"\s+", " ", text.replace(" (", ", ").replace(")", "").replace(":", ",")).strip()


def read_names(file: Path) -> list[Name]:
    """The emoji of the five categories, in CLDR's order."""
    with tarfile.open(file) as tar:
        entries = json.load(tar.extractfile("package/en/data.json"))
        groups = json.load(tar.extractfile("package/meta/groups.json"))
    names = []
    for entry in sorted((entry for entry in entries if "group" in entry), key=lambda entry: entry["order"]):
        category, subgroup = groups["groups"][str(entry["group"])], groups["subgroups"][str(entry["subgroup"])]
        if category in CATEGORIES:
            keywords = tuple(entry.get("tags", ()))
            names.append(Name(plain(entry["hexcode"]), words(entry["label"]), category, subgroup, keywords))
    return names


def on_white(picture: bytes) -> Image.Image:
    """A picture with transparency, on white."""
    image = Image.open(io.BytesIO(picture)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def drawn(file: Path) -> Callable[[str], Image.Image | None]:
    """Pictures of Fluent Emoji by code point, drawn from vectors; None where it has none."""
    import resvg_py

    with tarfile.open(file) as tar:
        icons = json.load(tar.extractfile("package/icons.json"))
        by_code = {plain(code): name for code, name in json.load(tar.extractfile("package/chars.json")).items()}

    def picture(code: str) -> Image.Image | None:
        icon = icons["icons"].get(by_code.get(code))
        if icon is None:
            return None
        default = {"left": 0, "top": 0, "width": 16, "height": 16}
        box = " ".join(str(icon.get(key, icons.get(key, value))) for key, value in default.items())
        names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        svg = f'<svg {names} width="{SIZE}" height="{SIZE}" viewBox="{box}">{icon["body"]}</svg>'
        return on_white(bytes(resvg_py.svg_to_bytes(svg, width=SIZE, height=SIZE, skip_system_fonts=True)))

    return picture


def painted(file: Path, vendor: str) -> Callable[[str], Image.Image | None]:
    """Pictures of a vendor by code point; None where it has none of its own (the sheets show another vendor's then)."""
    with tarfile.open(file) as tar:
        own = {
            entry["image"] for entry in json.load(tar.extractfile("package/emoji.json")) if entry[f"has_img_{vendor}"]
        }
        folder = f"package/img/{vendor}/{SIZE}"
        pictures = {
            plain(path.stem): tar.extractfile(member).read()
            for member in tar
            if (path := Path(member.name)).parent.as_posix() == folder and path.name in own
        }
    return lambda code: on_white(pictures[code]) if code in pictures else None


def webp(image: Image.Image) -> bytes:
    """Lossless WebP of the smallest palette that nobody sees a difference of."""
    for colours in (16, 32, 64, 128, 256):
        small = image.quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE).convert("RGB")
        difference = ImageChops.difference(image, small)
        squares = sum(ImageStat.Stat(difference).sum2) / (3 * SIZE * SIZE)
        near = squares == 0 or 10 * math.log10(255**2 / squares) >= 44
        if near and max(high for _, high in difference.getextrema()) <= 16:
            image = small
            break
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True, quality=75, method=6)
    return file.getvalue()


def fraction(text: str) -> float:
    """A number in [0, 1) that is the same everywhere, unlike a random generator's stream."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def kin(code: str) -> str:
    """What must not straddle train and val: a thing in all styles, directions and with or without snow."""
    return "snowman" if code in ("2603", "26c4") else "-".join(p for p in code.split("-") if p not in ("200d", "27a1"))


def split_of(name: Name, style: str, styles: list[str]) -> str:
    """The split of a picture; `styles` are those that draw its name. At most one style of a name is held out."""
    if fraction(f"split 0 {kin(name.code)}") < VAL_FRACTION:
        return "val"
    held_out = styles[int(fraction(f"which {name.code}") * len(styles))]
    chosen = len(styles) > 1 and fraction(f"styles {name.code}") < STYLE_FRACTION * len(styles)
    return "val_styles" if chosen and style == held_out else "train"


def build(packages: Path, output: Path) -> None:
    """Make the splits in `output`, and print what went where."""
    names, seen, copies = read_names(package(packages, "names")), set(), 0
    pictures: dict[tuple[Name, str], Image.Image] = {}
    for style in STYLES:
        file = package(packages, style)
        picture = drawn(file) if style == "fluent" else painted(file, VENDORS[style])
        for name in names:
            image = picture(name.code)
            if image is None:
                continue
            copy = image.tobytes() in seen
            copies += copy
            seen.add(image.tobytes())
            if not copy:
                pictures[name, style] = image
    styles_of = {name: [style for style in STYLES if (name, style) in pictures] for name in names}
    samples: dict[str, list[tuple[str, dict[str, bytes]]]] = {split: [] for split in SPLITS}
    for (name, style), image in pictures.items():
        about = dict(name=name.words, style=style, emoji=name.code, subgroup=name.subgroup, keywords=name.keywords)
        members = {
            "webp": webp(image),
            "cls": str(CATEGORIES.index(name.category)).encode(),
            "txt": f"{name.words}, {style} style".encode(),
            "json": json.dumps(about, separators=(",", ":")).encode(),
        }
        samples[split_of(name, style, styles_of[name])].append((f"{style}-{name.code}", members))
    for split, part in samples.items():
        part.sort(key=lambda sample: hashlib.sha256(sample[0].encode()).digest())  # every shard holds everything
        starts = range(0, len(part), SHARD_SAMPLES)
        shards = tuple(
            write_shard(output / split / f"{i:06d}.tar", part[start : start + SHARD_SAMPLES])
            for i, start in enumerate(starts)
        )
        index = ShardIndex(output / split, shards, CATEGORIES)
        index.save()
        print(f"{split}: {index.num_samples} pictures, {sum(shard.bytes for shard in shards) / 1e6:.2f} MB")
    print(f"{len(names)} names, {copies} exact copies of another drawing left out")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, default=Path("npm"), help="where npm's packages lie or are put")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "emoji64")
    parser.add_argument("--check", action="store_true", help="rebuild elsewhere and compare with what is in --output")
    arguments = parser.parse_args()
    if not arguments.check:
        for split in SPLITS:
            shutil.rmtree(arguments.output / split, ignore_errors=True)
        build(arguments.packages, arguments.output)
        return
    with tempfile.TemporaryDirectory() as folder:
        build(arguments.packages, Path(folder))
        for split in SPLITS:
            if ShardIndex.load(Path(folder, split)).shards != ShardIndex.load(arguments.output / split).shards:
                sys.exit(f"{arguments.output / split} differs from the rebuilt split (another Pillow or resvg-py?)")
    print("identical: every shard has the SHA-256 of the rebuilt one")


if __name__ == "__main__":
    main()
