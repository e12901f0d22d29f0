"""The `dar` command: Trainer verbs go to LightningCLI, the others are typed functions read by jsonargparse."""

import atexit
import gc
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise

from dar_lightning.errors import OneLineErrors, UserError, find_user_error
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

all verbs also take --trust my_file.MyQuantizer: a class of your own, for weights that name it"""
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb. Exits with status 2 and a single line after a user's mistake."""
    is_program = argv is None
    argv = list(sys.argv[1:] if is_program else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if argv else 2)
    verb, options = argv[0], [shipped_file(word) for word in argv[1:]]
    try:
        if is_program and verb in (*TRAINER_VERBS, *VERBS):
            import_for_good(verb)
        options = import_trusted(options)
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
    except ValueError as error:
        code, said = 2, find_user_error(error)
        if said is None:
            raise
    except KeyboardInterrupt:
        code, said = 130, "stopped"
    except OSError as error:
        # Where the user's files are opened, OSErrors become UserErrors. A full disk can be met anywhere.
        if error.errno not in DISK:
            raise
        code, said = 2, error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
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


def shipped_file(word: str) -> str:
    """An option's value that names one of our YAML files or pictures, which the working directory need not have."""
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    found = find_shipped(value)
    return f"{option}{equals}{found}" if os.path.isfile(found) else word


def import_trusted(options: list[str]) -> list[str]:
    """Options without every `--trust CLASS`: a quantizer class of the user's own, which weights may then name."""
    kept, words = [], iter(options)
    for word in words:
        name, _, value = word.partition("=")
        if name == "--trust":
            importlib.import_module("dar_lightning.tokenizer.quantizers").import_quantizer(value or next(words, ""))
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
