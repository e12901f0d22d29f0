"""A user's mistake gets one line that names it, status 2 and no traceback, and leaves nothing half-written."""

import errno
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import fit_ar, fit_tokenizer, make_tokenizer, random_codes, write_images, write_tokens

from dar_lightning import __version__
from dar_lightning.cli import TRAINER_VERBS, USAGE, VERBS, main, spell_out_flags
from dar_lightning.data.token_dataset import CodesIndex, describe, write_codes

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of options and loggers


def refusal(capsys, argv: list) -> str:
    """What `dar` says on stderr before it ends with status 2: one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set to")]
    assert stop.value.code == 2
    assert len(said) == 1, said
    assert said[0].startswith(f"dar {argv[0]}: ")
    return said[0]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "x", 8)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("tokens") / "x", 8)


# ---- words


def test_a_mistake_in_a_real_process():
    words = ["fit", "--config", "experiments/quickstart/tokenizer.yaml", "--model.init_args.config.nope", "3"]
    command = [sys.executable, "-m", "dar_lightning", *words]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    line = run.stderr.splitlines()[-1]
    assert line.startswith("dar fit: ")
    assert "nope" in line
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(("words", "code"), [([], 2), (["--help"], 0)])
def test_usage(words, code, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == code
    assert capsys.readouterr().out.strip() == USAGE
    assert all(verb in USAGE for verb in (*TRAINER_VERBS, *VERBS))


@pytest.mark.parametrize("verb", [*TRAINER_VERBS, *VERBS])
def test_each_verb_has_help_and_refuses_other_options(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"usage: dar {verb}" if verb in VERBS else "usage: dar")
    assert "--config" in shown.out
    assert "--nope" in refusal(capsys, [verb, "--nope", "3"])


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["trian"], ["'trian'", "quickstart"]),
        (["sample", "--pipeline", "x"], ["output"]),
        *(([verb, "--config", "no/such.yaml"], ["no/such.yaml"]) for verb in ("fit", "sample")),
        *(([verb, "--config", "{folder}/x.yaml"], ["line 2"]) for verb in ("fit", "sample")),
        (["sample", "--pipeline", "{folder}", "--output", "{folder}/out"], ["config.json is missing"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_command_that_cannot_be(words, named, tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("a: [1,\n")
    line = refusal(capsys, [word.format(folder=tmp_path) for word in words])
    assert all(name in line for name in named), line
    assert not (tmp_path / "out").exists()


# ---- configs


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model.init_args.config.nope=3"], ["nope"]),
        (["--model.init_args.config.num_tokens=9"], ["num_tokens 9", "num_groups 4"]),
        (["--model.init_args.optimizer.lr=-1"], ["lr"]),
        (["--model=dar_lightning.training.NoModule"], ["NoModule"]),
        (["--data.init_args.crop=diagonal"], ["diagonal"]),
        (["--data.init_args.batch_size=0"], ["batch_size"]),
        (["--trainer.max_steps=many"], ["max_steps", "many"]),
        (["--trainer.callbacks+=NoCallback"], ["NoCallback"]),
        (
            [
                "--trainer.callbacks+=dar_lightning.training.callbacks.CodebookWarmup",
                "--trainer.callbacks.warmup_steps=3",
            ],
            ["collect_steps is 40"],
        ),
    ],
    ids=lambda value: value[-1] if str(value[0]).startswith("--") else "",
)
def test_a_config_that_cannot_be(images, tmp_path, options, named, capsys):
    line = refusal(capsys, [*fit_tokenizer(images, images, tmp_path / "run", max_steps=1), *options])
    assert all(name in line for name in named), line
    assert not (tmp_path / "run").exists()


IMAGES, TOKENS = "imagenet.ImageNetDataModule", "codes.CodesDataModule"


@pytest.mark.parametrize(
    ("model", "data", "options", "named"),
    [
        ("ARModule", TOKENS, ["preset=Q"], ["'Q'", "XXL"]),
        ("TokenizerModule", IMAGES, ["preset=v2"], ["unknown tokenizer preset 'v2': choose from v1, light, tiny"]),
        ("TokenizerModule", IMAGES, ["preset=light", "config.codebook_size=5"], ["keep one of them"]),
    ],
)
def test_presets(model, data, options, named, images, tmp_path, capsys):
    words = ["fit", f"--model=dar_lightning.training.{model}", *(f"--model.init_args.{option}" for option in options)]
    words += [f"--data=dar_lightning.data.{data}", f"--data.init_args.train={images}"]
    line = refusal(capsys, [*words, f"--trainer.default_root_dir={tmp_path / 'run'}"])
    assert all(name in line for name in named), line
    assert not (tmp_path / "run").exists()


# ---- data


@pytest.mark.parametrize(
    ("train", "val", "options", "says"),
    [
        ("no/shards", "{images}", [], "data.train: no/shards does not exist"),
        ("{images}", "{empty}", [], "data.val: no samples in"),
        ("{images}", "{images}", ["--data.init_args.image_size=30"], "30"),
        ("{images}", "{images}", ["--data.init_args.batch_size=9"], "batch_size: 9"),
    ],
    ids=["missing", "empty", "size", "batch"],
)
def test_data_that_cannot_be(train, val, options, says, images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = [path.format(images=images, empty=tmp_path / "empty") for path in (train, val)]
    assert says in refusal(capsys, [*fit_tokenizer(*places, tmp_path / "run", max_steps=1), *options])
    assert list((tmp_path / "run").rglob("*.ckpt")) == []
    assert options or not (tmp_path / "run").exists()


def test_a_label_outside_the_classes(images, tmp_path, capsys):
    wrong = write_images(tmp_path / "wrong", 8, label=lambda number: 4 if number == 3 else 0)
    line = refusal(capsys, fit_tokenizer(wrong, images, tmp_path / "run", max_steps=2))
    assert "0003: its label is '4', the classes are 0 to 3" in line
    assert list((tmp_path / "run").rglob("*.ckpt")) == []


@pytest.mark.parametrize(
    ("option", "named"),
    [("num_classes=3", "num_classes"), ("vocab_size=31", "vocab_size"), ("num_tokens=9", "num_tokens")],
)
def test_tokens_that_the_ar_model_cannot_take(tokens, tmp_path, option, named, capsys):
    line = refusal(
        capsys, [*fit_ar(tokens, tokens, tmp_path / "run", max_steps=2), f"--model.init_args.config.{option}"]
    )
    assert named in line
    assert not (tmp_path / "run").exists()


def test_token_labels_outside_the_classes(tokens, tmp_path, capsys):
    """Shards without class names do not say how many classes there are, only their labels do."""
    index = CodesIndex.load(tokens)
    path = tmp_path / "wrong" / "000000.safetensors"
    path.parent.mkdir()
    labels = np.array([0, 1, 2, 3, 4, 0, 1, 2])
    write_codes(path, random_codes(8).astype(np.uint16)[:, None], labels, [str(i) for i in range(8)], {})
    replace(index, root=path.parent, classes=(), shards=(describe(path, 8),)).save()
    for train, val in ((path.parent, tokens), (tokens, path.parent)):
        line = refusal(capsys, fit_ar(str(train), str(val), tmp_path / "run", max_steps=2))
        assert f"{path} has label 4: the model's num_classes is 4" in line
        assert not (tmp_path / "run").exists()


# ---- checkpoints and folders


def test_checkpoint_of_another_shape(images, tokens, tmp_path, capsys):
    command = fit_tokenizer(images, images, tmp_path / "run", max_steps=1, limit_val_batches=0)
    main([str(word) for word in command])
    checkpoint = next((tmp_path / "run").rglob("*.ckpt"))
    before = checkpoint.read_bytes()
    wider = [*command, "--model.init_args.config.codebook_size=33", f"--ckpt_path={checkpoint}"]
    assert "codebook is (32, 4), need (33, 4)" in refusal(capsys, wider)
    other = [*fit_ar(tokens, tokens, tmp_path / "other", max_steps=1), f"--ckpt_path={checkpoint}"]
    assert "is of the tokenizer part" in refusal(capsys, other)
    assert "no.ckpt" in refusal(capsys, [*command, "--ckpt_path=no.ckpt"])
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("verb", ["fit", "sample", "reconstruct", "extract", "export", "quickstart", "sweep"])
def test_a_folder_that_cannot_be_written(verb, images, pipeline, tmp_path, capsys):
    """A file stands where a folder would have to be."""
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / ("" if verb == "quickstart" else "run")
    commands = {
        "fit": fit_tokenizer(images, images, folder, max_steps=1),
        "sample": ["sample", "--pipeline", pipeline],
        "reconstruct": ["reconstruct", "--tokenizer", f"{pipeline}/tokenizer", "--shards", images],
        "extract": ["extract", "--tokenizer", f"{pipeline}/tokenizer", "--shards", images],
        "export": ["export", "--ckpt", _checkpoint(tmp_path)],
        "quickstart": ["quickstart"],
        "sweep": ["sweep", ROOT / "experiments/sweeps/small/order.yaml"],
    }
    line = refusal(capsys, [*commands[verb], *([] if verb == "fit" else ["--output", folder])])
    assert str(tmp_path / "file") in line
    assert verb in ("fit", "export") or line == f"dar {verb}: output: {folder}: Not a directory"
    assert (tmp_path / "file").is_file()


def _checkpoint(folder: Path) -> Path:
    tokenizer = make_tokenizer()
    state = {f"tokenizer.{name}": tensor for name, tensor in tokenizer.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"config": tokenizer.config.to_dict()}}, folder / "t.ckpt")
    return folder / "t.ckpt"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without one")
def test_an_accelerator_that_is_not_there(images, pipeline, tmp_path, capsys):
    command = ["extract", "--tokenizer", f"{pipeline}/tokenizer", "--shards", images, "--output", tmp_path / "tokens"]
    assert "accelerator cuda, devices auto: " in refusal(capsys, [*command, "--accelerator=cuda"])
    command = fit_tokenizer(images, images, tmp_path / "run", max_steps=1)
    assert "CUDAAccelerator" in refusal(capsys, [*command, "--trainer.accelerator=cuda"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ([], []),
        (["--fresh"], ["--fresh=true"]),
        (["--from-scratch", "--output", "x"], ["--from_scratch=true", "--output", "x"]),
        (["--fresh", "false"], ["--fresh", "false"]),
        (["--output", "--fresh-x"], ["--output", "--fresh-x"]),
    ],
)
def test_flags_may_stand_alone(typed, meant):
    def function(output: str = "", fresh: bool = False, from_scratch: bool = False): ...

    assert spell_out_flags(function, typed) == meant


def test_a_finished_run_leaves_its_process_group(capsys):
    """Gloo's connections, left to Python's end, abort a process now and then."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        main(["--version"])
        assert not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


