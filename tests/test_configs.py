"""Every YAML under experiments/ parses against the code's signatures; every training config takes a first step."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import Strategy
from tiny_models import make_tokenizer, write_tokens

from dar_lightning import ARConfig, TokenizerConfig
from dar_lightning.cli import main
from dar_lightning.training.batch_plan import accumulation

ROOT = Path(__file__).parents[1]
CONFIGS = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "experiments").rglob("*.yaml"))}
TOKENIZER, AR = "experiments/quickstart/tokenizer.yaml", "experiments/quickstart/ar.yaml"
V1, B = "experiments/tokenizer/v1.yaml", "experiments/ar/B.yaml"
CODEBOOK, LONGER = "experiments/tokenizer/codebook4096.yaml", "experiments/quickstart/longer_ar.yaml"
ANNEALED = "experiments/ablation/annealed_L.yaml"
FSDP, PREDICT = "experiments/trainer/fsdp.yaml", "experiments/evaluate/sample50k.yaml"


def read(name: str) -> dict:
    return yaml.safe_load(CONFIGS[name].read_text())


def under(*folders: str) -> list[str]:
    return [name for name in CONFIGS if name.split("/")[1] in folders]


# What each file is a layer over; None for a whole config.
BASES = {name: AR if "codes" in name else TOKENIZER for name in under("data")}
BASES |= {name: AR if "generation" in name else TOKENIZER for name in under("metrics")}
BASES |= {name: TOKENIZER if Path(name).stem == "tokenizer" else AR for name in under("monitor")}
BASES |= dict.fromkeys(under("debug"), B) | dict.fromkeys(under("trainer"), V1) | {FSDP: AR, LONGER: AR}
FINETUNE = [name for name in CONFIGS if Path(name).stem.startswith("finetune_")]
BASES |= {name: name.replace("finetune_", "") for name in FINETUNE}
LPIPS = [f"experiments/quickstart/{name}.yaml" for name in ("lpips_tokenizer", "decoder")]
BASES |= dict.fromkeys(LPIPS, TOKENIZER) | {CODEBOOK: V1}
BASES |= dict.fromkeys([*under("condition", "passes"), ANNEALED], "experiments/ar/L.yaml")
VERBS = dict.fromkeys(under("sweeps"), "sweep") | dict.fromkeys(under("evaluate"), "table") | {PREDICT: "predict"}
VERBS["experiments/quickstart/sample.yaml"] = "sample"
BASES |= {name: AR if Path(name).stem.startswith("ar") else TOKENIZER for name in under("emoji64", "own")}
BASES |= {name: B if Path(name).stem == "ar" else V1 for name in under("rehearsal")}
BASES |= dict.fromkeys(under("cluster"), AR)
RECIPES = [name for name in under("tokenizer", "ar") if name != CODEBOOK]
MACHINES = [name for name in under("trainer") if name != FSDP]

pytestmark = pytest.mark.usefixtures("at_the_root_with_a_random_teacher")

# What makes a step of any size cheap and leaves its structure alone.
PARTS = ("encoder", "conditioner", "decoder")
SMALL_AR = dict(dim=32, depth=1, num_heads=2, multiple_of=32)
SMALL_TOKENIZER = {f"{part}_{what}": value for part in PARTS for what, value in (("dim", 32), ("depth", 1))}
SMALL_TOKENIZER["head_dim"] = 16


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


ALONE: dict[str, dict] = {}  # bases, as printed without a layer


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_parses_and_means_what_it_says(name, capsys):
    """Also as a layer, which leaves everything else as it was."""
    base, given = BASES.get(name), read(name)
    whole = printed(capsys, VERBS.get(name, "fit"), *(["--config", base] if base else []), "--config", name)
    added = given.get("trainer", {}).pop("callbacks+", [])
    assert contains(whole, given)
    if added:
        assert contains(whole["trainer"]["callbacks"], read(base)["trainer"]["callbacks"] + added)
    if name in under("data", "trainer"):
        if base not in ALONE:
            ALONE[base] = printed(capsys, "fit", "--config", base)
        (part,) = given
        assert whole | {part: None} == ALONE[base] | {part: None}


def first_step(name: str, folder: Path, *more: str, small: bool = True) -> list[Path]:
    """Run a training config for one step, small, on the embedded photos or on tokens made for it; its event files."""
    config = read(name)
    given = config["model"].get("init_args", {}).get("config", {})
    words = ["--config", name, f"--trainer.default_root_dir={folder / 'run'}", "--trainer.max_steps=1"]
    words += ["--trainer.limit_val_batches=2", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    words += ["--trainer.enable_progress_bar=false", "--trainer.val_check_interval=1", "--data.init_args.batch_size=2"]
    is_tokenizer = config["model"]["class_path"].endswith("TokenizerModule")
    if name in RECIPES:
        words += ["--global_batch=2", "--trainer.check_val_every_n_epoch=null", "--data.init_args.num_workers=0"]
        words += ["--model.init_args.compile=false"]  # on a CPU this takes a minute
        if is_tokenizer:
            given = given | {"image_size": 64, "repa_layer": 0}
            words += [f"--data.init_args.{split}=data/fruit64/{split}" for split in ("train", "val")]
            words += ["--data.init_args.image_size=64"]
    if small:
        sizes = SMALL_TOKENIZER if is_tokenizer else SMALL_AR
        more = (f"--model.init_args.config={json.dumps(given | sizes)}", *more)
    if not is_tokenizer:
        sizes = {"num_tokens": given.get("num_tokens", 32), "codebook_size": given.get("vocab_size", 64)}
        names = map(str, range(given.get("num_classes", ARConfig().num_classes)))
        tokens = write_tokens(folder / "tokens", 6, names, **sizes)
        words += [f"--data.init_args.train={tokens}", f"--data.init_args.val={tokens}"]
    main(["fit", *words, *more])
    return list((folder / "run" / "logs").glob("events.out.*"))


def lpips_of(name: str, vgg: str) -> list[str]:
    used = "perceptual" in read(name)["model"]["init_args"]
    return [f"--model.init_args.perceptual.init_args.weights_path={vgg}"] if used else []


@pytest.mark.parametrize(
    "name", [V1, B, *(name for name in under("ablation") if name not in BASES)]
)  # the other recipes have other sizes only
def test_the_first_step(name, vgg_file, tmp_path):
    assert first_step(name, tmp_path, *lpips_of(name, vgg_file))


def test_the_first_step_on_layered_data_and_its_saved_config(tmp_path, capsys):
    first_step(TOKENIZER, tmp_path, "--config", "experiments/data/fruit64.yaml", "--data.init_args.batch_size=2")
    path = tmp_path / "run" / "logs" / "config.yaml"
    saved = yaml.safe_load(path.read_text())
    assert contains(saved["data"]["init_args"], {"flip": True, "image_size": 64, "batch_size": 2})
    assert contains(printed(capsys, "fit", "--config", str(path)), saved), "it repeats the run"


@pytest.mark.parametrize("name", [f"experiments/metrics/{name}_fid.yaml" for name in ("generation", "reconstruction")])
def test_metric_layers_measure(name, tmp_path):
    base, layer = BASES[name], read(name)
    arguments = {"features": "color_edges", "features_weights": None, "num_samples": 2, "every_n_steps": 1}
    if base == AR:
        arguments |= {"tokenizer": "dar_lightning/shipped/fruit64/tokenizer", "reference": "data/fruit64/val"}
    layer["trainer"]["callbacks+"][0]["init_args"] |= arguments
    (tmp_path / "layer.yaml").write_text(yaml.safe_dump(layer))
    few = "--trainer.limit_val_batches=" + ("0.4" if base == AR else "0.02")
    first_step(base, tmp_path, "--config", str(tmp_path / "layer.yaml"), few)
    (written,) = (tmp_path / "run" / "evaluation").iterdir()
    assert json.loads(written.read_text())["protocol"]["samples"]["n"] == 2


@pytest.mark.parametrize("name", [*FINETUNE, *LPIPS, LONGER])
def test_layers_that_go_on_from_the_shipped_weights(name, vgg_file, tmp_path, capsys):
    base = BASES[name]
    given = printed(capsys, "fit", "--config", base, "--config", name)["model"]["init_args"]
    shipped = f"dar_lightning/shipped/fruit64/{'tokenizer' if base == TOKENIZER else 'ar'}"
    files = ["--config", name, f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.max_steps=1"]
    if name in FINETUNE:
        assert given["init_from"] == shipped
        config = json.loads(Path(shipped, "config.json").read_text())
        assert {key: value for key, value in config.items() if given["config"].get(key, value) != value} == {}
    else:
        files += [f"--model.init_args.init_from={shipped}", *lpips_of(name, vgg_file)]
        files += [f"--data.init_args.train={tmp_path / 'tokens'}"] if name == LONGER else []
    assert first_step(base, tmp_path, *files, small=False)


@pytest.mark.parametrize("name", under("debug"))
def test_debugging_a_recipe(name, tmp_path):
    words = ["--config", name, "--global_batch=null", "--trainer.max_steps=2"]
    if "profiler" in name:
        words += [f"--trainer.profiler.init_args.dirpath={tmp_path}"]
    first_step(B, tmp_path, *words, f"--trainer.default_root_dir={tmp_path / 'run'}")
    assert bool(list(tmp_path.glob("*profile*"))) == ("profiler" in name)
    assert (tmp_path / "run" / "logs").exists() == ("fast_dev_run" not in name)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_another_codebook_starts_from_k_means(vgg_file, tmp_path):
    """The step that ends its warm-up, on the weights of a tokenizer with v1's codebook."""
    given = read(V1)["model"]["init_args"]["config"]
    small = given | SMALL_TOKENIZER | {"image_size": 64, "repa_layer": 0}
    make_tokenizer(**small).save_pretrained(tmp_path / "source")
    words = ["--config", CODEBOOK, f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.max_steps=1"]
    words += ["--trainer.callbacks.warmup_steps=1", "--trainer.callbacks.collect_steps=1", "--trainer.devices=1"]
    words += [f"--model.init_args.init_from={tmp_path / 'source'}", *lpips_of(V1, vgg_file)]
    words += [f"--model.init_args.config={json.dumps(small | {'codebook_size': 64})}"]
    assert first_step(V1, tmp_path, *words, small=False)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("machine", MACHINES)
def test_recipes_fit_machines(name, machine):
    recipe, trainer = read(name), read(machine)["trainer"]
    devices, size = trainer["devices"] * trainer["num_nodes"], recipe["data"]["init_args"]["batch_size"]
    if "light" in name and devices == 16:
        size = 16  # as its first lines say
    assert accumulation(recipe["global_batch"], size, devices) >= 1


def test_how_long_sharded_devices_wait():
    """Unquoted, YAML 1.1 reads the time as a number."""
    given = read(FSDP)["trainer"]
    assert given["strategy"]["init_args"]["timeout"] == "0:30:00"
    parser = ArgumentParser()
    parser.add_subclass_arguments(Strategy, "strategy")
    strategy = parser.instantiate_classes(parser.parse_object(given)).strategy
    assert strategy._timeout == timedelta(minutes=30)


def test_recipes_are_the_presets():
    for name in RECIPES:
        given, kind = read(name)["model"]["init_args"]["config"], ARConfig if "/ar/" in name else TokenizerConfig
        assert kind(**given) == kind.preset(Path(name).stem), name
