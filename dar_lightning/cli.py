"""The `dar` command: Trainer verbs go to LightningCLI, the others are typed functions read by jsonargparse."""

import atexit
import gc
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from dar_lightning.errors import (
    MachineFault,
    OneLineErrors,
    UserError,
    find_user_error,
    naming,
    phase,
    require,
    whole_line,
)
from dar_lightning.files import DISK, check_local, find_shipped, refuse_repeated_keys

TRAINER_VERBS = ("fit", "validate", "test", "predict")

# verb -> what it does. Its function has its name, in a module of its name, which is imported when the verb is called.
VERBS = {
    "quickstart": "the whole road in a few minutes, on the embedded photos",
    "shard": "folders, ImageNet's archives, Hugging Face data sets -> image shards",
    "extract": "images -> token shards, with a trained tokenizer",
    "sample": "draw images with a pipeline: grid, film strips, animation, layout control",
    "serve": "a web page on which pictures appear while their tokens are written",
    "reconstruct": "encode and decode images: PSNR, codebook use, previews",
    "evaluate": "Frechet distance and linear probe of samples",
    "compare": "metrics of several evaluations side by side, where their protocols allow it",
    "table": "one of the paper's tables, measured: dar table --config experiments/evaluate/solvers.yaml",
    "sweep": "an ablation's grid: dar sweep experiments/sweeps/small/order.yaml",
    "report": "tables, plots and samples of a sweep, cells beside each other",
    "export": "Lightning checkpoint -> folder with config.json and model.safetensors; or the Llama -> transformers",
    "convert": "official D-AR weights, or the Llama back from transformers -> such a folder",
}

POSITIONAL = {"sweep": "config", "report": "sweep"}  # verb -> the option that its first word is, where that has no name

WRITTEN = ("output", "save_statistics")  # options that say where a verb writes to

USAGE = (
    """usage: dar VERB [options]      (dar VERB --help lists a verb's options; all take --config FILE.yaml)

training, by LightningCLI:
  fit           train a tokenizer or an AR model: dar fit --config experiments/quickstart/tokenizer.yaml
  validate      run its validation
  test, predict the other Trainer verbs

tools:
"""
    + "\n".join(f"  {verb:13} {what}" for verb, what in VERBS.items())
    + """

all verbs also take --trust my_file.MyClass: a quantizer, condition or backbone of your own, for weights that name it
and --traceback (or DAR_TRACEBACK=1 in the environment): all that lies behind a one-line error"""
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb.

    A user's mistake is a single line on stderr, and exit status 2: every UserError, and whatever else is raised before
    the verb's work has begun (`begin_work`). What is raised later goes on as it is: a traceback, and exit status 1. A
    MachineFault is a line, with status 1.
    """
    is_program = argv is None
    argv = list(sys.argv[1:] if is_program else argv)
    shown = "--traceback" in argv or os.environ.get("DAR_TRACEBACK", "0") not in ("", "0")
    argv = [word for word in argv if word != "--traceback"]
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if argv else 2)
    verb = argv[0]
    phase.working = False
    try:
        if is_program and verb in (*TRAINER_VERBS, *VERBS):
            import_for_good(verb)
        options = import_trusted([shipped_file(word) for word in argv[1:]])
        if verb in TRAINER_VERBS:
            importlib.import_module("dar_lightning.commands.fit").TrainerCLI([verb, *options])
        elif verb in VERBS:
            run_function(verb, options)
        elif verb == "--version":
            print(importlib.import_module("dar_lightning").__version__)
        else:
            raise UserError(f"unknown verb {verb!r}: choose from {', '.join((*TRAINER_VERBS, *VERBS))}")
        # As Lightning does for NCCL only. Where Python ends with Gloo's connections, their threads may abort it.
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
        return
    except KeyboardInterrupt:
        code, said = 130, "stopped"
    except Exception as error:
        code, said = 1 if isinstance(find_user_error(error), MachineFault) else 2, explain(error)
        if said is None:
            raise
        if shown:
            traceback.print_exception(error)
    print(f"dar {verb}: {said}", file=sys.stderr)
    sys.exit(code)


def import_for_good(verb: str) -> None:
    """Import a verb's module, with all that it needs, outside of Python's garbage collection.

    These are half a million objects that stay to the end: the collector would look through them again and again, first
    while they are imported.
    """
    gc.disable()
    atexit.register(gc.unfreeze)  # triton would complain of objects that are never freed
    importlib.import_module(f"dar_lightning.commands.{'fit' if verb in TRAINER_VERBS else verb}")
    gc.freeze()
    gc.enable()


def explain(error: Exception) -> str | None:
    """What an error is in one line; None where its traceback is due."""
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    if mistake := find_user_error(error) if isinstance(error, ValueError) or not phase.working else None:
        return f"{mistake}{notes}"
    if isinstance(error, OSError) and error.errno in DISK:  # which can be met anywhere
        return whole_line(error)
    return None if phase.working else f"{whole_line(error)}{notes} ({type(error).__name__}; --traceback shows where)"


def shipped_file(word: str) -> str:
    """An option's value that names one of our YAML files or pictures, which the working directory need not have."""
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    found = find_shipped(value)
    if not os.path.isfile(found):
        return word
    if found.endswith((".yaml", ".yml")):
        with naming(f"{found}: not a text in UTF-8"):
            Path(found).read_text(encoding="utf-8")
    return f"{option}{equals}{found}"


def import_trusted(options: list[str]) -> list[str]:
    """Options without every `--trust CLASS`: a class of the user's own, which weights may then name."""
    kept, words = [], iter(options)
    for word in words:
        name, _, value = word.partition("=")
        if name == "--trust":
            name = value or next(words, "")
            importlib.import_module("dar_lightning.tokenizer.quantizers").import_quantizer(name)
            importlib.import_module("dar_lightning.ar.conditions").import_condition(name)
            importlib.import_module("dar_lightning.ar.backbones").import_backbone(name)
        else:
            kept.append(word)
    return kept


def run_function(verb: str, options: list[str]) -> None:
    """Call a verb's function with options from the command line and --config files."""
    from jsonargparse import ArgumentParser, auto_cli

    from dar_lightning.devices import round_convolutions_as_products

    class Parser(OneLineErrors, ArgumentParser):
        def parse_args(self, *args, **kwargs):
            given = super().parse_args(*args, **kwargs)
            for name in WRITTEN:
                check_local(given.get(name), name)
                require(given.get(name) != "", f"{name} is empty: give the name of a folder or file")
            return given

    function = getattr(importlib.import_module(f"dar_lightning.commands.{verb}"), verb)
    round_convolutions_as_products()
    refuse_repeated_keys()
    if verb in POSITIONAL and options and not options[0].startswith("-"):
        options = [f"--{POSITIONAL[verb]}={options[0]}", *options[1:]]
    options = spell_out_flags(function, options)
    auto_cli(function, args=options, as_positional=False, prog=f"dar {verb}", parser_class=Parser)


def spell_out_flags(function: Callable, options: list[str]) -> list[str]:
    """Let `--from-scratch` stand for `--from_scratch true`, as other commands do; jsonargparse wants the latter."""
    flags = {name for name, parameter in inspect.signature(function).parameters.items() if parameter.annotation is bool}
    spelled = []
    for option, following in pairwise([*options, ""]):
        name = option.removeprefix("--").replace("-", "_")
        if option.startswith("--") and name in flags:
            option = f"--{name}" if following.lower() in ("true", "false") else f"--{name}=true"
        spelled.append(option)
    return spelled


if __name__ == "__main__":
    main()
