"""A user's mistake gets one line that names it, status 2 and no traceback, and leaves nothing half-written."""

import errno
import gc
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refusal
from tiny_models import fit_ar, fit_tokenizer, make_tokenizer, random_codes, write_images, write_tokens

from dar_lightning import __version__
from dar_lightning.cli import TRAINER_VERBS, USAGE, VERBS, main, spell_out_flags
from dar_lightning.data.token_dataset import CodesIndex, describe, write_codes
from dar_lightning.errors import begin_work

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Good shards, and some that cannot be trained on."""
    root = tmp_path_factory.mktemp("shards")
    (root / "empty").mkdir()
    (root / "file").write_text("")
    found = {"root": str(root), "images": write_images(root / "images", 8), "tokens": write_tokens(root / "tokens", 8)}
    write_images(root / "label", 8, label=lambda number: 4 if number == 3 else 0)
    # Token shards without class names do not say how many classes there are, only their labels do.
    path = root / "token_label" / "000000.safetensors"
    path.parent.mkdir()
    labels, keys = np.array([0, 1, 2, 3, 4, 0, 1, 2]), [str(number) for number in range(8)]
    write_codes(path, random_codes(8).astype(np.uint16)[:, None], labels, keys, {})
    replace(CodesIndex.load(found["tokens"]), root=path.parent, classes=(), shards=(describe(path, 8),)).save()
    return found


def fit(kind: str, folders: dict[str, str], run: Path, **trainer) -> list[str]:
    data, function = (folders["tokens"], fit_ar) if kind == "ar" else (folders["images"], fit_tokenizer)
    return function(data, data, run, max_steps=1, **trainer)


def test_a_mistake_in_a_real_process():
    """And without a second's wait, as for --help: nobody asks for torch."""
    words = [sys.executable, "-X", "importtime", "-m", "dar_lightning", "trian"]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    imported = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    (said,) = {*run.stderr.splitlines()} - {*imported}
    assert (run.returncode, run.stdout) == (2, "")
    assert said.startswith("dar trian: unknown verb 'trian': choose from fit, validate, test, predict, quick")
    assert {"dar_lightning", "yaml"} <= (names := {line.rsplit("|", 1)[1].strip() for line in imported})
    assert not {"torch", "numpy", "lightning"} & names


