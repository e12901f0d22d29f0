"""`last.ckpt` is the last step, whatever ends the run; signals end a run after its step; and EMA."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_models import fit_ar, make_tokenizer
from tiny_training import image_data, tokenizer_module, trainer

from dar_lightning.cli import main
from dar_lightning.metrics.features import FrozenNetwork
from dar_lightning.training.callbacks import EMA, ema
from dar_lightning.training.callbacks.ema import Average
from dar_lightning.training.optim import OptimizerConfig
from dar_lightning.weights.lightning import has_average

OURS = "dar_lightning.training.callbacks.LastStepCheckpoint"


def run(tokens, folder, checkpoint: str = OURS, *options: str, **trainer) -> None:
    words = [
        *fit_ar(*tokens, folder, limit_val_batches=0, **trainer),
        *(f"--trainer.callbacks+={checkpoint}", "--trainer.callbacks.every_n_train_steps=2"),
        *("--trainer.callbacks.save_last=true", "--trainer.callbacks.save_top_k=0", "--ckpt_path=last"),
        *("--trainer.callbacks+=dar_lightning.training.callbacks.EMA", "--trainer.callbacks.decay=0.9"),
    ]
    main([str(word) for word in (*words, *options)])


def saved(folder) -> dict:
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    return torch.load(folder / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize(("end", "step"), [({"max_steps": 4}, 4), ({"max_epochs": 1}, 5)])
def test_the_last_step_is_saved(tokens, tmp_path, end, step):
    run(tokens, tmp_path, **end)
    checkpoint = saved(tmp_path)
    assert checkpoint["global_step"] == step
    raw, average = checkpoint["current_model_state"], checkpoint["state_dict"]
    assert any(not torch.equal(raw[name], average[name]) for name in average), "the optimizer's weights are kept"


def test_a_longer_run_goes_on_from_it(tokens, tmp_path):
    """From Lightning's checkpoint of step 2 too, and from the last step, which is no multiple."""
    run(tokens, tmp_path / "parts", "ModelCheckpoint", max_steps=3)
    for steps in (5, 7):
        run(tokens, tmp_path / "parts", max_steps=steps)
        assert saved(tmp_path / "parts")["global_step"] == steps
    run(tokens, tmp_path / "whole", max_steps=7)
    parts, whole = saved(tmp_path / "parts"), saved(tmp_path / "whole")
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(tensor, whole[key][name]) for name, tensor in parts[key].items())


class SignalIn(Callback):
    """Sends signals to this process in the first batch of the second step."""

    def __init__(self, number: int, times: int = 1) -> None:
        self.number, self.times = number, times

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        while trainer.global_step == 1 and self.times:
            self.times -= 1
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "times", "checkpoint", "code", "says"),
    [
        (signal.SIGTERM, 1, OURS, 143, "stopped after step 2, saved in {}"),
        (signal.SIGINT, 1, OURS, 130, "stopped after step 2, saved in {}"),
        (signal.SIGINT, 2, OURS, 1, None),  # does not wait
        (signal.SIGTERM, 1, "ModelCheckpoint", 143, "stopped after step 2, not saved, the checkpoint before is"),
    ],
)
def test_a_signal_ends_the_run_after_the_step(tokens, tmp_path, capsys, number, times, checkpoint, code, says):
    before, file = signal.getsignal(number), tmp_path / "checkpoints" / "last.ckpt"
    words = [f"--trainer.callbacks+={__name__}.SignalIn", f"--trainer.callbacks.number={int(number)}"]
    words += [f"--trainer.callbacks.times={times}"]
    with pytest.raises(SystemExit) as caught:
        run(tokens, tmp_path, checkpoint, *words, max_steps=6, accumulate_grad_batches=2)
    assert caught.value.code == code
    assert signal.getsignal(number) == before
    error = capsys.readouterr().err
    if says is None:
        assert not file.exists()
    else:
        assert f"{number.name}: {says.format(file)}" in error
    if says and checkpoint == OURS:
        batches = saved(tmp_path)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        assert (saved(tmp_path)["global_step"], batches) == (2, 4), "the other half of the step is done, too"


