"""Mistakes that people make when they start a run: one line that says what is wrong, whoever noticed it."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningDataModule
from lightning.pytorch import Callback
from refusals import refusal, refused
from tiny_models import SIZE, fit_ar, fit_tokenizer, write_images, write_tokens
from torch.utils.data import DataLoader

from dar_lightning.cli import main
from dar_lightning.errors import UserError, begin_work, check_range, phase
from dar_lightning.files import load_class, locked
from dar_lightning.metrics.images import NpzImages, open_images
from dar_lightning.tokenizer.quantizers import import_quantizer

CALLBACKS, MODEL = "dar_lightning.training.callbacks", "model.init_args"
IMAGES, TOKENS = "dar_lightning.data.imagenet.ImageNetDataModule", "dar_lightning.data.codes.CodesDataModule"
ZEROS = ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval")
EARLY = "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/nothing --trainer.check_val_every_n_epoch=1"


class Own(LightningDataModule):
    """A DataModule of somebody's own, with batches of a kind that the model does not know."""

    def __init__(self, kind: str = "tuple"):
        super().__init__()
        self.kind = kind

    def train_dataloader(self) -> DataLoader:
        images, labels = torch.zeros(8, 3, SIZE, SIZE, dtype=torch.uint8), torch.zeros(8, dtype=torch.long)
        pairs = zip(images, labels, strict=True)
        rows = [pair if self.kind == "tuple" else {"image": pair[0]} for pair in pairs]
        return DataLoader(rows, batch_size=4)

    val_dataloader = train_dataloader


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("data")
    torch.save({"state_dict": {"x": torch.zeros(2)}}, root / "weights.ckpt")
    (root / "latin.yaml").write_bytes("trainer:\n  max_steps: 1 # für\n".encode("latin-1"))
    (root / "utf16.yaml").write_bytes("trainer:\n  max_steps: 1\n".encode("utf-16"))
    return {"ar": write_tokens(root / "t", 8), "tokenizer": write_images(root / "i", 8), "root": str(root)}


def words(kind: str, data: dict[str, str], folder: Path, more: str = "") -> list[str]:
    function = fit_ar if kind == "ar" else fit_tokenizer
    base = function(data[kind], data[kind], folder, max_steps=4, limit_val_batches=1)
    return [str(word) for word in (*base, *more.format_map(data | {"model": MODEL}).split())]


