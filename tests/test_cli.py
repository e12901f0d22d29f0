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
    run = subprocess.run([sys.executable, "-m", "dar_lightning", "trian"], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith(
        "dar trian: unknown verb 'trian': choose from fit, validate, test, predict, quickstart"
    )
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(("argv", "status"), [(["--help"], 0), ([], 2)])
def test_help_lists_every_verb(argv, status, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert (stop.value.code, capsys.readouterr().out.strip()) == (status, USAGE)
    assert all(re.search(rf"\b{verb}\b", USAGE) for verb in (*TRAINER_VERBS, *VERBS))


@pytest.mark.parametrize("verb", [*TRAINER_VERBS, *VERBS])
def test_each_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"usage: dar {verb}" if verb in VERBS else "usage: dar")
    assert "--config" in shown.out


def test_version(capsys):
    from dar_lightning import __version__

    main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("verb", ["fit", "sample"])
def test_options_and_config_files_that_cannot_be(verb, tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("a: [1,\n")
    assert "--nope" in refusal(capsys, [verb, "--nope", "3"])
    assert "no/such.yaml" in refusal(capsys, [verb, "--config", "no/such.yaml"])
    assert "line 2" in refusal(capsys, [verb, "--config", tmp_path / "x.yaml"])


def test_a_missing_option_is_named(capsys):
    assert "output" in refusal(capsys, ["sample", "--pipeline", "x"])


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


# ---- configs of a training


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["model.init_args.config.nope=3"], ["nope"]),
        (["model.init_args.config.num_tokens=many"], ["num_tokens", "many"]),
        (["model.init_args.config.num_tokens=9"], ["num_tokens 9", "num_groups 4"]),
        (["model.init_args.preset=light"], ["light", "keep one of them"]),
        (["model.init_args.nope=3"], ["nope"]),
        (["model=dar_lightning.training.NoModule"], ["NoModule"]),
        (["data.init_args.crop=diagonal"], ["diagonal"]),
        (["data.init_args.batch_size=0"], ["batch_size"]),
        (["data.init_args.batch_size=9"], ["batch_size: 9"]),
        (["data.init_args.train=no/shards"], ["data.train: no/shards does not exist"]),
        (["trainer.nope=3"], ["nope"]),
        (["trainer.callbacks+=NoCallback"], ["NoCallback"]),
        (
            [
                "trainer.callbacks+=dar_lightning.training.callbacks.CodebookWarmup",
                "trainer.callbacks.warmup_steps=3",
            ],
            ["collect_steps is 40"],
        ),
    ],
    ids=lambda value: value[-1],
)
def test_a_config_that_cannot_be(images, tmp_path, options, named, capsys):
    run = fit_tokenizer(images, images, tmp_path / "run", max_steps=1)
    line = refusal(capsys, [*run, *(f"--{option}" for option in options)])
    assert all(name in line for name in named), line
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("model", "data", "preset", "said"),
    [
        ("ARModule", "codes.CodesDataModule", "Q", "unknown AR preset 'Q': choose from tiny, B, L"),
        (
            "TokenizerModule",
            "imagenet.ImageNetDataModule",
            "v2",
            "unknown tokenizer preset 'v2': choose from v1, light",
        ),
    ],
)
def test_a_preset_that_is_none(images, tokens, tmp_path, model, data, preset, said, capsys):
    shards = tokens if model == "ARModule" else images
    words = [f"--model=dar_lightning.training.{model}", f"--model.init_args.preset={preset}"]
    words += [f"--data=dar_lightning.data.{data}", f"--data.init_args.train={shards}"]
    assert said in refusal(capsys, ["fit", *words, f"--trainer.default_root_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


# ---- data of a training


def test_empty_shards(images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    line = refusal(capsys, fit_tokenizer(images, tmp_path / "empty", tmp_path / "run", max_steps=1))
    assert "data.val: no samples in" in line
    assert not (tmp_path / "run").exists()


def test_a_label_outside_the_classes(images, tmp_path, capsys):
    wrong = write_images(tmp_path / "wrong", 8, label=lambda number: 4 if number == 3 else 0)
    line = refusal(capsys, fit_tokenizer(wrong, images, tmp_path / "run", max_steps=2))
    assert "0003: its label is '4', the classes are 0 to 3" in line
    assert list((tmp_path / "run").rglob("*.ckpt")) == []


@pytest.mark.parametrize("option", ["num_classes=3", "vocab_size=31", "num_tokens=9"])
def test_tokens_that_the_ar_model_cannot_take(tokens, tmp_path, option, capsys):
    run = fit_ar(tokens, tokens, tmp_path / "run", max_steps=2)
    assert option.split("=")[0] in refusal(capsys, [*run, f"--model.init_args.config.{option}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("which", ["train", "val"])
def test_token_labels_outside_the_classes(tokens, tmp_path, which, capsys):
    """Shards without class names do not say how many classes there are, only their labels do."""
    path = tmp_path / "wrong" / "000000.safetensors"
    path.parent.mkdir()
    labels = np.array([0, 1, 2, 3, 4, 0, 1, 2])
    write_codes(path, random_codes(8).astype(np.uint16)[:, None], labels, [str(i) for i in range(8)], {})
    replace(CodesIndex.load(tokens), root=path.parent, classes=(), shards=(describe(path, 8),)).save()
    train, val = (str(path.parent), tokens) if which == "train" else (tokens, str(path.parent))
    line = refusal(capsys, fit_ar(train, val, tmp_path / "run", max_steps=2))
    assert f"{path} has label 4: the model's num_classes is 4" in line
    assert not (tmp_path / "run").exists()


def test_images_of_a_size_that_does_not_divide(images, tmp_path, capsys):
    run = fit_tokenizer(images, images, tmp_path / "run", max_steps=1)
    assert "30" in refusal(capsys, [*run, "--data.init_args.image_size=30"])
    assert list((tmp_path / "run").rglob("*.ckpt")) == []


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


def checkpoint_of(folder: Path) -> Path:
    tokenizer = make_tokenizer()
    state = {f"tokenizer.{name}": tensor for name, tensor in tokenizer.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"config": tokenizer.config.to_dict()}}, folder / "t.ckpt")
    return folder / "t.ckpt"


@pytest.mark.parametrize("verb", ["quickstart", "sweep", "sample", "reconstruct", "extract", "export"])
def test_an_output_that_lies_in_no_folder(verb, images, pipeline, tmp_path, capsys):
    """A file stands where a folder would have to be."""
    (tmp_path / "file").write_text("")
    options = {
        "quickstart": [],
        "sweep": ["--config", ROOT / "experiments/sweeps/small/order.yaml"],
        "sample": ["--pipeline", pipeline, "--per_class", 1],
        "reconstruct": ["--tokenizer", f"{pipeline}/tokenizer", "--shards", images],
        "extract": ["--tokenizer", f"{pipeline}/tokenizer", "--shards", images],
        "export": ["--ckpt", checkpoint_of(tmp_path)],
    }[verb]
    output = tmp_path / "file" if verb == "quickstart" else tmp_path / "file" / "out"
    line = refusal(capsys, [verb, *options, "--output", output])
    said = "cannot write weights to {}: .*Not a directory.*" if verb == "export" else "output: {}: Not a directory"
    assert re.fullmatch(f"dar {verb}: {said.format(re.escape(str(output)))}", line), line
    assert (tmp_path / "file").is_file()


@pytest.mark.parametrize("logger", ["true", "false"])
def test_a_run_whose_folder_lies_in_no_folder(logger, capsys, tmp_path, tokens):
    (tmp_path / "file").write_text("")
    options = {"enable_checkpointing": "false", "logger": logger}
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in fit_ar(tokens, tokens, tmp_path / "file" / "run", max_steps=1, **options)])
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]  # after what Lightning says of devices
    assert re.match(r"dar fit: trainer.(logger|default_root_dir): .*file/run.*: Not a directory", line)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without one")
def test_an_accelerator_that_is_not_there(images, pipeline, tmp_path, capsys):
    command = ["extract", "--tokenizer", f"{pipeline}/tokenizer", "--shards", images, "--output", tmp_path / "tokens"]
    assert "accelerator cuda, devices auto: " in refusal(capsys, [*command, "--accelerator=cuda"])
    command = fit_tokenizer(images, images, tmp_path / "run", max_steps=1)
    assert "CUDAAccelerator" in refusal(capsys, [*command, "--trainer.accelerator=cuda"])
    assert not (tmp_path / "run").exists()


def test_a_pipeline_that_is_none(tmp_path, capsys):
    line = refusal(capsys, ["sample", "--pipeline", tmp_path, "--output", tmp_path / "out"])
    assert "config.json is missing" in line
    assert not (tmp_path / "out").exists()


# ---- what the system refuses, and the end of a run


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


def test_a_finished_run_leaves_its_process_group():
    """Gloo's connections, left to Python's end, abort a process now and then."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        main(["--version"])
        assert not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
