"""Every YAML under experiments/ parses against the code's signatures; every training config takes its first step."""

import json
from pathlib import Path

import pytest
import yaml
from tiny_models import write_tokens, write_vgg

from dar_lightning.cli import main

ROOT = Path(__file__).parents[1]
CONFIGS = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "experiments").rglob("*.yaml"))}
LAYERS = [name for name in CONFIGS if name.startswith("experiments/data/")]
FINETUNE = [name for name in CONFIGS if Path(name).stem.startswith("finetune_")]  # layers over a training config
TRAINER = [name for name in CONFIGS if name.startswith("experiments/trainer/")]  # layers that name the devices
LPIPS = "experiments/quickstart/lpips_tokenizer.yaml"
FIT = [
    name
    for name, path in CONFIGS.items()
    if "model" in yaml.safe_load(path.read_text()) and name not in (*FINETUNE, LPIPS)
]
# tests/callbacks/test_monitor_layers.py runs these
MONITORS = [name for name in CONFIGS if name.startswith("experiments/monitor/")]
TOOLS = [name for name in CONFIGS if name not in (*LAYERS, *TRAINER, *MONITORS, *FIT, *FINETUNE, LPIPS)]
TOKENIZER, AR = "experiments/quickstart/tokenizer.yaml", "experiments/quickstart/ar.yaml"

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of options and loggers

# What makes a step of any size cheap and leaves its structure alone.
SMALL = {
    "TokenizerModule": dict(
        encoder_dim=32,
        encoder_depth=1,
        conditioner_dim=32,
        conditioner_depth=1,
        decoder_dim=32,
        decoder_depth=1,
        head_dim=16,
    ),
    "ARModule": dict(dim=32, depth=1, num_heads=2, multiple_of=32),
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Configs name their data from there."""
    monkeypatch.chdir(ROOT)


def printed(capsys, *words: str) -> dict:
    """The complete config that a verb would run with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*words, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def contains(whole, part) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and contains(whole[key], part[key]) for key in part)
    if isinstance(part, list):
        return len(whole) == len(part) and all(map(contains, whole, part))
    return whole == part or number(whole) == number(part)


def number(value):
    """YAML takes 1e-3 for text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def test_every_file_is_of_a_known_kind():
    assert FIT
    assert LAYERS
    assert all(Path(name).stem == "sample" for name in TOOLS), "a tool's config bears the name of its verb"


@pytest.mark.parametrize("name", FIT)
def test_training_configs_parse_and_mean_what_they_say(name, capsys):
    assert contains(printed(capsys, "fit", "--config", name), yaml.safe_load(CONFIGS[name].read_text()))


@pytest.mark.parametrize("name", TOOLS)
def test_tool_configs_parse(name, capsys):
    verb = Path(name).stem
    assert contains(printed(capsys, verb, "--config", name), yaml.safe_load(CONFIGS[name].read_text()))


@pytest.mark.parametrize("name", LAYERS)
def test_data_layers_replace_the_data_alone(name, capsys):
    base = AR if "codes" in name else TOKENIZER
    alone = printed(capsys, "fit", "--config", base)
    layered = printed(capsys, "fit", "--config", base, "--config", name)
    assert contains(layered, yaml.safe_load(CONFIGS[name].read_text()))
    assert {key: value for key, value in layered.items() if key != "data"} == {
        key: value for key, value in alone.items() if key != "data"
    }


@pytest.mark.parametrize("name", TRAINER)
def test_trainer_layers_replace_the_trainer_alone(name, capsys):
    alone = printed(capsys, "fit", "--config", AR)
    layered = printed(capsys, "fit", "--config", AR, "--config", name)
    assert contains(layered, yaml.safe_load(CONFIGS[name].read_text()))
    assert {key: value for key, value in layered.items() if key != "trainer"} == {
        key: value for key, value in alone.items() if key != "trainer"
    }


def base_of(name: str) -> str:
    return name.replace("finetune_", "")


@pytest.mark.parametrize("name", FINETUNE)
def test_finetuning_goes_on_from_the_shipped_weights(name, tmp_path, capsys):
    words = ["fit", "--config", base_of(name), "--config", name]
    assert contains(printed(capsys, *words), yaml.safe_load(CONFIGS[name].read_text()))
    first_step(base_of(name), tmp_path, "--config", name, "--trainer.max_steps=1", small=False)
    assert list((tmp_path / "run" / "logs").glob("events.out.*"))


def test_lpips_goes_on_from_other_weights(tmp_path, capsys):
    words = ["fit", "--config", TOKENIZER, "--config", LPIPS]
    assert contains(printed(capsys, *words), yaml.safe_load(CONFIGS[LPIPS].read_text()))
    vgg = write_vgg(tmp_path / "vgg.pth")
    files = [
        "--model.init_args.init_from=dar_lightning/shipped/fruit64/tokenizer",
        f"--model.init_args.perceptual.init_args.weights_path={vgg}",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
    ]
    first_step(TOKENIZER, tmp_path, "--config", LPIPS, *files, "--trainer.max_steps=1", small=False)
    assert list((tmp_path / "run" / "logs").glob("events.out.*"))


def first_step(name: str, folder: Path, *more: str, small: bool = True) -> None:
    """Run a training config for one step, small, on the embedded photos or on tokens made for it."""
    config = yaml.safe_load(CONFIGS[name].read_text())
    kind = config["model"]["class_path"].rpartition(".")[2]
    given = config["model"].get("init_args", {}).get("config", {})
    words = ["--config", name, f"--trainer.default_root_dir={folder / 'run'}", "--trainer.max_steps=1"]
    words += ["--trainer.limit_val_batches=1", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    words += ["--trainer.enable_progress_bar=false", "--trainer.val_check_interval=1", "--data.init_args.batch_size=2"]
    if small:
        more = (f"--model.init_args.config={json.dumps(given | SMALL[kind])}", *more)
    if kind == "ARModule":
        sizes = {"num_tokens": given.get("num_tokens", 32), "codebook_size": given.get("vocab_size", 64)}
        tokens = write_tokens(folder / "tokens", 6, **sizes)
        words += [f"--data.init_args.train={tokens}", f"--data.init_args.val={tokens}"]
    else:
        words += ["--data.init_args.train=data/fruit64/train", "--data.init_args.val=data/fruit64/val"]
    main(["fit", *words, *more])


@pytest.mark.parametrize("name", FIT)
def test_the_first_step(name, tmp_path):
    first_step(name, tmp_path)
    assert (tmp_path / "run" / "logs" / "config.yaml").is_file()
    assert list((tmp_path / "run" / "logs").glob("events.out.*"))


def test_the_first_step_on_layered_data(tmp_path):
    first_step(TOKENIZER, tmp_path, "--config", "experiments/data/fruit64.yaml", "--data.init_args.batch_size=2")
    used = yaml.safe_load((tmp_path / "run" / "logs" / "config.yaml").read_text())
    assert contains(used["data"]["init_args"], {"flip": True, "image_size": 64, "batch_size": 2})


def test_the_saved_config_repeats_the_run(tmp_path, capsys):
    first_step(AR, tmp_path)
    saved = tmp_path / "run" / "logs" / "config.yaml"
    assert contains(printed(capsys, "fit", "--config", str(saved)), yaml.safe_load(saved.read_text()))
