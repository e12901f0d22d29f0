"""The plan of a sweep: cells of a grid, each a chain of `dar` commands. Identical stages run once and are shared."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import compress, product
from pathlib import Path
from typing import Any

import yaml

from dar_lightning.data.shards import INDEX
from dar_lightning.errors import UserError, require
from dar_lightning.files import file_sha256, find_shipped, load_yaml

# Where each verb's results go: the option that says so, below the stage's own folder.
OUTPUTS = {
    "fit": "trainer.default_root_dir={}",
    "extract": "output={}",
    "export": "output={}",
    "reconstruct": "output={}",
    "sample": "output={}",
    "table": "output={}",
    "evaluate": "output={}/evaluation.json",
}
LOGGER = "dar_lightning.training.loggers.TensorBoard"
Value = bool | int | float | str | list | dict | None  # not Any, whose class paths jsonargparse would instantiate
PLACE = re.compile(r"\{(\w+)\}")
NAME = re.compile(r"[\w.=,+-]+")


@dataclass(frozen=True)
class Stage:
    """One command of every cell, as the sweep file has it.

    Attributes:
        verb: of `dar`: fit, extract, export, reconstruct, sample, table or evaluate.
        config: its config files, in order.
        options: its other options by name. In their values, {axis} and the names that an axis gives stand for the
            cell's values, {seed} for its seed, and {stage}, the name of an earlier stage, for that one's folder. All
            but the last also in the names of config files. Where a verb writes to is not said here.
    """

    verb: str
    config: list[str] = field(default_factory=list)
    options: dict[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.verb in OUTPUTS, f"stages: verb is {self.verb!r}, choose from {', '.join(OUTPUTS)}")


@dataclass(frozen=True)
class Work:
    """A stage with all its values: one command, one folder."""

    stage: str
    verb: str
    words: tuple[str, ...]  # options, in which {name} stands for the folder of the work that it needs
    needs: dict[str, "Work"]  # that work by its stage's name
    hash: str  # of words, config files and the work that it needs; equal hashes are the same work
    texts: tuple[str, ...] = ()  # every text in its options and config files

    @property
    def folder(self) -> str:
        """Below the sweep's."""
        return f"shared/{self.stage}-{self.hash}"

    def data(self) -> dict[str, str]:
        """Folders of shards that options or config files name -> SHA-256 of their index; none of earlier stages."""
        indices = {text: Path(find_shipped(text), INDEX) for text in sorted({*self.texts}) if text}
        return {text: file_sha256(index) for text, index in indices.items() if os.path.isfile(index)}

    def command(self, root: Path) -> list[str]:
        """Options of `dar`, with the verb first."""
        folders = {name: str(root / work.folder) for name, work in self.needs.items()}
        words = [PLACE.sub(lambda found: folders.get(found[1], found[0]), word) for word in self.words]
        own = root / self.folder
        out = [f"--{OUTPUTS[self.verb].format(own)}"]
        if self.verb == "fit":
            place = {"save_dir": str(own), "name": "", "version": "tensorboard"}
            out.append(f"--trainer.logger={json.dumps({'class_path': LOGGER, 'init_args': place})}")
        return [self.verb, *words, *out]


@dataclass(frozen=True)
class Cell:
    """One point of the grid."""

    name: str  # of its folder
    values: dict[str, Any]  # its place on every axis
    variables: dict[str, Any]  # what placeholders stand for: the values, and the names that an axis gives


