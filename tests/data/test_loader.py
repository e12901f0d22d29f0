"""The order of the data, alone and under a Trainer that is stopped and resumed."""

import json
import os
import shutil
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import instantiate_class
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny_shards import sample
from torch.utils.data import Dataset

from dar_lightning.data import workers
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.loader import Loader
from dar_lightning.data.sampler import EvalSampler, TrainSampler, shuffled
from dar_lightning.data.shards import write_shard
from dar_lightning.errors import UserError
from dar_lightning.files import file_sha256


def make(shards: Path, **options) -> ImageNetDataModule:
    return ImageNetDataModule(str(shards), str(shards), **{"image_size": 16, "batch_size": 4, "seed": 3} | options)


class Recorder(L.LightningModule):
    """Trains nothing; writes down what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[list[str], int]] = []
        self.validated: list[str] = []

    def training_step(self, batch, batch_idx):
        pixels = batch["image"].long()  # (B, 3, S, S)
        checksum = (pixels * torch.arange(pixels.numel()).view_as(pixels)).sum().item()
        self.seen.append((batch["key"], checksum))
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        self.validated += [key for key, valid in zip(batch["key"], batch["valid"], strict=True) if valid]

    def predict_step(self, batch, batch_idx):
        return batch["key"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(shards: Path, root: Path, ckpt_path: str | None = None, workers: int = 0, callbacks=(), **options):
    model = Recorder()
    trainer = L.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(model, datamodule=make(shards, num_workers=workers), ckpt_path=ckpt_path)
    return model, trainer


def test_shuffled_is_a_local_permutation():
    sizes = [5, 3, 8, 4]
    orders = [shuffled(sizes, seed=0, epoch=epoch, window=2) for epoch in range(5)]
    for order in orders:
        assert sorted(order) == list(range(20))
        shard_of = [next(i for i, end in enumerate((5, 8, 16, 20)) if index < end) for index in order]
        one, two = list(dict.fromkeys(shard_of))[:2]
        cut = sizes[one] + sizes[two]  # the first window ends here
        assert set(shard_of[:cut]).isdisjoint(shard_of[cut:])
        assert shard_of[:cut] != sorted(shard_of[:cut], key=[one, two].index)  # and is mixed
    assert len({tuple(order) for order in orders}) == 5
    assert (shuffled(sizes, 0, 1, 2) == orders[1]).all()
    assert (shuffled(sizes, 1, 1, 2) != orders[1]).any()


def test_global_batches_do_not_depend_on_ranks():
    dataset = range(26)

    def order(epoch):
        return shuffled([10, 9, 7], 0, epoch, 2)

    def batches(batch_size, world):
        ranks = [list(TrainSampler(dataset, order, batch_size, world, rank)) for rank in range(world)]
        assert len({len(tickets) for tickets in ranks}) == 1
        return [
            [ticket for tickets in ranks for ticket in tickets[start : start + batch_size]]
            for start in range(0, len(ranks[0]), batch_size)
        ]

    assert batches(8, 1) == batches(4, 2) == batches(2, 4)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_validation_has_every_sample_once_on_any_number_of_ranks(world):
    ranks = [list(EvalSampler(range(26), world, rank)) for rank in range(world)]
    assert len({len(tickets) for tickets in ranks}) == 1
    assert sorted(t.index for tickets in ranks for t in tickets if t.valid) == list(range(26))


def test_workers_change_nothing(shards):
    loaders = [make(shards, num_workers=workers).train_dataloader() for workers in (0, 2)]
    for _ in range(2):  # epochs
        for one, other in zip(*loaders, strict=True):
            assert one["key"] == other["key"]
            assert torch.equal(one["image"], other["image"])


def test_epochs_differ_and_have_no_repeats(shards):
    loader = make(shards, batch_size=2).train_dataloader()
    epochs = [
        [(key, image) for batch in loader for key, image in zip(batch["key"], batch["image"], strict=True)]
        for _ in (0, 1)
    ]
    for epoch in epochs:
        assert max(Counter(key for key, _ in epoch).values()) == 1
        assert len(epoch) == 26
    assert [key for key, _ in epochs[0]] != [key for key, _ in epochs[1]]
    pixels = [dict(epoch) for epoch in epochs]
    assert sum(torch.equal(pixels[0][key], pixels[1][key]) for key in pixels[0]) < 5  # other crops


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 4, 6, 8, 12], ids=lambda step: f"step{step}")
def test_resume_from_a_step_checkpoint(shards, tmp_path, workers, stop):
    """26 samples in batches of 4: epochs of 6 steps, so steps 6 and 12 are at their edge."""
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1)
    whole, _ = fit(shards, tmp_path, workers=workers, callbacks=[checkpoint], max_steps=15)
    assert len(whole.seen) == 15
    resumed, _ = fit(shards, tmp_path, str(tmp_path / f"step={stop}.ckpt"), 2 - workers, max_steps=15)
    assert resumed.seen == whole.seen[stop:]


@pytest.mark.parametrize("options", [{"max_epochs": 3}, {"max_epochs": 3, "limit_train_batches": 4}], ids=str)
def test_resume_from_an_epoch_checkpoint(shards, tmp_path, options):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, _ = fit(shards, tmp_path, callbacks=[checkpoint], **options)
    for epoch in (0, 1):
        resumed, _ = fit(shards, tmp_path, str(tmp_path / f"epoch={epoch}.ckpt"), **options)
        assert resumed.seen == whole.seen[len(whole.seen) // 3 * (epoch + 1) :]


def test_resume_after_validation_in_mid_epoch(shards, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)  # saves when validation ends
    options = {"max_steps": 14, "val_check_interval": 3}
    whole, _ = fit(shards, tmp_path, callbacks=[checkpoint], **options)
    for stop in (3, 6, 9, 12):
        resumed, _ = fit(shards, tmp_path, str(tmp_path / f"step={stop}.ckpt"), **options)
        assert resumed.seen == whole.seen[stop:]


@pytest.mark.parametrize("stop", [3, 6, 8])
def test_longer_run_after_the_end(shards, tmp_path, stop):
    """`max_steps` was reached, and the same run is asked for more."""
    whole, _ = fit(shards, tmp_path, max_steps=14)
    first, trainer = fit(shards, tmp_path, max_steps=stop)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    second, _ = fit(shards, tmp_path, str(tmp_path / "end.ckpt"), max_steps=14)
    assert first.seen + second.seen == whole.seen


def test_resume_from_the_middle_of_a_step(shards, tmp_path):
    """A step that failed after its batch was fetched is done again."""

    class Failing(Recorder):
        def training_step(self, batch, batch_idx):
            if len(self.seen) == 8:
                raise RuntimeError("preempted")
            return super().training_step(batch, batch_idx)

    class SaveOnException(L.Callback):
        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "exception.ckpt")

    whole, _ = fit(shards, tmp_path, max_steps=15)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[SaveOnException()],
        max_steps=15,
        num_sanity_val_steps=0,
    )
    with pytest.raises(RuntimeError, match="preempted"):
        trainer.fit(Failing(), datamodule=make(shards))
    resumed, _ = fit(shards, tmp_path, str(tmp_path / "exception.ckpt"), max_steps=15)
    assert resumed.seen == whole.seen[8:]


def test_resume_of_a_strategy_that_restores_late(shards, tmp_path):
    """FSDP reads the checkpoint when the loaders, whose length the learning rate's schedule needs, are there."""

    class Late(SingleDeviceStrategy):
        restore_checkpoint_after_setup = True

    class Scheduled(Recorder):
        def configure_optimizers(self):
            assert self.trainer.estimated_stepping_batches == 15
            return super().configure_optimizers()

    whole, _ = fit(shards, tmp_path, max_steps=15)
    _, trainer = fit(shards, tmp_path, max_steps=8)
    trainer.save_checkpoint(tmp_path / "8.ckpt")
    resumed = Scheduled()
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=Late(torch.device("cpu")),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        max_steps=15,
        max_epochs=9,
        num_sanity_val_steps=0,
    )
    trainer.fit(resumed, datamodule=make(shards), ckpt_path=tmp_path / "8.ckpt")
    assert resumed.seen == whole.seen[8:]


