"""Hugging Face `datasets` (an optional extra) as a source of shards."""

from functools import partial
from pathlib import Path

from dar_lightning.data.captions import FIELDS, captions_of
from dar_lightning.data.decode import BadSample
from dar_lightning.data.prepare.sources import Sample, Source
from dar_lightning.errors import UserError


def hf_dataset(name: str, split: str | None, field: str | None = None) -> Source:
    """Rows of a data set with one `Image` column, and at most one `ClassLabel` column; without it they have no labels.

    Captions come from the column `field`, or from the first of `data.captions.FIELDS` that is there.

    `name` is a folder written by `save_to_disk`, or what `load_dataset` takes: a name on the Hub or a local folder.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"input: {name} needs Hugging Face datasets: pip install 'dar-lightning[datasets]'") from error
    try:
        table = datasets.load_from_disk(name) if is_saved(Path(name)) else datasets.load_dataset(name)
    except Exception as error:  # its readers and the Hub's client raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"input: {name} cannot be loaded: {reason}") from error
    if split is not None and isinstance(table, datasets.Dataset):
        raise UserError(f"split: {name} holds one table and no splits; leave it out")
    if isinstance(table, datasets.DatasetDict):
        if split not in table and (split is not None or len(table) > 1):
            raise UserError(f"split: {name} has {', '.join(table)}; choose one")
        table = table[split or next(iter(table))]
    columns = []
    for kind in (datasets.Image, datasets.ClassLabel):
        found = [column for column, feature in table.features.items() if isinstance(feature, kind)]
        if len(found) > 1 or (kind is datasets.Image and not found):
            raise UserError(
                f"input: {name} has {len(found)} columns of type {kind.__name__} among {', '.join(table.features)}; "
                "exactly one is needed (select_columns or cast_column of `datasets` make it so)"
            )
        columns.append(found[0] if found else None)
    image, label = columns
    if field is not None and field not in table.features:
        raise UserError(f"captions: {name} has no column {field!r} among {', '.join(table.features)}")
    column = next((name for name in (FIELDS if field is None else (field,)) if name in table.features), None)
    texts = [None] * len(table) if column is None else table[column]
    classes = () if label is None else tuple(table.features[label].names)
    samples = []
    for row, (value, text) in enumerate(zip(table[label] if label else [-1] * len(table), texts, strict=True)):
        known = value is not None and 0 <= value < len(classes)
        key = f"{classes[value]}-{row:08d}" if known else f"{row:08d}"
        flaw = "" if known or label is None else f"label {value}"
        captions = tuple(captions_of({"text": text}))
        samples.append(Sample(key, str(row), value if known else -1, 0, row, flaw, captions))
    encoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return Source("Hugging Face data set", classes, samples, partial(_read_row, encoded))


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _read_row(table, row: int) -> tuple[bytes, dict[str, bytes]]:
    """The encoded image of a row; the table's files are mapped into memory, so its copies in workers are cheap."""
    (value,) = table[row].values()
    if value is None:
        raise BadSample("no image")
    try:
        return value["bytes"] or Path(value["path"]).read_bytes(), {}
    except OSError as error:
        raise BadSample(f"cannot be read: {error.strerror}") from error
