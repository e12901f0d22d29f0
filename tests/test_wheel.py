"""The wheel holds all that commands of the docs name: they work in an empty folder, without a clone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import io
from contextlib import redirect_stdout, suppress
from pathlib import Path

import dar_lightning
from dar_lightning.cli import main
from dar_lightning.commands import quickstart
from dar_lightning.data.shards import ShardIndex

def dar(*words):
    with redirect_stdout(io.StringIO()) as shown, suppress(SystemExit):
        main(words)
    return shown.getvalue()

def parse(stage, out):
    for command in stage.commands:
        assert dar(*command, "--print_config"), command

print(Path(dar_lightning.__file__).parent)
assert "max_steps: 360000" in dar("fit", "--config", "experiments/ar/B.yaml", "--print_config")
assert "cell" in dar("sweep", "--config", "experiments/sweeps/small/order.yaml", "--help")
assert "cell" in dar("sweep", "experiments/sweeps/small/order.yaml", "--help")
assert "data/fruit64/train" in dar("sweep", "experiments/sweeps/small/order.yaml", "--dry_run")
assert ShardIndex.load("data/fruit64/train/{000000..000001}.tar").num_samples == 512
quickstart.run_stage, quickstart.finish = parse, lambda out: print("the end")
assert dar("quickstart").endswith("the end\\n")

configs = [f"--config=experiments/quickstart/{name}tokenizer.yaml" for name in ("", "finetune_")]
dar("fit", *configs, "--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--trainer.default_root_dir=run")
dar("sample", "--pipeline=fruit64", "--classes=Orange", "--layout=experiments/quickstart/layout.png", "--output=out")

Path("experiments/ar").mkdir(parents=True)
Path("experiments/ar/B.yaml").write_text("trainer: {max_steps: 7}")
assert "max_steps: 7" in dar("fit", "--config", "experiments/ar/B.yaml", "--print_config")
"""


@pytest.mark.slow
def test_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    wheel = pytest.importorskip("hatchling.build").build_wheel(str(tmp_path))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", "packages", wheel]
    subprocess.run(pip, cwd=tmp_path, check=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "packages")}
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=empty, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == str(tmp_path / "packages/dar_lightning")
    assert (empty / "run/checkpoints/last.ckpt").is_file()
    assert (empty / "out/layout.png").is_file()