def test_the_shipped_configs_build_their_datamodules(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    files = sorted((root / "experiments" / "data").glob("*.yaml"))
    assert len(files) == 4
    for file in files:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(L.LightningDataModule, "data")
        config = parser.parse_object(yaml.safe_load(file.read_text()))
        module = instantiate_class((), config.as_dict()["data"])
        if file.stem == "fruit64":
            module.setup("fit")
            assert len(module.classes) == module.num_classes == 14
            assert next(iter(module.train_dataloader()))["image"].shape == (16, 3, 64, 64)


def test_resume_refuses_another_global_batch(shards, tmp_path):
    _, trainer = fit(shards, tmp_path, max_steps=2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loader = make(shards, batch_size=5)
    loader.load_state_dict(trainer.datamodule.state_dict())
    with pytest.raises(UserError, match="batch size x devices was 4 in the checkpoint and is 5 now"):
        loader.train_dataloader()


def test_resume_refuses_another_seed(shards, tmp_path):
    _, trainer = fit(shards, tmp_path, max_steps=2)
    with pytest.raises(UserError, match=r"data\.seed was 3 in the checkpoint and is 4 now"):
        make(shards, seed=4).load_state_dict(trainer.datamodule.state_dict())


@pytest.mark.parametrize("option", [{"crop": "ten_crop"}, {"flip": False}, {"image_size": 8}], ids=str)
def test_resume_refuses_other_views(shards, option):
    ((name, value),) = option.items()
    state = make(shards).state_dict()
    with pytest.raises(UserError, match=rf"cannot resume: data\.{name} was .* in the checkpoint and is {value} now"):
        make(shards, **option).load_state_dict(state)
    make(shards, **option).load_state_dict({"stream": None, "seed": 3})  # of an earlier version
    make(shards).load_state_dict(state)


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ({"num_workers": -1}, "num_workers: -1 is negative"),
        ({"image_size": 0}, r"data\.image_size: 0 is not a number of pixels"),
        ({"image_size": -4}, r"data\.image_size: -4 is not"),
        ({"num_classes": 0}, r"data\.num_classes: 0 is not a number of classes"),
        ({"crop": "foo"}, r"data\.crop: 'foo' is none of adm, ten_crop, center"),
        ({"classes": [True]}, r"data\.classes: True is no class"),
    ],
    ids=str,
)
def test_options_that_cannot_be(shards, option, line):
    with pytest.raises(UserError, match=line):
        make(shards, **option).val_dataloader()


