"""Every YAML under experiments/ parses against the code's signatures; every training config takes its first step."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import Strategy
from tiny_models import make_tokenizer, write_tokens, write_vgg

from dar_lightning import ARConfig, TokenizerConfig
from dar_lightning.cli import main
from dar_lightning.training.batch_plan import accumulation

ROOT = Path(__file__).parents[1]
CONFIGS = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "experiments").rglob("*.yaml"))}
LAYERS = [name for name in CONFIGS if name.startswith("experiments/data/")]
METRICS = [name for name in CONFIGS if name.startswith("experiments/metrics/")]  # layers that add a callback
FINETUNE = [name for name in CONFIGS if Path(name).stem.startswith("finetune_")]  # layers over a training config
LPIPS = [f"experiments/quickstart/{name}.yaml" for name in ("lpips_tokenizer", "decoder")]
CODEBOOK = "experiments/tokenizer/codebook4096.yaml"
LONGER = "experiments/quickstart/longer_ar.yaml"
OVER = (*FINETUNE, *LPIPS, LONGER, CODEBOOK)
TABLES = [name for name, path in CONFIGS.items() if "rows" in yaml.safe_load(path.read_text())]  # test_table runs them
SWEEPS = [name for name in CONFIGS if name.startswith("experiments/sweeps/")]  # test_shipped_sweeps runs them
DEBUG = [name for name in CONFIGS if name.startswith("experiments/debug/")]
PREDICT = "experiments/evaluate/sample50k.yaml"  # test_predict runs it
FIT = [
    name
    for name, path in CONFIGS.items()
    if "model" in yaml.safe_load(path.read_text()) and name not in (*OVER, *SWEEPS, *DEBUG, PREDICT)
]
RECIPES = [name for name in FIT if name.startswith(("experiments/tokenizer/", "experiments/ar/"))]
FSDP = "experiments/trainer/fsdp.yaml"  # a layer over a machine's
MACHINES = {n: path for n, path in CONFIGS.items() if n.startswith("experiments/trainer/") and n != FSDP}
# tests/training/callbacks/test_monitor_layers.py runs these
MONITORS = [name for name in CONFIGS if name.startswith("experiments/monitor/")]
OTHERS = (*LAYERS, *FIT, *OVER, *MACHINES, *DEBUG, *MONITORS, *METRICS, *TABLES, *SWEEPS, FSDP, PREDICT)
TOOLS = [name for name in CONFIGS if name not in OTHERS]
TOKENIZER, AR = "experiments/quickstart/tokenizer.yaml", "experiments/quickstart/ar.yaml"

pytestmark = [
    pytest.mark.usefixtures("at_the_root_with_a_random_teacher"),
    pytest.mark.filterwarnings("ignore"),  # Lightning's, of options and loggers
]

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
    "AblationModule": dict(dim=32, depth=1, num_heads=2, multiple_of=32),
}


@pytest.fixture(scope="module")
def vgg(tmp_path_factory) -> Path:
    return write_vgg(tmp_path_factory.mktemp("vgg") / "vgg.pth")


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
    assert all((FIT, LAYERS, RECIPES, MACHINES, DEBUG))
    assert all(Path(name).stem == "sample" for name in TOOLS), "a tool's config bears the name of its verb"


@pytest.mark.parametrize("name", FIT)
def test_training_configs_parse_and_mean_what_they_say(name, capsys):
    assert contains(printed(capsys, "fit", "--config", name), yaml.safe_load(CONFIGS[name].read_text()))


@pytest.mark.parametrize("name", TOOLS)
def test_tool_configs_parse(name, capsys):
    verb = Path(name).stem
    assert contains(printed(capsys, verb, "--config", name), yaml.safe_load(CONFIGS[name].read_text()))


@pytest.mark.parametrize(
    ("verb", "name"),
    [("predict", PREDICT), *(("table", name) for name in TABLES), *(("sweep", name) for name in SWEEPS)],
)
def test_evaluation_configs_parse_and_mean_what_they_say(verb, name, capsys):
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


def test_fsdp_replaces_the_trainer_alone(capsys):
    alone = printed(capsys, "fit", "--config", AR)
    layered = printed(capsys, "fit", "--config", AR, "--config", FSDP)
    assert contains(layered, yaml.safe_load(CONFIGS[FSDP].read_text()))
    assert {key: value for key, value in layered.items() if key != "trainer"} == {
        key: value for key, value in alone.items() if key != "trainer"
    }


@pytest.mark.parametrize("name", METRICS)
def test_metric_layers_add_a_callback_and_measure(name, tmp_path, capsys):
    base = AR if "generation" in name else TOKENIZER
    layer = yaml.safe_load(CONFIGS[name].read_text())
    (added,) = layer["trainer"]["callbacks+"]
    callbacks = printed(capsys, "fit", "--config", base, "--config", name)["trainer"]["callbacks"]
    assert callbacks[:-1] == printed(capsys, "fit", "--config", base)["trainer"]["callbacks"]
    assert contains(callbacks[-1], added)

    arguments = {"features": "color_edges", "features_weights": None, "num_samples": 2, "every_n_steps": 1}
    if base == AR:
        arguments |= {"tokenizer": "dar_lightning/shipped/fruit64/tokenizer", "reference": "data/fruit64/val"}
    added["init_args"] |= arguments
    (tmp_path / "layer.yaml").write_text(yaml.safe_dump(layer))
    few = "--trainer.limit_val_batches=" + ("0.4" if base == AR else "0.02")
    first_step(base, tmp_path, "--config", str(tmp_path / "layer.yaml"), few)
    (written,) = (tmp_path / "run" / "evaluation").iterdir()
    assert json.loads(written.read_text())["protocol"]["samples"]["n"] == 2


def base_of(name: str) -> str:
    return name.replace("finetune_", "")


@pytest.mark.parametrize("name", FINETUNE)
def test_finetuning_goes_on_from_the_shipped_weights(name, tmp_path, capsys):
    words = ["fit", "--config", base_of(name), "--config", name]
    assert contains(printed(capsys, *words), yaml.safe_load(CONFIGS[name].read_text()))
    given = printed(capsys, *words)["model"]["init_args"]
    shipped = json.loads(Path(given["init_from"], "config.json").read_text())
    assert {key: value for key, value in shipped.items() if given["config"].get(key, value) != value} == {}
    first_step(base_of(name), tmp_path, "--config", name, "--trainer.max_steps=1", small=False)
    assert list((tmp_path / "run" / "logs").glob("events.out.*"))


@pytest.mark.parametrize(("base", "name"), [*((TOKENIZER, name) for name in LPIPS), (AR, LONGER)])
def test_layers_that_go_on_from_other_weights(base, name, vgg, tmp_path, capsys):
    words = ["fit", "--config", base, "--config", name]
    assert contains(printed(capsys, *words), yaml.safe_load(CONFIGS[name].read_text()))
    files = [f"--trainer.default_root_dir={tmp_path / 'run'}"]
    if base == TOKENIZER:
        files += ["--model.init_args.init_from=dar_lightning/shipped/fruit64/tokenizer"]
        files += [f"--model.init_args.perceptual.init_args.weights_path={vgg}"]
    else:
        files += ["--model.init_args.init_from=dar_lightning/shipped/fruit64/ar"]
        files += [f"--data.init_args.train={tmp_path / 'tokens'}"]
    first_step(base, tmp_path, "--config", name, *files, "--trainer.max_steps=1", small=False)
    assert list((tmp_path / "run" / "logs").glob("events.out.*"))


def first_step(name: str, folder: Path, *more: str, small: bool = True) -> None:
    """Run a training config for one step, small, on the embedded photos or on tokens made for it."""
    config = yaml.safe_load(CONFIGS[name].read_text())
    kind = config["model"]["class_path"].rpartition(".")[2]
    given = config["model"].get("init_args", {}).get("config", {})
    words = ["--config", name, f"--trainer.default_root_dir={folder / 'run'}", "--trainer.max_steps=1"]
    words += ["--trainer.limit_val_batches=2", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    words += ["--trainer.enable_progress_bar=false", "--trainer.val_check_interval=1", "--data.init_args.batch_size=2"]
    if name in RECIPES:
        words += ["--global_batch=2", "--trainer.check_val_every_n_epoch=null", "--data.init_args.num_workers=0"]
    if name in RECIPES and kind == "TokenizerModule":
        given = given | {"image_size": 64, "repa_layer": 0}
        words += ["--data.init_args.image_size=64"]
    if small:
        more = (f"--model.init_args.config={json.dumps(given | SMALL[kind])}", *more)
    if kind in ("ARModule", "AblationModule"):
        sizes = {"num_tokens": given.get("num_tokens", 32), "codebook_size": given.get("vocab_size", 64)}
        tokens = write_tokens(folder / "tokens", 6, **sizes)
        words += [f"--data.init_args.train={tokens}", f"--data.init_args.val={tokens}"]
    else:
        words += ["--data.init_args.train=data/fruit64/train", "--data.init_args.val=data/fruit64/val"]
    main(["fit", *words, *more])


@pytest.mark.parametrize("name", FIT)
def test_the_first_step(name, vgg, tmp_path):
    first_step(name, tmp_path, *lpips_of(name, vgg))
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


# ---- the paper's recipes


def lpips_of(name: str, vgg: Path) -> list[str]:
    used = "perceptual" in yaml.safe_load(CONFIGS[name].read_text())["model"]["init_args"]
    return [f"--model.init_args.perceptual.init_args.weights_path={vgg}"] if used else []


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("machine", MACHINES)
def test_recipes_on_machines(name, machine, capsys):
    recipe, layer = (yaml.safe_load(CONFIGS[one].read_text()) for one in (name, machine))
    assert set(layer) == {"trainer"}
    both = printed(capsys, "fit", "--config", name, "--config", machine)
    assert contains(both, recipe | {"trainer": recipe["trainer"] | layer["trainer"]})
    sizes = recipe["global_batch"], recipe["data"]["init_args"]["batch_size"]
    devices = layer["trainer"]["devices"] * layer["trainer"]["num_nodes"]
    if "light" in name and devices == 16:
        sizes = recipe["global_batch"], 16  # as its first lines say
    assert accumulation(*sizes, devices) >= 1


def test_how_long_sharded_devices_wait():
    """Unquoted, YAML 1.1 reads the time as a number."""
    given = yaml.safe_load(CONFIGS[FSDP].read_text())["trainer"]
    assert given["strategy"]["init_args"]["timeout"] == "0:30:00"
    parser = ArgumentParser()
    parser.add_subclass_arguments(Strategy, "strategy")
    strategy = parser.instantiate_classes(parser.parse_object(given)).strategy
    assert strategy._timeout == timedelta(minutes=30)


def test_recipes_are_the_presets():
    for name in RECIPES:
        given = yaml.safe_load(CONFIGS[name].read_text())["model"]["init_args"]["config"]
        kind = ARConfig if "/ar/" in name else TokenizerConfig
        assert kind(**given) == kind.preset(Path(name).stem), name


def test_sizes_differ_in_nothing_else():
    recipes = [yaml.safe_load(CONFIGS[f"experiments/ar/{size}.yaml"].read_text()) for size in ("B", "L", "XL", "XXL")]
    for recipe in recipes:
        del recipe["trainer"]["default_root_dir"], recipe["data"]["init_args"]["batch_size"]
        for key in ("dim", "depth", "num_heads"):
            del recipe["model"]["init_args"]["config"][key]
    assert all(recipe == recipes[0] for recipe in recipes)


def test_another_codebook_starts_from_k_means(vgg, tmp_path, capsys):
    """The step that ends its warm-up, on the weights of a tokenizer with v1's codebook."""
    base, layer = "experiments/tokenizer/v1.yaml", yaml.safe_load(CONFIGS[CODEBOOK].read_text())
    warmup = layer["trainer"].pop("callbacks+")
    both = printed(capsys, "fit", "--config", base, "--config", CODEBOOK)
    assert contains(both, layer)
    kept = yaml.safe_load(CONFIGS[base].read_text())["trainer"]["callbacks"]
    assert contains(both["trainer"]["callbacks"], kept + warmup)

    given = yaml.safe_load(CONFIGS[base].read_text())["model"]["init_args"]["config"]
    small = given | SMALL["TokenizerModule"] | {"image_size": 64, "repa_layer": 0}
    make_tokenizer(**small).save_pretrained(tmp_path / "source")
    words = ["--config", CODEBOOK, f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.max_steps=1"]
    words += ["--trainer.callbacks.warmup_steps=1", "--trainer.callbacks.collect_steps=1", "--trainer.devices=1"]
    words += [f"--model.init_args.init_from={tmp_path / 'source'}", *lpips_of(base, vgg)]
    words += [f"--model.init_args.config={json.dumps(small | {'codebook_size': 64})}"]
    first_step(base, tmp_path, *words, small=False)
    assert list((tmp_path / "run" / "logs").glob("events.out.*"))


@pytest.mark.parametrize("name", DEBUG)
def test_debugging_a_recipe(name, tmp_path, capsys):
    recipe = "experiments/ar/B.yaml"
    both = printed(capsys, "fit", "--config", recipe, "--config", name)
    assert contains(both, yaml.safe_load(CONFIGS[name].read_text()))
    words = ["--config", name, "--global_batch=null", "--trainer.max_steps=2"]
    if "profiler" in name:
        words += [f"--trainer.profiler.init_args.dirpath={tmp_path}"]
    first_step(recipe, tmp_path, *words, f"--trainer.default_root_dir={tmp_path / 'run'}")
    assert bool(list(tmp_path.glob("*profile*"))) == ("profiler" in name)
    assert (tmp_path / "run" / "logs").exists() == ("fast_dev_run" not in name)
    assert not (tmp_path / "run" / "checkpoints").exists()
