"""The examples of docs/extend.md, taken from the page as they stand there and run."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dar_lightning import DARPipeline
from dar_lightning.cli import main
from dar_lightning.sweeps.curves import last_scalars

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/extend.md").read_text()
QUICK = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.log_every_n_steps=1"]
QUICK += ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--data.init_args.batch_size=2"]


def blocks(heading: str, language: str) -> list[str]:
    """The fenced blocks of a section."""
    section = re.split(r"(?m)^## ", PAGE.split(f"## {heading}\n")[1])[0]
    return re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)


def write_files(heading: str, folder: Path) -> None:
    """The blocks that begin with the name of a file."""
    for text in blocks(heading, "(?:python|yaml)"):
        if name := re.match(r"# (\S+\.(?:py|yaml))\n", text):
            (folder / name[1]).write_text(text)


def command(heading: str) -> list[str]:
    """What follows `python -m dar_lightning`."""
    (text,) = blocks(heading, "bash")
    words = shlex.split(text.replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "dar_lightning"]
    return words[3:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("heading", "curves"),
    [("A loss of the tokenizer", {"train/edges", "train/flow"}), ("A callback", {"latents/length"})],
)
def test_what_a_training_is_given(heading, curves, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does
    write_files(heading, tmp_path)
    main([*command(heading), *QUICK, f"--trainer.default_root_dir={tmp_path}/run"])
    logged = last_scalars(tmp_path / "run/logs", ("train/", "latents/"))
    assert curves <= logged.keys()
    if "train/edges" in curves:
        total = sum(logged[f"train/{name}"] for name in ("flow", "vq", "commit")) + 0.1 * logged["train/edges"]
        assert logged["train/loss"] == pytest.approx(total, rel=1e-4)


def test_a_feature_network(tmp_path, monkeypatch):
    heading = "A metric: your own feature network"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_files(heading, tmp_path)
    main(command(heading))
    found = json.loads((tmp_path / "runs/color_moments.json").read_text())
    assert 0 < found["metrics"]["FD-color_moments.ColorMoments"] < 0.1


def test_a_guidance_schedule(tmp_path, monkeypatch):
    heading = "A guidance schedule"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_files(heading, tmp_path)
    main([*command(heading), "--device=cpu"])
    found = json.loads((tmp_path / "runs/zigzag/samples.json").read_text())
    assert found["guidance"] == "zigzag.Zigzag,odd=3,even=1.5"
    alternating = ([3.0] * 8 + [1.5] * 8) * 4
    assert DARPipeline.from_pretrained("fruit64").guidance_scales(found["guidance"]) == alternating


def test_a_quantizer_and_an_order(tmp_path):
    """In a copy of the package, which the page's changes are applied to."""
    ignored = shutil.ignore_patterns("shipped", "__pycache__")
    shutil.copytree(ROOT / "dar_lightning", tmp_path / "dar_lightning", ignore=ignored)
    headings = ("A quantizer", "An order of tokens")
    for heading in headings:
        write_files(heading, tmp_path)
        (patch,) = blocks(heading, "diff")
        subprocess.run(["git", "apply", "-"], input=patch, cwd=tmp_path, text=True, check=True)
    programs = [text for heading in headings for text in blocks(heading, "python") if not text.startswith("# ")]
    assert len(programs) == 2
    subprocess.run([sys.executable, "-c", "\n".join(programs)], cwd=tmp_path, check=True)
