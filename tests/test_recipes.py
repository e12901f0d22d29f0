"""The paper's recipes, number by number, and what in them is our choice because the paper is silent."""

from pathlib import Path

import pytest
import yaml

RECIPES = Path(__file__).parents[1] / "experiments"
CALLBACKS = "dar_lightning.training.callbacks"
MODEL, OPTIMIZER, CONFIG = "model.init_args", "model.init_args.optimizer", "model.init_args.config"
EMA = f"trainer.callbacks.{CALLBACKS}.EMA.decay"


def under(prefix: str, **values) -> dict:
    return {f"{prefix}.{name}": value for name, value in values.items()}


# Keys are paths in the YAML; a callback's options stand behind its class path.
COMMON = {
    "seed_everything": 0,
    "trainer.precision": "bf16-mixed",
    f"{MODEL}.compile": True,
    "trainer.gradient_clip_val": 1.0,
    f"{OPTIMIZER}.betas": [0.9, 0.95],
    "data.init_args.seed": 0,
}
TOKENIZER = COMMON | {
    "trainer.max_steps": 210_000,
    "global_batch": 1024,
    **under(OPTIMIZER, lr=2e-4, weight_decay=0.0, warmup_steps=5000),
    EMA: 0.999,
    f"{MODEL}.perceptual.class_path": "dar_lightning.training.losses.PerceptualLoss",
    f"{MODEL}.perceptual.init_args": {"weight": 0.5},
    f"{MODEL}.repa.class_path": "dar_lightning.training.losses.RepaLoss",
    f"{MODEL}.repa.init_args": {"weight": 0.5},
    **under(CONFIG, image_size=256, encoder_patch_size=16, encoder_dim=768, encoder_depth=8),
    **under(CONFIG, conditioner_dim=768, conditioner_depth=8, codebook_size=16384, codebook_dim=8),
    **under(CONFIG, num_tokens=256, num_groups=8, decoder_dim=768, decoder_depth=12, decoder_patch_size=8),
    **under(CONFIG, data_std=0.6, time_shift=2.0, repa_layer=8),
    **under("data.init_args", image_size=256, crop="adm", flip=True),
}
LIGHT = {
    "trainer.max_steps": 50_000,
    "global_batch": 256,
    **under(CONFIG, encoder_dim=512, conditioner_dim=512, decoder_dim=512, decoder_depth=8, repa_layer=5),
}
CODEBOOK = {
    "trainer.max_steps": 50_000,
    **under(OPTIMIZER, lr=1e-4, warmup_steps=500, decay_steps=10_000),
    f"{CONFIG}.codebook_size": 4096,
}
AR = COMMON | {
    "trainer.max_steps": 360_000,
    "global_batch": 1024,
    **under(OPTIMIZER, lr=4e-4, weight_decay=0.05, warmup_steps=0, decay_steps=60_000, final_lr=1e-5),
    EMA: None,
    **under(CONFIG, vocab_size=16384, num_tokens=256, num_classes=1000),
    **under(CONFIG, class_dropout=0.1, token_dropout=0.1, residual_dropout=0.1, ffn_dropout=0.1),
}
SIZES = {"B": (12, 12, 768), "L": (24, 16, 1024), "XL": (36, 20, 1280), "XXL": (48, 24, 1536)}  # depth, heads, dim
TABLE = {
    "tokenizer/v1": TOKENIZER,
    "tokenizer/light": TOKENIZER | LIGHT,
    "tokenizer/codebook4096": CODEBOOK,
    **{f"ar/{name}": AR | under(CONFIG, depth=a, num_heads=b, dim=c) for name, (a, b, c) in SIZES.items()},
}

SAVE = {"LastStepCheckpoint": {"every_n_train_steps": 1000, "save_last": True, "save_top_k": 0}}
WATCH = {"SkipBadSteps": {}, "Throughput": {"flops": False}}
CALLS = dict.fromkeys(TABLE, SAVE | WATCH)
CALLS |= dict.fromkeys(list(TABLE)[:2], SAVE | {"EMA": {"decay": 0.999}, "Reconstructions": {}} | WATCH)
CALLS["tokenizer/codebook4096"] = {"CodebookWarmup": {"warmup_steps": 20, "collect_steps": 4}}