@pytest.mark.parametrize(
    ("kind", "more", "line"),
    [
        ("ar", "--trainer.logger=lightning.pytorch.loggers.NeptuneLogger", "eptune"),
        *(("tokenizer", f"--data.init_args.{name}=null", name) for name in ("batch_size", "num_workers", "seed")),
        *(("tokenizer", f"--data.init_args.{name}=null", name) for name in ("image_size", "max_bad_share")),
        ("ar", "--{model}.config=null", "must be a mapping, not NoneType"),
        ("ar", "--{model}.optimizer=null", "must be a mapping, not NoneType"),
        ("ar", "--trainer.devices=-1 --trainer.accelerator=gpu", "trainer: No supported gpu backend"),
        ("ar", "--trainer.devices=0, --trainer.accelerator=cpu", "`devices` selected with `CPUAccelerator` should be"),
        ("ar", EARLY, r"metric `val/nothing` which is not available.*`train/loss`"),
        ("ar", "--trainer.val_check_interval=100", "`val_check_interval` .100. must be less than"),
        *(("ar", f"--trainer.{name}=0", f"trainer.{name} is 0") for name in ZEROS),
        ("ar", "--seed_everything=-1", "-1 is not in bounds"),
        ("ar", "--data.init_args.seed=-1", "data.seed is -1: must be at least 0"),
        ("ar", "--{model}.optimizer.betas=[0.9,1.5]", "Invalid beta parameter at index 1: 1.5; in ARModule"),
        *((kind, "--{model}.compile=true", "C.. compiler, and there is no no-such-c.") for kind in ("ar", "tokenizer")),
        ("ar", "--trainer.devices=[0] --trainer.accelerator=gpu", "trainer: No supported gpu backend"),
        ("ar", "--trainer.accelerator=tpu", "trainer: Requirement 'torch_xla"),
        ("ar", "--trainer.precision=transformer-engine", "trainer: Requirement 'transformer_engine"),
        ("ar", "--ckpt_path=best", "`ModelCheckpoint` is not configured to save the best"),
        ("ar", "--ckpt_path=hpc", "no HPC checkpoint was found"),
        ("ar", "--ckpt_path={root}/weights.ckpt", "weights.ckpt is no checkpoint of a tokenizer or AR training run"),
        ("ar", f"--data={IMAGES} --data.init_args.train={{tokenizer}}", "holds token shards, images are needed"),
        ("tokenizer", f"--data={TOKENS} --data.init_args.train={{ar}}", "is another kind of index"),
        ("ar", f"--trainer.callbacks+={CALLBACKS}.CodebookMonitor", "CodebookMonitor: ARModule has no tokenizer"),
        ("ar", f"--trainer.callbacks+={CALLBACKS}.Reconstructions", "Reconstructions: ARModule has no tokenizer"),
        ("tokenizer", f"--trainer.callbacks+={CALLBACKS}.PositionLoss", "PositionLoss: TokenizerModule has no ar"),
        ("ar", "--config={root}/latin.yaml", "latin.yaml: not a text in UTF-8: .* byte 0xfc in position 27"),
        ("ar", "--config={root}/utf16.yaml", "utf16.yaml: not a text in UTF-8"),
        ("ar", "--trainer.callbacks+=LearningRateFinder", "LearningRateFinder trains a run again"),
        ("ar", "--trainer.callbacks+=BatchSizeFinder", "BatchSizeFinder trains a run again"),
        ("ar", "--trainer.callbacks+=pytorch_lightning.callbacks.EarlyStopping", "write lightning.pytorch"),
        ("ar", "--trainer.strategy=ddp_spawn --trainer.devices=2", "trainer.strategy: .*use ddp"),
        ("tokenizer", f"--data={__name__}.Own", "not str; in TokenizerModule"),
        ("tokenizer", f"--data={__name__}.Own --data.init_args.kind=dict --trainer.num_sanity_val_steps=1", "KeyError"),
        ("ar", "--trainer.max_time=soon", "not a valid duration"),
        ("ar", "--trainer.callbacks+=Timer --trainer.callbacks.interval=hour", "interval"),
    ],
    ids=lambda value: value.split(".")[-1],
)
def test_a_run_that_cannot_be(kind, more, line, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-c++")
    found = refusal(capsys, words(kind, data, tmp_path / "run", more))
    assert re.search(line, found), found
    if more != EARLY:  # which is found after the first epoch
        assert not list(tmp_path.iterdir())


def compare(files: str, fails: str = "before") -> None:
    """In the place of `dar compare`: a bug, before or after its work has begun."""
    if fails == "after":
        begin_work()
    raise KeyError("files")


@pytest.mark.parametrize("shown", ["", "option", "environment", "environment 0"])
def test_all_that_lies_behind_a_line(shown, monkeypatch, capsys):
    monkeypatch.setattr("dar_lightning.commands.compare.compare", compare)
    if shown.startswith("environment"):
        monkeypatch.setenv("DAR_TRACEBACK", shown.partition(" ")[2] or "1")
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "--files=x", *(["--traceback"] if shown == "option" else [])])
    found = capsys.readouterr().err.splitlines()
    assert found[-1] == "dar compare: KeyError 'files' (KeyError; --traceback shows where)"
    assert ("in compare" in "".join(found)) == (len(found) > 1) == (shown in ("option", "environment"))


def test_what_is_raised_once_the_work_has_begun_stays_as_it_is(monkeypatch):
    monkeypatch.setattr("dar_lightning.commands.compare.compare", compare)
    with pytest.raises(KeyError, match="files"):
        main(["compare", "--files=x", "--fails=after"])
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "--files=x"])  # the next command begins anew


