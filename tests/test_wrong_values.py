"""Five wrong values for every option of every verb: one line and status 2, with nothing left behind, or work begins.

The options are read off the parsers. A run stops where its work would begin: `begin_work`.
"""

import os
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import gradio
import official
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser, auto_parser
from tiny_models import fit_ar, fit_tokenizer, make_tokenizer, write_images, write_tokens
from tiny_sweep import write_sweep

from dar_lightning import errors
from dar_lightning.cli import VERBS, main
from dar_lightning.commands import fit
from dar_lightning.data.codes import CodesDataModule
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.records import provenance
from dar_lightning.training import ARModule, TokenizerModule
from dar_lightning.training.callbacks.provenance import ConfigText

WRONG = {"null": "null", "negative": "-1", "text": "nonsense", "list": "[1, 2]", "huge": f"{10**12}"}
SECONDS = 30  # for one value


class Begun(BaseException):
    """Work would begin now."""


class Hangs(BaseException):
    """It took too long."""


class Phase(SimpleNamespace):
    """In the place of errors.phase: ends the run at the first real step of its work."""

    def __setattr__(self, name: str, value: bool) -> None:
        super().__setattr__(name, value)
        if value:
            raise Begun


@pytest.fixture
def stops(monkeypatch, tmp_path) -> Iterator[Path]:
    """An empty working directory, runs that stop where their work begins, and an alarm for what never gets there."""

    def ring(*_) -> None:
        raise Hangs

    phase = Phase(working=False)
    monkeypatch.setattr(provenance, "_git", lambda *words: None)  # processes
    monkeypatch.setattr(gradio.Blocks, "launch", lambda *_, **options: None)
    monkeypatch.setattr(os, "fsync", lambda number: None)
    for module in [module for name, module in sys.modules.items() if name.startswith("dar_lightning")]:
        if getattr(module, "phase", None) is errors.phase:
            monkeypatch.setattr(module, "phase", phase)
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, ring)
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def outcome(capsys, folder: Path, argv: list[str]) -> str:
    """ "begun", "refused", or what is wrong with how a command ended."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    try:
        signal.alarm(SECONDS)
        main(argv)
        ended = "exit code 0"
    except Begun:
        for left in sorted({*folder.rglob("*")} - {*before}, reverse=True):
            left.rmdir() if left.is_dir() else left.unlink()
        return "begun"
    except Hangs:
        return "hangs"
    except SystemExit as stop:
        ended = f"exit code {stop.code}"
    except Exception as error:
        return f"traceback: {error!r}"
    finally:
        signal.alarm(0)
    said = capsys.readouterr().err.splitlines()
    if ended != "exit code 2" or not said or not said[-1].startswith(f"dar {argv[0]}: "):
        return f"{ended}: {said}"
    if left := sorted({*folder.rglob("*")} - {*before}):
        return f"left behind: {left}"
    return "refused" if len([line for line in said if line.startswith("dar ")]) == 1 else f"lines: {said}"


@pytest.fixture(scope="module")
def places(tmp_path_factory, pipeline) -> dict[str, str]:
    """What the commands read."""
    root = tmp_path_factory.mktemp("places")
    found = {"images": write_images(root / "images", 8), "tokens": write_tokens(root / "tokens", 8)}
    found |= {"pipeline": pipeline, "root": str(root), "sweep": str(write_sweep(root / "sweep"))}
    model = make_tokenizer()
    state = {f"tokenizer.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"config": model.config.to_dict()}}, root / "tokenizer.ckpt")
    official.save_pt(root / "o.pt", official.numbers("tokenizer_a", "config"), ema=official.state_dict("tokenizer_a"))
    stages = {"train": {"verb": "extract", "options": {"tokenizer": "t", "shards": "s", "seed": "{K}"}}}
    (root / "plan.yaml").write_text(yaml.safe_dump({"name": "x", "grid": {"K": [1, 2]}, "stages": stages}))
    (root / "table.yaml").write_text(yaml.safe_dump({"title": "x", "rows": [{}], "task": "generate"}))
    return found


COMMANDS = {
    "quickstart": "--output=out",
    "shard": "--input={images} --output=out",
    "extract": "--tokenizer={pipeline}/tokenizer --shards={images} --output=out --accelerator=cpu",
    "sample": "--pipeline={pipeline} --output=out --device=cpu",
    "serve": "--pipeline={pipeline} --device=cpu",
    "reconstruct": "--tokenizer={pipeline}/tokenizer --shards={images} --output=out --device=cpu",
    "evaluate": "--samples={images} --reference={images} --features=color_edges --device=cpu",
    "compare": "--files=a.json,b.json",
    "table": "--config={root}/table.yaml --pipeline={pipeline} --reference={images} --features=color_edges "
    "--output=out --num_samples=8 --device=cpu",
    "sweep": "--config={root}/plan.yaml",
    "report": "--sweep={sweep} --output=out",
    "export": "--ckpt={root}/tokenizer.ckpt --output=out",
    "convert": "--input={root}/o.pt --output=out",
}


# Options that any text may be right for; those of numbers that may be negative.
ANY_TEXT = {"captions", "output", "save_statistics", "cache_dir", "title", "budget", "name", "host"}
ANY_TEXT |= {"trainer.default_root_dir", "trainer.model_registry"}
SIGNED = {"seed", "seeds", "guidance"}


def options_of(parser: ArgumentParser) -> dict[str, Any]:
    """The options of a parser, and of each its type; groups of them are left out."""
    options = {each.dest: getattr(each, "_typehint", each.type) for each in parser._actions}
    return {
        name: hint
        for name, hint in options.items()
        if not name.endswith("help") and not any(other.startswith(f"{name}.") for other in options)
    }


def kinds_of(hint: Any) -> set[type]:
    """The types of the values that an option takes; of a Literal none."""
    if get_origin(hint) in (Union, UnionType):
        return set().union(*map(kinds_of, get_args(hint)))
    return set() if get_origin(hint) is Literal else {get_origin(hint) or hint}


def is_legal(option: str, kind: str, hint: Any) -> bool:
    """Whether a value may be right, by the type of its option and what little else has to be known."""
    kinds, any_text = kinds_of(hint), option.rpartition(".init_args.")[2] in ANY_TEXT
    if kind == "negative":  # Lightning's -1 is often "without limit"
        return any_text or option in SIGNED or option.startswith("trainer.")
    allowed = {"null": {NoneType}, "text": set(), "list": {list, tuple}, "huge": {int, float}}[kind]
    return any_text or bool(kinds & allowed) or kinds == {object}


def faults(base: list[str], options: dict[str, Any], stops: Path, capsys) -> dict[str, str]:
    """What comes of the five values of each option, where it should not."""
    found = {}
    for option, hint in options.items():
        for kind, value in WRONG.items():
            came = outcome(capsys, stops, [*base, f"--{option}={value}"])
            if came != "refused" and not (came == "begun" and is_legal(option, kind, hint)):
                found[f"{option} {kind}"] = came
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_a_tool(verb, places, stops, capsys):
    base = [verb, *COMMANDS[verb].format_map(places).split()]
    if verb != "compare":
        assert outcome(capsys, stops, base) == "begun"
    function = getattr(import_module(f"dar_lightning.commands.{verb}"), verb)
    assert not faults(base, options_of(auto_parser(function, as_positional=False)), stops, capsys)


def parsers(words: list[str], monkeypatch) -> dict[str, ArgumentParser]:
    """Those of the Trainer verbs."""
    found = {}

    def parse(cli, *_) -> None:
        found.update(cli._subcommand_parsers)
        raise Begun

    with monkeypatch.context() as patch:
        patch.setattr(fit.TrainerCLI, "parse_arguments", parse)
        with pytest.raises(Begun):
            main(words)
    return found


def test_every_option_of_a_run(places, stops, capsys, monkeypatch):
    """All of `dar fit`, and what the other Trainer verbs have beside these."""
    words = [str(word) for word in fit_ar(places["tokens"], places["tokens"], "out", max_steps=1)]
    assert outcome(capsys, stops, words) == "begun"
    # half of the time, and no business of values
    monkeypatch.setattr(fit.TrainerCLI, "_dump_config", lambda cli: setattr(cli, "config_dump", {}))
    monkeypatch.setattr(ConfigText, "on_train_start", lambda *_: None)
    of_verbs = {verb: options_of(parser) for verb, parser in parsers(words, monkeypatch).items()}
    found = faults(words, of_verbs["fit"], stops, capsys)
    for verb, options in of_verbs.items():
        if verb != "fit":
            others = {name: hint for name, hint in options.items() if name not in of_verbs["fit"]}
            of_verb = faults([verb, *words[1:]], others, stops, capsys)
            found |= {f"{verb} {name}": came for name, came in of_verb.items()}
    assert not found, "\n".join(f"{name}: {came}" for name, came in found.items())


def test_every_option_of_models_and_their_data(places, stops, capsys, monkeypatch):
    """What both models have is tried with one."""
    monkeypatch.setattr(fit.TrainerCLI, "_dump_config", lambda cli: setattr(cli, "config_dump", {}))
    monkeypatch.setattr(ConfigText, "on_train_start", lambda *_: None)
    seen, found = set(), {}
    for function, data, *classes in (
        (fit_tokenizer, places["images"], TokenizerModule, ImageNetDataModule),
        (fit_ar, places["tokens"], ARModule, CodesDataModule),
    ):
        words = [str(word) for word in function(data, data, "out", max_steps=1)]
        for name, made in zip(("model", "data"), classes, strict=True):
            parser = fit.Parser()
            parser.add_class_arguments(made, f"{name}.init_args")
            options = {option: hint for option, hint in options_of(parser).items() if option not in seen}
            seen |= options.keys()
            found |= faults(words, options, stops, capsys)
    assert not found, "\n".join(f"{name}: {came}" for name, came in found.items())