@dataclass(frozen=True)
class Sweep:
    """A sweep file. See `commands.sweep.sweep` for what its parts are."""

    name: str
    stages: dict[str, Stage]
    grid: dict[str, list | dict]
    title: str = ""
    budget: str = ""
    seeds: list[int] = field(default_factory=lambda: [0])
    x_axis: str | None = None
    figures: list[str] = field(default_factory=list)
    paper: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UserError(f"name is {self.name!r}: it names a folder, use letters, digits and . _ = , + -")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds are {self.seeds}: need one or several that differ")
        for what, given in (("stages", self.stages), ("grid", self.grid), *self.grid.items()):
            if not given:
                raise UserError(f"{what} is empty: need at least one entry")
        for axis, values in self.grid.items():
            given = [{axis, *names} for names in values.values()] if isinstance(values, Mapping) else [{axis}]
            if any(names != given[0] for names in given):
                raise UserError(f"grid: the values of {axis} give different names: {{name}} must mean something in all")
            if "seed" in given[0]:
                raise UserError("grid: seed is no axis and no name that one gives; use seeds")
        if self.x_axis is not None and self.x_axis not in self.grid:
            raise UserError(f"x_axis is {self.x_axis!r}: choose from {', '.join(self.grid)}")
        names = [cell.name for cell in self.cells]
        if len(set(names)) < len(names):
            raise UserError(f"grid: two cells are called {next(n for n in names if names.count(n) > 1)}")
        for entry in self.paper:
            if wrong := [axis for axis in self.grid if axis in entry and entry[axis] not in self.grid[axis]]:
                raise UserError(f"paper: {wrong[0]} is {entry[wrong[0]]!r}, which the grid does not have")
        known = {*self.cells[0].variables, "seed"}
        for name, stage in self.stages.items():
            if wrong := [place for place in _places([stage.options, stage.config]) if place not in known]:
                what = "no axis, no name that it gives, and no earlier stage"
                raise UserError(f"stages: {name} has {{{wrong[0]}}}, which is {what}")
            if name in known:
                raise UserError(f"stages: {name} is the name of an axis too, or of what one gives")
            known.add(name)

    @property
    def cells(self) -> list[Cell]:
        """Every combination of the axes' values."""
        cells = []
        for values in product(*self.grid.values()):
            chosen = dict(zip(self.grid, values, strict=True))
            variables = dict(chosen)
            for axis, value in chosen.items():
                variables |= self.grid[axis][value] if isinstance(self.grid[axis], Mapping) else {}
            name = ",".join(f"{axis}={value}" for axis, value in chosen.items())
            cells.append(Cell(re.sub(r"[^\w.=,+-]", "_", name), chosen, variables))
        return cells

    def work(self, cell: Cell, seed: int) -> dict[str, Work]:
        """The stages of a cell, by name and in order."""
        done: dict[str, Work] = {}
        for name, stage in self.stages.items():
            given = cell.variables | {"seed": seed}
            configs = [_text(_filled(path, given)) for path in stage.config]
            contents = [_config_text(path) for path in configs]
            options = _filled(stage.options, given)
            words = [f"--config={path}" for path in configs]
            words += [f"--{option}={_text(value)}" for option, value in options.items()]
            needs = {place: done[place] for place in _places(stage.options) if place in done}
            facts = [stage.verb, words, {place: work.hash for place, work in needs.items()}, contents]
            digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
            texts = tuple(_texts([options, *map(json.loads, contents)]))
            done[name] = Work(name, stage.verb, tuple(words), needs, digest, texts)
        return done

    def runs(self) -> Iterator[tuple[Cell, int]]:
        """Every cell with every seed; all cells of the first seed come first."""
        yield from ((cell, seed) for seed in self.seeds for cell in self.cells)

    def summary(self) -> dict[str, Any]:
        """sweep.json, for whoever reads the results."""
        cells = []
        for cell in self.cells:
            fits = (
                all(cell.values[axis] == entry[axis] for axis in self.grid if axis in entry) for entry in self.paper
            )
            entry = next(compress(self.paper, fits), {})
            paper = {name: value for name, value in entry.items() if name not in self.grid}
            cells.append({"name": cell.name, "values": cell.values, "seeds": self.seeds, "paper": paper})
        axes = {axis: list(values) for axis, values in self.grid.items()}
        told = {"name": self.name, "title": self.title or self.name, "axes": axes}
        told |= {"x_axis": self.x_axis or next(iter(axes)), "cells": cells}
        return told | {"figures": self.figures, "budget": self.budget}


def _texts(value: Any) -> list[str]:
    """Every text anywhere in a value."""
    if isinstance(value, Mapping | list):
        return [text for part in (value.values() if isinstance(value, Mapping) else value) for text in _texts(part)]
    return [value] if isinstance(value, str) else []


def _places(value: Any) -> list[str]:
    """Names in braces anywhere in a value."""
    return [name for text in _texts(value) for name in PLACE.findall(text)]


def _filled(value: Any, variables: Mapping[str, Any]) -> Any:
    """A value with a cell's variables in their places; what stands alone keeps its type."""
    if isinstance(value, Mapping):
        return {key: _filled(part, variables) for key, part in value.items()}
    if isinstance(value, list):
        return [_filled(part, variables) for part in value]
    if not isinstance(value, str):
        return value
    alone = PLACE.fullmatch(value)
    if alone and alone[1] in variables:
        return variables[alone[1]]
    return PLACE.sub(lambda found: _text(variables[found[1]]) if found[1] in variables else found[0], value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _config_text(path: str) -> str:
    """What a config file says, as JSON; comments and layout do not count."""
    try:
        return _yaml_as_json(Path(find_shipped(path)).read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or "it is no YAML"
        raise UserError(f"stages: config {path} cannot be read: {reason}") from error


@cache  # all cells have the same few files
def _yaml_as_json(text: str, name: str) -> str:
    return json.dumps(load_yaml(text, name), default=str)