class Breaks(Callback):
    """A bug in the third step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("broken")


def test_a_fault_within_training_names_the_last_checkpoint(data, tmp_path):
    saves = "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.every_n_train_steps=2"
    more = f"--trainer.callbacks+={__name__}.Breaks"
    with pytest.raises(RuntimeError, match="broken") as caught:
        main(words("ar", data, tmp_path / "run", f"{more} {saves}"))
    (file,) = (tmp_path / "run").rglob("*.ckpt")
    assert caught.value.__notes__ == [f"last checkpoint: {file}, of step 2"]
    with pytest.raises(RuntimeError, match="broken") as caught:
        main(words("ar", data, tmp_path / "other", f"{more} --trainer.enable_checkpointing=false"))
    assert caught.value.__notes__ == ["last checkpoint: this run has written none"]


def test_a_refused_run_leaves_that_of_before_alone(data, tmp_path, capsys):
    main(words("ar", data, tmp_path / "run"))
    config = next((tmp_path / "run").rglob("config.yaml"))
    before = config.read_bytes()
    line = refusal(capsys, words("ar", data, tmp_path / "run", "--trainer.val_check_interval=100"))
    assert "`val_check_interval` (100) must be less than" in line
    assert config.read_bytes() == before


def test_a_folder_that_was_there_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(phase, "working", False)
    (tmp_path / "mine").mkdir()

    def fails(folder: Path) -> None:
        with locked(folder, "output"):
            raise UserError("x")

    for folder in (tmp_path / "mine", tmp_path / "new" / "run"):
        refused("x", fails, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    monkeypatch.setattr(phase, "working", True)
    refused("x", fails, tmp_path / "new")
    assert (tmp_path / "new").exists()


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1, float("-inf")])
def test_no_option_may_be_infinite(value):
    refused(f"^x is {value}: must be at least 0$", check_range, 0, x=value)


@pytest.mark.parametrize("text", ["def broken(:", "1 / 0", "import nowhere", "raise RuntimeError('x')"])
def test_a_class_in_a_file_that_cannot_be_imported(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_broken_file", raising=False)
    Path("own_broken_file.py").write_text(text)
    refused(r"^--features x: not a class: ", load_class, "own_broken_file.Net", "--features x", "a class")
    refused(
        r"^quantizer own_broken_file.Net: not a class that can be imported: ", import_quantizer, "own_broken_file.Net"
    )


def test_an_empty_output(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "output is empty" in refusal(capsys, ["sample", "--pipeline=x", "--output="])
    assert not list(tmp_path.iterdir())


def test_files_of_images_that_are_nearly_right(tmp_path):
    images, labels = np.zeros((2, 4, 4, 3), np.uint8), np.array([1, 0])
    np.savez(tmp_path / "adm.npz", images, labels)
    assert NpzImages(tmp_path / "adm.npz", "--samples").labels.tolist() == [1, 0]
    np.savez(tmp_path / "fortran.npz", arr_0=np.asfortranarray(images))
    np.save(tmp_path / "x.npy", images)
    refused("in Fortran order: store np.asc", open_images, str(tmp_path / "fortran.npz"), "--samples", None)
    refused("of another kind", open_images, str(tmp_path / "x.npy"), "--samples", None)


def test_predictions_by_a_recipe_for_training(data, tmp_path, capsys):
    line = refusal(capsys, ["predict", *words("ar", data, tmp_path / "run")[1:]])
    assert "`Trainer.predict` requires `forward`" in line
    assert not list(tmp_path.iterdir())


def test_a_repository_behind_a_socks_proxy(tmp_path, monkeypatch, capsys):
    def download(*_, **options) -> None:
        raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.")

    monkeypatch.setattr("dar_lightning.formats.pretrained.snapshot_download", download)
    line = refusal(capsys, ["sample", "--pipeline=someone/x", f"--output={tmp_path / 'o'}", "--device=cpu"])
    assert "someone/x is not a folder, nor a repository in reach: Using SOCKS proxy, but the 'socksio'" in line
    assert not list(tmp_path.iterdir())