class Followed(Callback):
    """The average by hand, in float64; and whether validation sees it."""

    def __init__(self, decay: float, start: int):
        self.decay, self.start, self.validated = decay, start, []

    def weights(self, pl_module) -> list[torch.Tensor]:
        return [parameter.detach().double() for parameter in pl_module.parameters()]

    def on_train_start(self, trainer, pl_module):
        if not trainer.global_step:
            self.average = self.weights(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        keep = self.decay if trainer.global_step > self.start else 0.0
        both = zip(self.average, self.weights(pl_module), strict=True)
        self.average = [keep * old + (1 - keep) * now for old, now in both]

    def on_validation_batch_end(self, trainer, pl_module, *args):
        self.validated.append(same(self.weights(pl_module), self.average))


def same(found, expected) -> bool:
    return all(torch.allclose(a.double(), b, rtol=1e-5, atol=1e-6) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("start", [None, 2, 5])
def test_it_is_the_formula_from_the_start_weights_on(images, tmp_path, start):
    """Over 4 steps and 3 more, which go on from a checkpoint; in validation, checkpoints and at the end.

    With a start of 5, the average has not begun in the first checkpoint: it is the weights themselves.
    """
    seen = Followed(0.8, start or 0)
    for steps in (4, 7):
        saving = ModelCheckpoint(tmp_path, f"{steps}", every_n_train_steps=steps)
        options = dict(max_steps=steps, val_check_interval=2, limit_val_batches=1, enable_checkpointing=True)
        fit = trainer(EMA(0.8, update_starting_at_step=start), seen, saving, **options)
        trained = tokenizer_module({"latent_norm": "batch"}, optimizer=OptimizerConfig(lr=1e-2))  # which has buffers
        fit.fit(trained, image_data(images), ckpt_path=tmp_path / "4.ckpt" if steps == 7 else None)
        assert same(trained.parameters(), seen.average), "at the end"
        saved = torch.load(tmp_path / f"{steps}.ckpt", weights_only=True)
        names = [name for name, _ in trained.named_parameters()]
        assert same([saved["state_dict"][name] for name in names], seen.average)
        differ = not torch.equal(saved["state_dict"][names[0]], saved["current_model_state"][names[0]])
        assert differ == has_average(saved) == (steps > seen.start)
    assert seen.validated == 3 * [True]


def test_it_lies_where_the_model_trains_and_reads_nothing_there():
    """On the meta device nothing can be read."""
    model = torch.nn.Linear(3, 3)
    average = Average(model, torch.device("meta"), 0.9)
    assert average.module.weight.is_meta
    model.to("meta")
    average.begin_anew(model)
    for _ in range(3):
        average.update_parameters(model)
    assert int(average.n_averaged) == 3


def test_what_is_frozen_stays_as_it_is():
    """To the bit: 0.9 x + 0.1 x would be rounded, step by step."""
    model = torch.nn.Linear(30, 30)
    model.weight.requires_grad_(False)
    average = Average(model, torch.device("cpu"), 0.9)
    for _ in range(5):
        average.update_parameters(model)
    assert torch.equal(average.module.weight, model.weight)
    assert not torch.equal(average.module.bias, model.bias)


def test_frozen_networks_are_not_copied():
    model = tokenizer_module()
    model.perceptual = FrozenNetwork(torch.nn.Linear(3, 3))
    average = Average(model, torch.device("cpu"), 0.9).module
    assert average.perceptual.network is model.perceptual.network
    assert [name for name, _ in average.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(name.startswith("tokenizer.") for name, _ in average.named_parameters())


@pytest.fixture
def few_recent(monkeypatch):
    """The statistics are those of three batches of four images."""
    monkeypatch.setattr(ema, "RECENT", 10)


def test_the_average_has_statistics_of_its_own(images, few_recent):
    """Of `latent_norm: batch`: means over the latest batches of what the average's encoder gives of them, by hand."""
    averaging, batches, current = EMA(0.8, update_starting_at_step=2), [], []

    class Seen(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            norm = pl_module.tokenizer.encoder.latent_norm
            current[:] = norm.running_mean.double(), norm.running_var.double()
            batches.append(batch["image"].clone())

        def on_validation_epoch_start(self, trainer, pl_module):  # which now has the average's weights
            encoder, flat = make_tokenizer(latent_norm="batch").encoder, []
            encoder.load_state_dict(pl_module.tokenizer.encoder.state_dict())
            encoder.latent_norm.register_forward_pre_hook(lambda norm, inputs: flat.append(inputs[0].double()))
            for batch in batches[-3:]:
                encoder(batch / 127.5 - 1)
            means, variances = ([each.mean(dim=0) for each in flat], [each.var(dim=0) for each in flat])
            expected = [sum(each) / len(flat) for each in (means, variances)]
            norm = pl_module.tokenizer.encoder.latent_norm
            assert same((norm.running_mean, norm.running_var), expected)
            assert not same(current, expected), "the optimizer's weights give other latents"
            checked.append(len(flat))

        on_train_end = on_validation_epoch_start

    checked = []
    trained = tokenizer_module({"latent_norm": "batch"}, optimizer=OptimizerConfig(lr=1e-2))
    fit = trainer(averaging, Seen(), max_steps=6, val_check_interval=2, limit_val_batches=1)
    fit.fit(trained, image_data(images))
    assert checked == [2, 3, 3]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_resumed_run_has_the_statistics_of_an_unbroken_one(tmp_path, images, few_recent, accumulated):
    """One step after the checkpoint two of three batches are of the time before it."""
    ends = []
    for steps, begin in ((4, None), (5, tmp_path / "4.ckpt"), (5, None)):
        saving = ModelCheckpoint(tmp_path, f"{steps}", every_n_train_steps=steps)
        trained = tokenizer_module({"latent_norm": "batch"}, optimizer=OptimizerConfig(lr=1e-2))
        options = dict(max_steps=steps, enable_checkpointing=True, accumulate_grad_batches=accumulated)
        trainer(EMA(0.8), saving, **options).fit(trained, image_data(images), ckpt_path=begin)
        ends.append([buffer.clone() for buffer in trained.tokenizer.encoder.latent_norm.buffers()])
        state = torch.load(saving.best_model_path, weights_only=True)["state_dict"]
        for name, buffer in trained.tokenizer.encoder.latent_norm.named_buffers():
            assert torch.equal(state[f"tokenizer.encoder.latent_norm.{name}"], buffer), "as in the checkpoint"
    assert all(map(torch.equal, ends[1], ends[2]))
    assert not torch.equal(ends[0][0], ends[1][0])


def test_other_statistics_are_the_model_s():
    """Of a norm that nobody has named, such as one of a user's own quantizer."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    average = Average(model, torch.device("cpu"), 0.9)
    model(10 + torch.randn(50, 3))
    average.update_parameters(model)
    average.gather_statistics([])
    assert torch.equal(average.module[0].running_mean, model[0].running_mean)


def test_what_is_not_finite_leaves_no_trace():
    images = torch.rand(2, 4, 3, 16, 16) * 255
    average = Average(tokenizer_module({"latent_norm": "batch"}), torch.device("cpu"), 0.9)
    norm, found = average.module.tokenizer.encoder.latent_norm, []
    for batches in (images, (images[0], images[0] * float("nan"), images[1])):
        average.gather_statistics(batches)
        found.append([buffer.clone() for buffer in norm.buffers()])
    assert all(map(torch.equal, *found))
    assert int(found[0][2]) == 2, "batches"
    average.gather_statistics([images[0] * float("nan")])
    assert all(map(torch.equal, norm.buffers(), found[0])), "nothing to gather"


def test_only_batches_that_end_a_step_are_kept(images, few_recent):
    """A checkpoint after half a step stands at the last one, and the half is read again."""
    averaging, kept = EMA(0.8), []

    class Seen(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            kept.append((trainer.global_step, len(averaging.recent)))

    trained = tokenizer_module({"latent_norm": "batch"})
    trainer(averaging, Seen(), max_steps=2, accumulate_grad_batches=2).fit(trained, image_data(images))
    assert kept == [(0, 0), (1, 1), (1, 1), (2, 2)]


def kept_by_this_rank() -> torch.Tensor:
    averaging = EMA()
    averaging._keep(torch.full((2, 3), float(torch.distributed.get_rank())))
    return averaging.recent[0]


def test_all_ranks_keep_the_images_of_rank_0(pair):
    assert all(torch.equal(kept, torch.zeros(2, 3)) for kept in pair.without_failure(kept_by_this_rank))