def test_a_program_collects_garbage_but_for_what_it_has_imported(monkeypatch, capsys):
    before = gc.get_freeze_count()
    monkeypatch.setattr(sys, "argv", ["dar", "compare", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "--files" in capsys.readouterr().out
    assert gc.get_freeze_count() > before
    assert gc.isenabled()


@pytest.mark.parametrize(("argv", "status"), [(["--help"], 0), ([], 2)])
def test_help_lists_every_verb(argv, status, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert (stop.value.code, capsys.readouterr().out.strip()) == (status, USAGE)
    assert all(re.search(rf"\b{verb}\b", USAGE) for verb in (*TRAINER_VERBS, *VERBS))
    main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("verb", [*TRAINER_VERBS, *VERBS])
def test_each_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert shown.startswith(f"usage: dar {verb}" if verb in VERBS else "usage: dar")
    assert "--config" in shown


@pytest.mark.parametrize("verb", ["fit", "sample"])
def test_options_and_config_files_that_cannot_be(verb, tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("a: [1,\n")
    assert "--nope" in refusal(capsys, [verb, "--nope", "3"])
    assert "no/such.yaml" in refusal(capsys, [verb, "--config", "no/such.yaml"])
    assert "line 2" in refusal(capsys, [verb, "--config", tmp_path / "x.yaml"])


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


CONFIG, CALLBACKS = "model.init_args.config", "dar_lightning.training.callbacks"


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("tokenizer", f"{CONFIG}.nope=3", "nope"),
        ("tokenizer", f"{CONFIG}.num_tokens=many", "num_tokens.*many"),
        ("tokenizer", f"{CONFIG}.num_tokens=9", "num_tokens 9 .*num_groups 4"),
        ("tokenizer", f"{CONFIG}.quantizer=lfq", "codebook_size is 32: lfq needs 2 to the power of codebook_dim, 4"),
        ("tokenizer", "model.init_args.preset=light", "light.*keep one of them"),
        ("tokenizer without", "model.init_args.preset=v2", "unknown tokenizer preset 'v2': choose from v1, light"),
        ("ar without", "model.init_args.preset=Q", "unknown AR preset 'Q': choose from tiny, B, L"),
        ("tokenizer", "model.init_args.nope=3", "nope"),
        ("tokenizer", "model=dar_lightning.training.NoModule", "NoModule"),
        ("tokenizer", "trainer.nope=3", "nope"),
        ("tokenizer", "trainer.callbacks+=NoCallback", "NoCallback"),
        (
            "tokenizer",
            f"trainer.callbacks+={CALLBACKS}.CodebookWarmup trainer.callbacks.warmup_steps=3",
            "collect_steps is 40",
        ),
        ("tokenizer", "data.init_args.crop=diagonal", "diagonal"),
        ("tokenizer", "data.init_args.batch_size=0", "batch_size"),
        ("tokenizer", "data.init_args.batch_size=9", "batch_size: 9"),
        ("tokenizer", "data.init_args.image_size=30", "30"),
        ("tokenizer", "data.init_args.train=no/shards", "data.train: no/shards does not exist"),
        ("tokenizer", "data.init_args.val={root}/empty", "data.val: no samples in"),
        ("tokenizer", "data.init_args.train={root}/label", "0003: its label is '4', the classes are 0 to 3"),
        *(("ar", f"{CONFIG}.{name}={value}", name) for name, value in (("num_classes", 3), ("vocab_size", 31))),
        ("ar", f"{CONFIG}.num_classes=5", "num_classes is 5 in the config: the data names 4 classes"),
        ("ar", f"{CONFIG}.num_tokens=9", "num_tokens"),
        *(
            ("ar", f"data.init_args.{x}={{root}}/token_label", "has label 4: .*num_classes is 4")
            for x in ("train", "val")
        ),
    ],
    ids=lambda value: value.split(".")[-1],
)
def test_a_training_that_cannot_be(kind, options, said, folders, tmp_path, capsys):
    kind, _, without = kind.partition(" ")  # a config
    words = fit(kind, folders, tmp_path / "run")
    command = [word for word in words if not (without and word.startswith(f"--{CONFIG}="))]
    line = refusal(capsys, [*command, *(f"--{option.format_map(folders)}" for option in options.split())])
    assert re.search(said, line), line
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_checkpoint_of_another_shape(folders, tmp_path, capsys):
    command = fit("tokenizer", folders, tmp_path / "run", limit_val_batches=0)
    main(command)
    checkpoint = next((tmp_path / "run").rglob("*.ckpt"))
    before = checkpoint.read_bytes()
    wider = [*command, f"--{CONFIG}.codebook_size=33", f"--ckpt_path={checkpoint}"]
    assert "codebook is (32, 4), need (33, 4)" in refusal(capsys, wider)
    other = [*fit("ar", folders, tmp_path / "other"), f"--ckpt_path={checkpoint}"]
    assert "is of the tokenizer part" in refusal(capsys, other)
    assert "no.ckpt" in refusal(capsys, [*command, "--ckpt_path=no.ckpt"])
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("verb", ["quickstart", "sweep", "sample", "reconstruct", "extract", "export"])
def test_an_output_that_lies_in_no_folder(verb, folders, pipeline, tmp_path, capsys):
    """A file stands where a folder would have to be."""
    (tmp_path / "file").write_text("")
    if verb == "export":
        model = make_tokenizer()
        state = {f"tokenizer.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"state_dict": state, "hyper_parameters": {"config": model.config.to_dict()}}, tmp_path / "t.ckpt")
    images = ["--tokenizer", f"{pipeline}/tokenizer", "--shards", folders["images"]]
    options = {
        "quickstart": [],
        "sweep": ["--config", ROOT / "experiments/sweeps/small/order.yaml"],
        "sample": ["--pipeline", pipeline, "--per_class", 1],
        "reconstruct": images,
        "extract": images,
        "export": ["--ckpt", tmp_path / "t.ckpt"],
    }[verb]
    output = tmp_path / "file" if verb == "quickstart" else tmp_path / "file" / "out"
    line = refusal(capsys, [verb, *options, "--output", output])
    said = {
        "export": "cannot write weights to {}: .*Not a directory.*",
        "extract": r"output: cannot write {} \(Not a directory\)",
    }.get(verb, "output: {}: Not a directory")
    assert re.fullmatch(f"dar {verb}: {said.format(re.escape(str(output)))}", line), line
    assert (tmp_path / "file").is_file()


@pytest.mark.parametrize("logger", ["true", "false"])
def test_a_run_whose_folder_lies_in_no_folder(logger, capsys, folders):
    run = fit("ar", folders, Path(folders["root"], "file", "run"), enable_checkpointing="false", logger=logger)
    with pytest.raises(SystemExit, match="2"):
        main(run)
    line = capsys.readouterr().err.splitlines()[-1]  # after what Lightning says of devices
    assert re.match(r"dar fit: (trainer.(logger|default_root_dir): |cannot write ).*file/run.*Not a directory", line)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without one")
def test_an_accelerator_that_is_not_there(folders, pipeline, tmp_path, capsys):
    options = ["--tokenizer", f"{pipeline}/tokenizer", "--shards", folders["images"], "--output", tmp_path / "tokens"]
    assert "accelerator cuda, devices auto: " in refusal(capsys, ["extract", *options, "--accelerator=cuda"])
    command = [*fit("tokenizer", folders, tmp_path / "run"), "--trainer.accelerator=cuda"]
    assert "CUDAAccelerator" in refusal(capsys, command)
    assert not (tmp_path / "run").exists()


def test_a_pipeline_that_is_none(tmp_path, capsys):
    assert "output" in refusal(capsys, ["sample", "--pipeline", "x"])
    line = refusal(capsys, ["sample", "--pipeline", tmp_path, "--output", tmp_path / "out"])
    assert "config.json is missing" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("number", "file", "said"),
    [
        (errno.ENOSPC, "/full/log.txt", "/full/log.txt: No space left on device"),
        (errno.ENOSPC, None, "No space left on device"),
        (errno.ENOENT, "/package/page.html", None),
    ],
)
def test_a_full_disk_is_one_line_and_an_error_of_the_program_a_traceback(number, file, said, monkeypatch, capsys):
    """Once the work has begun, also where the error names a file: it is not one that the user has named."""

    def compare(results: str) -> None:
        begin_work()
        raise OSError(number, "No space left on device" if said else "No such file", *([file] if file else []))

    monkeypatch.setattr("dar_lightning.commands.compare.compare", compare)
    if said:
        assert refusal(capsys, ["compare", "--results", "any"]) == f"dar compare: {said}"
    else:
        with pytest.raises(FileNotFoundError, match=r"page.html"):
            main(["compare", "--results", "any"])


def test_a_finished_run_leaves_its_process_group():
    """Gloo's connections, left to Python's end, abort a process now and then."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        main(["--version"])
        assert not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