class Dying(Dataset):
    def __init__(self, end):
        self.end = end

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        self.end()
        return index


@pytest.mark.parametrize(("end", "memory"), [(partial(os._exit, 3), False), (partial(signal.raise_signal, 9), True)])
def test_memory_is_named_only_where_the_system_has_killed_a_worker(end, memory):
    with pytest.raises(UserError, match=r"^num_workers: DataLoader worker .*") as error:
        list(Loader(Dying(end), **workers.options(num_workers=1)))
    assert ("enough memory" in str(error.value)) == memory


def test_validation_may_have_another_seed(shards, tmp_path):
    _, trainer = fit(shards, tmp_path, max_steps=2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    quiet = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    L.Trainer(**quiet).validate(Recorder(), make(shards, seed=4), ckpt_path=str(tmp_path / "end.ckpt"))


def test_resume_refuses_other_data(shards, tmp_path):
    """As many samples, in another order or with other labels."""
    _, trainer = fit(shards, tmp_path, max_steps=2)
    state = trainer.datamodule.state_dict()
    for folder, start in (("same", 0), ("other", 1)):
        numbers = [(number + start) % 26 for number in range(26)]
        parts = [numbers[:10], numbers[10:19], numbers[19:]]
        for i, part in enumerate(parts):
            write_shard(tmp_path / folder / f"{i:06d}.tar", [sample(number) for number in part])
        shutil.copy(shards / "index.json", tmp_path / folder)
    index = json.loads((shards / "index.json").read_text())
    for shard in index["shards"]:
        shard["sha256"] = file_sha256(tmp_path / "other" / shard["name"])
    (tmp_path / "other" / "index.json").write_text(json.dumps(index))
    moved = make(tmp_path / "same")
    moved.load_state_dict(state)
    moved.train_dataloader()
    for other in (make(tmp_path / "other"), make(shards, classes=["b", "a", "c", "d"])):
        other.load_state_dict(state)
        with pytest.raises(UserError, match="cannot resume: hash of the training data"):
            other.train_dataloader()


def test_loaders_made_anew_go_on(shards, tmp_path):
    whole, _ = fit(shards, tmp_path, max_epochs=3)
    anew, _ = fit(shards, tmp_path, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert anew.seen == whole.seen
    data = make(shards)
    for _ in range(2):  # the second training is one of its own
        model = Recorder()
        trainer = L.Trainer(max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False)
        trainer.fit(model, datamodule=data)
        assert model.seen == whole.seen[:4]


def test_training_and_validation_must_have_the_same_classes(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "val")
    index = json.loads((shards / "index.json").read_text())
    for classes, line in (
        ("abdc", "its class 2 is d, in data.train that is c"),
        ("abc", "its class 3 is missing, in data.train that is d"),
    ):
        (tmp_path / "val" / "index.json").write_text(json.dumps(index | {"classes": list(classes)}))
        with pytest.raises(UserError, match=f"data.val: {line}"):
            ImageNetDataModule(str(shards), str(tmp_path / "val")).setup("fit")


@pytest.mark.parametrize("workers", [0, 2])
def test_classes_are_chosen_and_renumbered(shards, workers):
    """Sample n is of class n mod 4 of a, b, c, d."""
    for chosen, numbers in ((["d", "b"], (3, 1)), ([2], (2,)), ([1, "a", 3], (1, 0, 3))):
        module = make(shards, num_workers=workers, batch_size=3, classes=chosen)
        assert module.num_classes == len(chosen)
        assert module.classes == tuple("abcd"[number] for number in numbers)
        kept = [number for number in range(26) if number % 4 in numbers]
        items = [
            (key, shard, index, numbers[label])
            for batch in module.val_dataloader()
            for key, shard, index, label in zip(
                batch["key"], batch["shard"], batch["index"].tolist(), batch["label"].tolist(), strict=True
            )
        ]
        shard_of = ["000000.tar"] * 10 + ["000001.tar"] * 9 + ["000002.tar"] * 7
        assert items == [(f"photo-{number:03d}", shard_of[number], number, number % 4) for number in kept]
        epoch = [
            (number, numbers[label])
            for batch in module.train_dataloader()
            for number, label in zip(batch["index"].tolist(), batch["label"].tolist(), strict=True)
        ]
        assert len(set(epoch)) == len(epoch) == len(kept) // 3 * 3
        assert set(epoch) <= {(number, number % 4) for number in kept}


def test_classes_that_cannot_be_chosen(shards, tmp_path):
    for chosen, message in (
        (["a", "e"], r"data\.classes: 'e' is no class, they are 0 to 3 \(a, b, c, d\)"),
        ([4], r"data\.classes: 4 is no class, they are 0 to 3"),
        ([-1], r"data\.classes: -1 is no class"),
        ([], r"data\.classes: \[\] is empty"),
        (["a", "a"], "names a class twice"),
        (["a", 0], "names a class twice"),
    ):
        with pytest.raises(UserError, match=message):
            make(shards, classes=chosen).index("val")
    write_shard(tmp_path / "0.tar", [sample(number) for number in (0, 1, 4)])
    assert make(tmp_path, classes=[0], batch_size=2).val_dataloader().dataset.numbers.tolist() == [0, 2]
    with pytest.raises(UserError, match=r"data\.classes: .* has no sample of \[2\]"):
        make(tmp_path, classes=[2]).train_dataloader()


def test_samples_without_a_class_are_named_before_a_subset_is_chosen(shards, tmp_path):
    members = sample(1)[1]
    write_shard(tmp_path / "0.tar", [sample(0), ("x", {"png": members["png"], "cls": b"abc"}), sample(5)])
    module = make(tmp_path, classes=[1, 0], max_bad_share=0.4, batch_size=1)
    labels = [int(batch["label"]) for batch in module.val_dataloader()]
    assert labels == [1, 0]
    assert module.skipped["val"] == {"0.tar/x": "its label is 'abc', the classes are 0, 1, ..."}
    with pytest.raises(UserError, match=r"data\.val: 1 of 3 samples cannot be used"):
        make(tmp_path, classes=[1, 0]).val_dataloader()


def test_options_of_a_config():
    """Class names and numbers, as YAML has them."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageNetDataModule, "data")
    config = parser.parse_args(["--data.classes=[3, Orange, 0]", "--data.cache_dir=x", "--data.max_bad_share=0.5"])
    assert config.data.classes == [3, "Orange", 0]


def test_overfit_repeats_the_same_batches(shards, tmp_path):
    model, _ = fit(shards, tmp_path, overfit_batches=2, max_epochs=3)
    assert model.seen[:2] == model.seen[2:4] == model.seen[4:]


def test_validation_under_the_trainer(shards, tmp_path):
    model, _ = fit(shards, tmp_path, max_epochs=1)
    assert sorted(model.validated) == [f"photo-{number:03d}" for number in range(26)]


@pytest.mark.parametrize("workers", [0, 1])
def test_predict_has_every_sample_in_order(shards, workers):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    batches = trainer.predict(Recorder(), datamodule=make(shards, num_workers=workers))
    assert [key for keys in batches for key in keys] == [f"photo-{number:03d}" for number in range(26)]


def test_training_without_validation_shards(shards, tmp_path):
    module = ImageNetDataModule(str(shards), image_size=16, batch_size=13)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, **quiet)
    model = Recorder()
    trainer.fit(model, datamodule=module)
    assert len(model.seen) == 2
