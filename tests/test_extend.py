"""The examples of docs/extend.md, quantizers.md, conditions.md and backbones.md, taken from the pages and run."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dar_lightning import DARPipeline, SequentialDiffusionTokenizer
from dar_lightning.ar import backbones, conditions
from dar_lightning.cli import main
from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.shards import ShardIndex, write_shard
from dar_lightning.errors import UserError
from dar_lightning.sweeps.curves import last_scalars
from dar_lightning.tokenizer import quantizers

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


def commands(heading: str) -> list[list[str]]:
    """What follows `python -m dar_lightning`, of each command."""
    (text,) = blocks(heading, "bash")
    lines = [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]
    assert all(words[:3] == ["python", "-m", "dar_lightning"] for words in lines)
    return [words[3:] for words in lines]


def command(heading: str) -> list[str]:
    """The only one."""
    (words,) = commands(heading)
    return words


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


@pytest.mark.filterwarnings("ignore")
def test_a_quantizer(tmp_path, monkeypatch, capsys):
    """Trained, saved, and loaded where it is trusted; what is not is not imported."""
    heading, name = "A quantizer", "sign_quantizer"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known = dict(quantizers.QUANTIZERS.classes)
    monkeypatch.setattr(quantizers.QUANTIZERS, "classes", dict(known))
    write_files(heading, tmp_path)
    fit, export = commands(heading)
    main([*fit, *QUICK])
    logged = last_scalars(tmp_path / "runs/sign/logs", ("train/", "codebook/"))
    assert {"train/flow", "train/commit", "codebook/perplexity"} <= logged.keys()
    assert logged["train/loss"] == pytest.approx(logged["train/flow"] + logged["train/commit"], rel=1e-5)

    del sys.modules[name]
    monkeypatch.setattr(quantizers.QUANTIZERS, "classes", dict(known))  # another process
    *without, trust, trusted = export
    assert (trust, trusted) == ("--trust", f"{name}.SignQuantizer")
    with pytest.raises(SystemExit):
        main(without)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"'{name}.SignQuantizer', a class that is not registered" in line
    assert name not in sys.modules
    main(export)
    config = json.loads((tmp_path / "runs/sign/weights/config.json").read_text())
    assert (config["quantizer"], config["quantizer_options"]) == (trusted, {"commitment": 0.1})

    monkeypatch.setattr(quantizers.QUANTIZERS, "classes", dict(known))
    with pytest.raises(UserError, match="not registered"):
        SequentialDiffusionTokenizer.from_pretrained(tmp_path / "runs/sign/weights")
    program, found = next(text for text in blocks(heading, "python") if not text.startswith("# ")), {}
    exec(program, found)
    images = torch.rand(2, 3, 64, 64)
    codes = found["tokenizer"].tokenize(images)
    assert codes.shape == (2, 64)
    values = found["tokenizer"].quantizer.lookup(codes)
    torch.testing.assert_close(found["tokenizer"].quantizer(values).values, values)
    with pytest.raises(UserError, match="codebook_size is 100: it must be 2"):
        quantizers.make_quantizer(trusted, 100, 8, {})


@pytest.mark.filterwarnings("ignore")
def test_the_page_of_the_quantizers(tmp_path, monkeypatch):
    page = (ROOT / "docs/quantizers.md").read_text()
    (tmp_path / "fsq.yaml").write_text(re.search(r"```yaml\n# fsq.yaml\n(.*?)```", page, flags=re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    main([*shlex.split(re.search(r"```bash\npython -m dar_lightning (.*)\n```", page)[1]), *QUICK])
    logged = last_scalars(tmp_path / "runs/fsq/logs", ("train/", "codebook/"))
    assert logged["train/loss"] == pytest.approx(logged["train/flow"])
    assert logged["codebook/use"] <= 2 * 64 / 1600


def few_photos(folder: Path) -> None:
    """What the working directory has comes before what is shipped."""
    index = ShardIndex.load(ROOT / "data/fruit64/val")
    reader = ShardReader(index)
    samples = [reader[number][1:] for number in range(12)]
    (folder / "data/fruit64/val").mkdir(parents=True)
    shard = write_shard(folder / "data/fruit64/val/000000.tar", samples)
    ShardIndex(folder / "data/fruit64/val", (shard,), index.classes).save()


@pytest.mark.filterwarnings("ignore")
def test_a_condition(tmp_path, monkeypatch):
    """A model of it is trained, saved and asked; where it is not trusted it is not imported."""
    heading, name = "A condition", "bag_of_words"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known, quantizers_known = dict(conditions.CONDITIONS.classes), dict(quantizers.QUANTIZERS.classes)
    monkeypatch.setattr(conditions.CONDITIONS, "classes", dict(known))
    monkeypatch.setattr(quantizers.QUANTIZERS, "classes", quantizers_known)
    few_photos(tmp_path)
    write_files(heading, tmp_path)
    (text,) = blocks(heading, "python")
    assert len(text.splitlines()) <= 34
    shard, extract, fit, export, sample = commands(heading)
    main(shard)
    main(extract)
    main([*fit, *QUICK])
    monkeypatch.setattr(conditions.CONDITIONS, "classes", dict(known))  # another process
    with pytest.raises(SystemExit):
        main([word for word in export if word != "--trust" and name not in word])
    main(export)
    main([*sample, "--device=cpu", "--per_class=1"])
    assert json.loads((tmp_path / "runs/bag/drawn/samples.json").read_text())["prompt"] == ["granny-smith"]
    config = json.loads((tmp_path / "runs/bag/pipeline/ar/config.json").read_text())
    assert (config["condition"], config["condition_options"]) == (f"{name}.BagOfWords", {"rows": 256})


@pytest.mark.filterwarnings("ignore")
def test_the_page_of_the_conditions(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    page = (ROOT / "docs/conditions.md").read_text()
    (tmp_path / "captions.yaml").write_text(re.search(r"```yaml\n# captions.yaml\n(.*?)```", page, flags=re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    few_photos(tmp_path)
    (text,) = re.findall(r"```bash\n(python .*?)```", page, flags=re.DOTALL)
    for words in map(shlex.split, text.replace("\\\n", " ").splitlines()):
        verb = words[3]
        main([*words[3:], *{"fit": QUICK, "sample": ["--device=cpu", "--per_class=1"]}.get(verb, [])])
    assert (tmp_path / "runs/captioned/drawn/samples.png").is_file()
    (program,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    found = {}
    exec(program, found)
    assert found["images"].shape == (2, 3, 64, 64)


@pytest.mark.filterwarnings("ignore")
def test_a_backbone(tmp_path, monkeypatch):
    """A model of it is trained, saved and drawn; its cache is teacher forcing."""
    heading, name = "A backbone", "recurrent.Recurrent"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for table in (conditions.CONDITIONS, quantizers.QUANTIZERS, backbones.BACKBONES):
        monkeypatch.setattr(table, "classes", dict(table.classes))
    known = dict(backbones.BACKBONES.classes)
    few_photos(tmp_path)
    write_files(heading, tmp_path)
    assert len(blocks(heading, "python")[0].splitlines()) <= 30
    extract, fit, export, sample = commands(heading)
    main(extract)
    main([*fit, *QUICK])
    monkeypatch.setattr(backbones.BACKBONES, "classes", known)  # another process
    with pytest.raises(SystemExit):
        main([word for word in export if word not in ("--trust", name)])
    main(export)
    main([*sample, "--device=cpu", "--per_class=1", "--guidance=2"])
    ar = DARPipeline.from_pretrained(tmp_path / "runs/recurrent/pipeline").ar
    assert (ar.config.backbone, ar.config.backbone_options) == (name, {"layers": 1})
    torch.nn.init.normal_(ar.head.weight)
    labels, codes = torch.tensor([3, 14]), torch.randint(1024, (2, 64))
    whole = ar(labels, codes)
    logits, cache = ar.start(labels, codes[:, :5])
    torch.testing.assert_close(logits, whole[:, 5])
    cache.keep(1)
    torch.testing.assert_close(ar.step(codes[:1, 5], cache), whole[:1, 6])


@pytest.mark.filterwarnings("ignore")
def test_the_page_of_the_backbones(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    page = (ROOT / "docs/backbones.md").read_text()
    (tmp_path / "qwen3.yaml").write_text(re.search(r"```yaml\n# qwen3.yaml\n(.*?)```", page, flags=re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    few_photos(tmp_path)
    (text,) = re.findall(r"```bash\n(python .*?)```", page, flags=re.DOTALL)
    for words in map(shlex.split, text.replace("\\\n", " ").splitlines()):
        main([*words[3:], *{"fit": QUICK, "sample": ["--device=cpu", "--per_class=1"]}.get(words[3], [])])
    ar = DARPipeline.from_pretrained(tmp_path / "runs/qwen3/pipeline").ar
    assert ar.backbone.trunk.layers[0].self_attn.q_proj.weight.shape == (5 * 64, 160)
    assert (tmp_path / "runs/qwen3/drawn/samples.png").is_file()


def test_an_order(tmp_path):
    """In a copy of the package, which the page's change is applied to."""
    ignored = shutil.ignore_patterns("shipped", "__pycache__")
    shutil.copytree(ROOT / "dar_lightning", tmp_path / "dar_lightning", ignore=ignored)
    (patch,) = blocks("An order of tokens", "diff")
    subprocess.run(["git", "apply", "-"], input=patch, cwd=tmp_path, text=True, check=True)
    (program,) = blocks("An order of tokens", "python")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
