"""The layers in experiments/monitor: each adds its callbacks to a config's own, and they write their curves."""

from pathlib import Path

import pytest
import yaml
from event_file import scalars
from tiny_models import fit_ar, fit_tokenizer

from dar_lightning.cli import main

ROOT = Path(__file__).parents[3]
CURVES = {"train", "val", "optimizer", "speed", "memory", "groups"}

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of options and loggers


def names(callbacks: list[dict]) -> list[str]:
    return [callback["class_path"] for callback in callbacks]


@pytest.mark.parametrize("kind", ["tokenizer", "ar"])
def test_callbacks_are_added(kind, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    base, layer = (f"experiments/{folder}/{kind}.yaml" for folder in ("quickstart", "monitor"))
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", base, "--config", layer, "--print_config"])
    both = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    own = yaml.safe_load(Path(base).read_text())["trainer"]["callbacks"]
    added = yaml.safe_load(Path(layer).read_text())["trainer"]["callbacks+"]
    assert names(both) == names(own) + names(added)


def run(command: list, kind: str, *more: str) -> set[str]:
    """Train with the layer; sections of the curves that were written."""
    words = [*command, f"--config={ROOT / 'experiments' / 'monitor' / f'{kind}.yaml'}", *more]
    main([str(word) for word in words])
    folder = Path(next(word for word in words if str(word).startswith("--trainer.default_root_dir=")).partition("=")[2])
    return {name.partition("/")[0] for name in scalars(folder) if "/" in name}


def test_a_tokenizers_curves(images, tmp_path):
    assert run(fit_tokenizer(*images, tmp_path, max_steps=2, val_check_interval=2), "tokenizer") == CURVES | {
        "codebook"
    }


def test_an_ar_models_curves(tokens, tmp_path):
    assert run(fit_ar(*tokens, tmp_path, max_steps=2, val_check_interval=2), "ar") == CURVES
