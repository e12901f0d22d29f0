"""Captions of images: `.txt` and `.json` beside an image or in its shard, and the tables of an image folder."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dar_lightning.errors import UserError

FIELDS = ("captions", "caption", "text")  # where captions are, in JSON and in tables; the first that is there
MEMBERS = ("json", "txt", *(f"{number}.txt" for number in range(10)))  # of a sample in a shard
TABLES = ("metadata.csv", "metadata.jsonl")  # as Hugging Face's imagefolder names them


def read_captions(members: Mapping[str, bytes], field: str | None = None) -> list[str]:
    """The captions of a sample, of its members by extension: the first of these that has any.

    A field of `.json` (FIELDS, or `field` alone), a text or a list of texts; `.txt`, one caption a line; `0.txt`,
    `1.txt` and so on.
    """
    if found := captions_of(read_object(members), field):
        return found
    for names in (("txt",), MEMBERS[2:]):
        texts = [members[name].decode(errors="replace") for name in names if name in members]
        if found := [line.strip() for text in texts for line in text.splitlines() if line.strip()]:
            return found
    return []


def read_object(members: Mapping[str, bytes]) -> dict[str, Any]:
    """The JSON object of a sample; an empty one where it has none."""
    try:
        found = json.loads(members.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def captions_of(row: Mapping[str, Any], field: str | None = None) -> list[str]:
    """The captions in a JSON object or a row of a table; none where it is no such thing."""
    for name in FIELDS if field is None else (field,):
        value = row.get(name)
        values = value if isinstance(value, list) else [value]
        if found := [text.strip() for text in values if isinstance(text, str) and text.strip()]:
            return found
    return []


def read_table(folder: Path, field: str | None = None) -> dict[str, list[str]]:
    """The captions in a folder's metadata.csv or metadata.jsonl: `file_name`, relative to the folder -> captions.

    Raises:
        UserError: the table cannot be read, or lacks `file_name` or the column of captions.
    """
    path = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if path is None:
        return {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = (json.loads(line) for line in file if line.strip())
            rows = list(csv.DictReader(file) if path.suffix == ".csv" else lines)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"input: {path} cannot be read as {path.suffix[1:].upper()} ({error})") from error
    named = [row for row in rows if isinstance(row, dict) and isinstance(row.get("file_name"), str)]
    found: dict[str, list[str]] = {}
    for row in named:  # an image may have several rows
        found.setdefault(row["file_name"].removeprefix("./"), []).extend(captions_of(row, field))
    if len(named) < len(rows) or not any(found.values()):
        lacks = "a row without file_name" if len(named) < len(rows) else "no captions"
        raise UserError(f"input: {path} has {lacks}: it needs columns file_name and {field or ' or '.join(FIELDS)}")
    return found
