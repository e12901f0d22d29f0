"""The sweeps under experiments/: every command of theirs parses, and the small ones' trainings take the first step."""

import json
import os
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import write_tokens

from dar_lightning import ARConfig, TokenizerConfig
from dar_lightning.ar.guidance import guidance_schedule
from dar_lightning.cli import main
from dar_lightning.sweeps.plan import Stage, Sweep
from dar_lightning.tokenizer.quantizers import make_quantizer

ROOT = Path(__file__).parents[2]
FILES = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "experiments/sweeps").rglob("*.yaml"))}
CONFIG = "model.init_args.config"
NARROW = {
    "TokenizerModule": dict(encoder_dim=32, encoder_depth=1, conditioner_dim=32, conditioner_depth=1, decoder_dim=32)
    | dict(decoder_depth=1, head_dim=16, image_size=64),
    "AblationModule": dict(dim=48, depth=1, num_heads=3, multiple_of=32),
}
ONE_STEP = """
    --trainer.max_steps=1 --trainer.val_check_interval=1 --trainer.check_val_every_n_epoch=null
    --trainer.limit_val_batches=1 --trainer.accelerator=cpu --trainer.devices=1 --trainer.strategy=auto
    --trainer.enable_progress_bar=false --global_batch=null --data.init_args.batch_size=2
"""
PARSED = {}  # verb, config files and names of options -> what --print_config says: one command of a kind is enough

pytestmark = pytest.mark.usefixtures("at_the_root_with_a_random_teacher")


def read(name: str) -> Sweep:
    given = yaml.safe_load(FILES[name].read_text())
    return Sweep(**given | {"stages": {stage: Stage(**values) for stage, values in given["stages"].items()}})


def resolved(command: list[str], capsys) -> dict:
    """What `--print_config` says of it, or of one of its kind."""
    kind = tuple(word if word.startswith(("--config=", "--model=")) else word.partition("=")[0] for word in command)
    if kind not in PARSED:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*command, "--print_config"])
        out, err = capsys.readouterr()
        assert stop.value.code == 0, err
        PARSED[kind] = yaml.safe_load(out)
    return PARSED[kind]


def model(command: list[str], capsys) -> tuple[str, dict]:
    """The class that a training has, and its config."""
    found = resolved(command, capsys)["model"]
    options = dict(word.removeprefix("--").split("=", 1) for word in command[1:])
    own = {key: yaml.safe_load(value) for key, value in options.items() if key.startswith(f"{CONFIG}.")}
    values = found["init_args"]["config"] | {key.removeprefix(f"{CONFIG}."): value for key, value in own.items()}
    return found["class_path"].rpartition(".")[2], values


def test_every_sweep_has_a_small_one():
    names = {path.name for path in FILES.values() if path.parent.name == "sweeps"}
    assert names <= {path.name for path in FILES.values() if path.parent.name == "small"}
    assert {"order", "groups", "beta", "tokens", "size"} <= {Path(name).stem for name in names}


def test_models_of_fewer_tokens_have_the_guidance_of_the_first_of_all():
    """As where one model of 256 draws partial images, which is what the paper's numbers are of."""
    plan = read("experiments/sweeps/tokens.yaml")
    for cell in plan.cells:
        given = {name: dict(word.split("=", 1) for word in work.words) for name, work in plan.work(cell, 0).items()}
        count, [row] = cell.values["tokens"], json.loads(given["gfid"]["--rows"])
        assert guidance_schedule(row["guidance"], count) == pytest.approx(guidance_schedule((1.1, 8.0), 256)[:count])
        assert json.loads(given["draw"]["--guidance"]) == row["guidance"]


@pytest.mark.parametrize("name", FILES)
def test_every_command_parses(name, tmp_path, capsys):
    """The dry run prints those of all cells, each once; every model's config is one."""
    plan = read(name)
    runs = list(plan.runs())
    main(["sweep", name, "--output", str(tmp_path / "out"), "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert FILES[name].stem == plan.name
    heads = [line for line in lines if line.startswith("# ") and ": as above" not in line]
    assert heads == [f"# {number}: {cell.name} seed {seed}" for number, (cell, seed) in enumerate(runs)]
    works = {work.hash: work for cell, seed in runs for work in plan.work(cell, seed).values()}
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("dar ")]
    assert commands == [work.command(tmp_path / "out") for work in works.values()]
    assert not (tmp_path / "out").exists()
    for command in commands:
        if command[0] == "fit":
            kind, config = model(command, capsys)
            built = (TokenizerConfig if kind == "TokenizerModule" else ARConfig)(**config)
            if kind == "TokenizerModule":
                with torch.device("meta"):  # refuses sizes that the quantizer cannot have
                    make_quantizer(built.quantizer, built.codebook_size, built.codebook_dim, built.quantizer_options)
        else:
            resolved(command, capsys)


@pytest.mark.parametrize("name", [name for name in FILES if "/small/" in name])
def test_the_first_step_of_the_last_cell(name, tmp_path, capsys):
    plan = read(name)
    fits = [work for work in plan.work(plan.cells[-1], 0).values() if work.verb == "fit"]
    for number, work in enumerate(fits):
        command = work.command(tmp_path / "out")
        kind, config = model(command, capsys)
        words = [f"--{CONFIG}.{key}={value}" for key, value in NARROW[kind].items()] + ONE_STEP.split()
        if kind == "AblationModule":
            tokens = max(64, config["num_tokens"])  # those that the data has
            sizes = {"num_tokens": tokens, "codebook_size": config["vocab_size"]}
            data = write_tokens(tmp_path / f"tokens{number}", 4, map(str, range(config["num_classes"])), **sizes)
            words += [f"--data.init_args.train={data}", f"--data.init_args.val={data}"]
        else:
            words += ["--data.init_args.train=data/fruit64/train", "--data.init_args.val=data/fruit64/val"]
            words += ["--data.init_args.image_size=64"]
        main([*command, *words])
        log = tmp_path / "out" / work.folder / "tensorboard"
        assert list(log.glob("events.out.*"))
        assert (log / "config.yaml").is_file()
    assert "MASTER_PORT" not in os.environ, "DDP would leave it to the tests that come later"
