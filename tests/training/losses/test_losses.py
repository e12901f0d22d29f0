"""LPIPS and REPA: against the networks called by hand, trained through, and kept out of copies and checkpoints."""

import copy
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from refusals import refused
from tiny_models import SIZE
from tiny_training import image_data, tokenizer_module, trainer
from torchmetrics.functional.image.lpips import _LPIPS

from dar_lightning.training.callbacks import EMA
from dar_lightning.training.losses import PerceptualLoss, RepaLoss

TEACHER = "vit_base_patch16_224"  # width 768, quick to make


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(1)
    vit = timm.create_model(TEACHER, pretrained=False, num_classes=0).eval()
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save(vit.state_dict(), path)
    return vit, path


@pytest.fixture(scope="module")
def repa(teacher) -> RepaLoss:
    return RepaLoss(model=TEACHER, weights_path=str(teacher[1]))


def like(loss, **changes):
    """The loss with other options and the same network."""
    changed = copy.copy(loss)
    vars(changed).update(changes)
    return changed


def test_perceptual_is_lpips_on_the_given_vgg(vgg_file, perceptual):
    by_hand = _LPIPS(net="vgg", pnet_rand=True)
    tensors = torch.load(vgg_file, weights_only=True)
    for name, parameter in by_hand.net.named_parameters():
        parameter.data.copy_(tensors["features." + name.split(".", 1)[1]])
    a, b, t = torch.rand(2, 3, 32, 32) * 4 - 2, torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2)
    torch.testing.assert_close(perceptual(a, b, t), by_hand(a, b).mean())
    assert perceptual(b, b, t) == 0

    # In training too: nothing is dropped, and the estimate is not clipped.
    module = tokenizer_module(perceptual=perceptual).train()
    module._trainer = SimpleNamespace(global_step=0)
    zero = torch.zeros(())
    total, parts = module.total_loss({"flow": zero, "quantizer": (), "x1_hat": a, "t": t}, b)
    torch.testing.assert_close(parts["perceptual"], by_hand(a, b).mean())
    torch.testing.assert_close(total, 0.5 * by_hand(a, b).mean())
    assert abs(by_hand(a.clamp(-1, 1), b).mean() - parts["perceptual"]) > 0.01 * parts["perceptual"]


def test_perceptual_weighs_times_and_sees_a_part(perceptual):
    """With stride 2, one of the two halves, each as often: on average the whole."""
    part = like(perceptual, t_power=2, stride=2)
    a, b = torch.rand(2, 4, 3, 32, 32) * 2 - 1
    t = torch.tensor([0.0, 0.3, 0.5, 1.0])
    each = torch.stack([perceptual(a[i : i + 1], b[i : i + 1], t[i : i + 1]) for i in range(4)])
    halves = {round(float((each * t**2)[i::2].mean()), 4) for i in range(2)}
    assert {round(float(part(a, b, t)), 4) for _ in range(20)} == halves
    assert part(a[:1], b[:1], t[3:]) == each[0], "a batch smaller than the stride is seen"


def test_repa_compares_with_the_teachers_patches(teacher, repa):
    images, t = torch.rand(1, 3, 224, 224) * 2 - 1, torch.tensor([0.5])
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    with torch.no_grad():
        seen = torchvision.transforms.functional.normalize((images + 1) / 2, mean, std)
        patches = teacher[0].forward_features(seen)[:, 1:]
    torch.testing.assert_close(repa.features(images), patches, atol=1e-4, rtol=1e-4)
    assert repa.grid == (14, 14)
    assert repa(patches, images, t).abs() < 1e-5
    projected = torch.randn_like(patches)
    cosine = (F.normalize(patches, dim=-1) * F.normalize(projected, dim=-1)).sum(-1)
    torch.testing.assert_close(repa(projected, images, t), 1 - cosine.mean(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(like(repa, t_power=2)(projected, images, t), 0.25 * repa(projected, images, t))


@pytest.mark.parametrize("options", [{"stride": 0}, {"t_power": -1}, {"start_step": -1}, {"weight": -0.5}], ids=str)
def test_options_out_of_range(options):
    refused(f"^{next(iter(options))} is ", PerceptualLoss, weights_path="never read", **options)


def test_what_does_not_fit_is_refused(repa, tmp_path):
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "x.pth")
    refused("is no VGG16 of torchvision", PerceptualLoss, weights_path=str(tmp_path / "x.pth"))
    refused("missing", PerceptualLoss, weights_path=str(tmp_path / "nowhere.pth"))
    refused("has width 192: REPA needs 768", RepaLoss, model="vit_tiny_patch16_224", weights_path=str(tmp_path / "x"))
    refused("repa_layer is null", tokenizer_module, repa=repa)


def test_losses_start_when_told(perceptual, repa):
    """Before that they are neither computed nor logged, and REPA's head has a gradient of zero, which DDP needs."""
    losses = dict(perceptual=like(perceptual, start_step=3), repa=like(repa, start_step=5))
    module = tokenizer_module({"repa_layer": 0}, **losses)
    head = module.tokenizer.decoder.repa_head[0].weight
    for done in (2, 3, 4, 5):
        module._trainer = SimpleNamespace(global_step=done)
        module.zero_grad()
        batch = {"image": torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8)}
        output = module.training_step(batch, 0)
        output["loss"].backward()
        assert [name for name, p in module.named_parameters() if p.grad is None] == []
        assert bool(head.grad.any()) == (done == 5)
        values = {name: float(value) for name, value in output["parts"].items()}
        assert ("perceptual" in values, "repa" in values) == (done >= 3, done >= 5)
        named = values["flow"] + values["vq"] + values["commit"]
        further = 0.5 * values.get("perceptual", 0) + 0.5 * values.get("repa", 0)
        assert values["loss"] == pytest.approx(named + further, rel=1e-5)


def test_a_step_trains_through_both_and_keeps_them_out(perceptual, repa, images, tmp_path):
    module = tokenizer_module({"repa_layer": 0}, perceptual=perceptual, repa=repa)
    names = set(module.state_dict())
    assert all(name.startswith("tokenizer.") for name in names)
    assert copy.deepcopy(module).repa.teacher is repa.teacher
    before = module.tokenizer.decoder.repa_head[0].weight.detach().clone()
    fit = trainer(EMA(0.5), max_steps=2, limit_val_batches=0)  # the first step of the warm-up moves nothing
    fit.fit(module, image_data(images, 2))
    assert {"train/perceptual", "train/repa"} <= set(fit.callback_metrics)
    assert not torch.equal(before, module.tokenizer.decoder.repa_head[0].weight)
    frozen = [*perceptual.distance.network.parameters(), *repa.teacher.network.parameters()]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen)
    optimized = {id(parameter) for group in fit.optimizers[0].param_groups for parameter in group["params"]}
    assert optimized == {id(parameter) for parameter in module.tokenizer.parameters()}
    fit.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(checkpoint["current_model_state"]) == names
    sizes = [sum(p.numel() * p.element_size() for p in list_) for list_ in (module.parameters(), frozen)]
    assert (tmp_path / "x.ckpt").stat().st_size < 5 * sizes[0] < sizes[1], "weights, average, two moments, and a little"
