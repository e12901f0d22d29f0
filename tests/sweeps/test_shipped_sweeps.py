"""The sweeps under experiments/: every command of theirs parses, and their trainings take the first step, small."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import yaml
from tiny_models import write_tokens, write_vgg

from dar_lightning.ar.guidance import guidance_schedule
from dar_lightning.cli import main
from dar_lightning.sweeps.plan import Stage, Sweep, Work

ROOT = Path(__file__).parents[2]
FILES = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "experiments/sweeps").rglob("*.yaml"))}
NARROW = {
    "TokenizerModule": dict(encoder_dim=32, encoder_depth=1, conditioner_dim=32, conditioner_depth=1, decoder_dim=32)
    | dict(decoder_depth=1, head_dim=16, image_size=64),
    "AblationModule": dict(dim=48, depth=1, num_heads=3, multiple_of=32),
}
CONTINUED = "experiments/sweeps/codebook.yaml"  # from trained weights; test_configs takes its step

pytestmark = [
    pytest.mark.usefixtures("at_the_root_with_a_random_teacher"),
    pytest.mark.filterwarnings("ignore"),  # Lightning's, of options and loggers
]


def read(name: str) -> Sweep:
    given = yaml.safe_load(FILES[name].read_text())
    return Sweep(**given | {"stages": {stage: Stage(**values) for stage, values in given["stages"].items()}})


def works(name: str) -> list[Work]:
    """Those of the first cell and of the last one, each once."""
    plan = read(name)
    both = [work for cell in (plan.cells[0], plan.cells[-1]) for work in plan.work(cell, plan.seeds[-1]).values()]
    return list({work.hash: work for work in both}.values())


def test_every_sweep_has_a_small_one():
    names = {path.name for path in FILES.values() if path.parent.name == "sweeps"}
    assert names <= {path.name for path in FILES.values() if path.parent.name == "small"}
    assert {"order", "groups", "beta", "tokens", "size"} <= {Path(name).stem for name in names}


def test_models_of_fewer_tokens_have_the_guidance_of_the_first_of_all():
    """As where one model of 256 draws partial images, which is what the paper's figures are of."""
    plan = read("experiments/sweeps/tokens.yaml")
    for cell in plan.cells:
        given = {name: dict(word.split("=", 1) for word in work.words) for name, work in plan.work(cell, 0).items()}
        count, [row] = cell.values["tokens"], json.loads(given["gfid"]["--rows"])
        assert guidance_schedule(row["guidance"], count) == pytest.approx(guidance_schedule((1.1, 8.0), 256)[:count])
        assert json.loads(given["draw"]["--guidance"]) == row["guidance"]


@pytest.mark.parametrize("name", FILES)
def test_the_dry_run_prints_every_command(name, tmp_path, capsys):
    main(["sweep", name, "--output", str(tmp_path / "out"), "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    plan = read(name)
    runs = list(plan.runs())
    assert sum(line.startswith("# ") and ": as above" not in line for line in lines) == len(runs)
    hashes = {work.hash for cell, seed in runs for work in plan.work(cell, seed).values()}
    assert sum(line.startswith("dar ") for line in lines) == len(hashes)
    assert FILES[name].stem == plan.name
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", FILES)
def test_every_command_parses(name, tmp_path, capsys):
    for work in works(name):
        with pytest.raises(SystemExit) as stop:
            main([*work.command(tmp_path), "--print_config"])
        assert stop.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in FILES if name != CONTINUED])
def test_the_first_step_of_the_last_cell(name, tmp_path, capsys):
    plan = read(name)
    fits = [work for work in plan.work(plan.cells[-1], 0).values() if work.verb == "fit"]
    if "quantizer" in plan.grid and importlib.util.find_spec("vector_quantize_pytorch") is None:
        pytest.skip("needs vector-quantize-pytorch")
    for number, work in enumerate(fits):
        command = work.command(tmp_path / "out")
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([*command, "--print_config"])
        resolved = yaml.safe_load(capsys.readouterr().out)
        kind = resolved["model"]["class_path"].rpartition(".")[2]
        config = resolved["model"]["init_args"]["config"]
        words = [f"--model.init_args.config.{key}={value}" for key, value in NARROW[kind].items()]
        words += ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.check_val_every_n_epoch=null"]
        words += ["--trainer.limit_val_batches=1", "--trainer.accelerator=cpu", "--trainer.devices=1"]
        words += ["--trainer.strategy=auto"]  # DDP would leave its port in the environment of tests that come later
        words += ["--trainer.enable_progress_bar=false", "--global_batch=null", "--data.init_args.batch_size=2"]
        words += ["--data.init_args.num_workers=0"]
        if kind == "AblationModule":
            tokens = max(64, config["num_tokens"])  # those that the data has
            data = write_tokens(tmp_path / f"tokens{number}", 4, num_tokens=tokens, codebook_size=config["vocab_size"])
            words += [f"--data.init_args.train={data}", f"--data.init_args.val={data}"]
        else:
            words += ["--data.init_args.train=data/fruit64/train", "--data.init_args.val=data/fruit64/val"]
            words += ["--data.init_args.image_size=64"]
            if config["repa_layer"] is not None:
                words += ["--model.init_args.config.repa_layer=0"]
                vgg = write_vgg(tmp_path / "vgg.pth")
                words += [f"--model.init_args.perceptual.init_args.weights_path={vgg}"]
        main([*command, *words])
        log = tmp_path / "out" / work.folder / "tensorboard"
        assert list(log.glob("events.out.*"))
        assert (log / "config.yaml").is_file()
    assert "MASTER_PORT" not in os.environ