SEEDS = ("seed_everything", "data.init_args.seed")
LIKE_V1 = [f"{OPTIMIZER}.{name}" for name in ("lr", "betas", "weight_decay")] + ["trainer.gradient_clip_val", EMA]
LIKE_V1 += [f"{MODEL}.{name}.init_args.weight" for name in ("perceptual", "repa")]
OURS = {
    "tokenizer/v1": (*SEEDS, f"{OPTIMIZER}.warmup_steps"),
    "tokenizer/light": (*SEEDS, f"{OPTIMIZER}.warmup_steps", *LIKE_V1, f"{CONFIG}.repa_layer"),
    "tokenizer/codebook4096": [name for name in CODEBOOK if name != f"{CONFIG}.codebook_size"],
    **{f"ar/{name}": SEEDS for name in SIZES},
}


def lines(name: str) -> dict[str, tuple[object, str]]:
    """Each path in a recipe -> its value, and the line of its key."""
    text = (RECIPES / f"{name}.yaml").read_text()
    found = {}

    def walk(node, value, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            if "class_path" in value and prefix == "trainer.callbacks":
                prefix, value = f"{prefix}.{value['class_path']}", value.get("init_args", {})
                node = next((child for key, child in node.value if key.value == "init_args"), None)
            for key, child in node.value if node else ():
                path = f"{prefix}.{key.value}".lstrip(".")
                found[path] = value[key.value], text.splitlines()[key.start_mark.line]
                walk(child, value[key.value], path)
        elif isinstance(node, yaml.SequenceNode):
            for child, one in zip(node.value, value, strict=True):
                walk(child, one, prefix)

    walk(yaml.compose(text), yaml.safe_load(text), "")
    return found


def test_every_recipe_is_in_the_table():
    files = [*RECIPES.glob("tokenizer/*.yaml"), *RECIPES.glob("ar/*.yaml")]
    assert {f"{path.parent.name}/{path.stem}" for path in files} == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_has_its_numbers(name):
    recipe = lines(name)
    found = {path: value for path, (value, _) in recipe.items()}
    wrong = {path: (found.get(path), value) for path, value in TABLE[name].items() if found.get(path) != value}
    assert wrong == {}
    trainer = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["trainer"]
    given = [one for key in trainer if "callbacks" in key for one in trainer[key]]
    assert [(one["class_path"], one.get("init_args", {})) for one in given] == [
        (f"{CALLBACKS}.{word}", options) for word, options in CALLS[name].items()
    ]
    # What a recipe sets beside that must not be another way to change what is computed.
    trainer = ("default_root_dir", "callbacks", "callbacks+", "check_val_every_n_epoch", "log_every_n_steps")
    model = ("compile", "activation_checkpointing", *["init_from"] * ("codebook" in name))
    data = ("train", "val", "batch_size", "num_workers", "num_classes")
    known = (*TABLE[name], "ckpt_path", *(f"trainer.{key}" for key in trainer))
    known += (*(f"{MODEL}.{key}" for key in model), *(f"data.init_args.{key}" for key in data))
    near = {path for path in found for k in known if f"{path}.".startswith(f"{k}.") or k.startswith(f"{path}.")}
    left = [path for path in found if path not in near]
    assert left == ["model.class_path", "data.class_path"] * ("codebook" not in name)
    # What the paper does not say is called our choice.
    assert sorted(path for path, (_, line) in recipe.items() if "our choice" in line) == sorted(OURS[name])


def test_every_run_states_its_precision():
    """Layers take that of the config below them."""
    configs = {path: yaml.safe_load(path.read_text()) for path in RECIPES.rglob("*.yaml")}
    whole = {path: config for path, config in configs.items() if "data" in config}  # a layer may name another module
    runs = {path: config for path, config in whole.items() if "class_path" in config.get("model", {})}
    assert len(runs) == 12
    allowed = {"32-true", "bf16-mixed"}
    assert {path.name for path, config in runs.items() if config["trainer"].get("precision") not in allowed} == set()