# ---- what the system refuses


def broken(error: OSError) -> Callable:
    """A verb's function."""

    def compare(results: str) -> None:
        raise error

    return compare


def test_an_error_of_the_program_stays_a_traceback(monkeypatch):
    """Also where it names a file: it is not one that the user has named."""
    error = FileNotFoundError(errno.ENOENT, "No such file or directory", "/package/page.html")
    monkeypatch.setattr("dar_lightning.commands.compare.compare", broken(error))
    with pytest.raises(FileNotFoundError, match=r"page.html"):
        main(["compare", "--results", "any"])


@pytest.mark.parametrize("file", [["/full/log.txt"], []])
def test_a_full_disk_is_one_line_wherever_it_is_met(file, monkeypatch, capsys):
    error = OSError(errno.ENOSPC, "No space left on device", *file)
    monkeypatch.setattr("dar_lightning.commands.compare.compare", broken(error))
    line = refusal(capsys, ["compare", "--results", "any"])
    assert line == f"dar compare: {''.join(f'{name}: ' for name in file)}No space left on device"


@pytest.mark.parametrize("logger", ["true", "false"])
def test_a_run_whose_folder_lies_in_no_folder(logger, capsys, tmp_path, tokens):
    (tmp_path / "file").write_text("")
    options = {"enable_checkpointing": "false", "logger": logger}
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in fit_ar(tokens, tokens, tmp_path / "file" / "run", max_steps=1, **options)])
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]  # after what Lightning says of devices
    assert re.match(r"dar fit: trainer.(logger|default_root_dir): .*file/run.*: Not a directory", line)
