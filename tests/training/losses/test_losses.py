"""LPIPS, REPA and PatchGAN: against the networks called by hand, trained through, kept out of checkpoints."""

import copy
import os
import pickle
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from refusals import refused
from tiny_models import SIZE, random_vgg
from tiny_training import image_data, tokenizer_module, trainer
from torchmetrics.functional.image.lpips import _LPIPS

from dar_lightning.errors import UserError
from dar_lightning.formats.checkpoint import read_checkpoint
from dar_lightning.training.callbacks import EMA
from dar_lightning.training.losses import AdversarialLoss, PerceptualLoss, RepaLoss
from dar_lightning.training.losses.adversarial import PatchDiscriminator
from dar_lightning.training.optim import OptimizerConfig

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
    b, t = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2)
    a = b + 1.5  # clipped it would be a quarter farther off
    torch.testing.assert_close(perceptual(a, b, t), by_hand(a, b).mean())
    assert perceptual(b, b, t) == 0

    # In training too: nothing is dropped, and the estimate is not clipped.
    module = tokenizer_module(perceptual=perceptual).train()
    module._trainer = SimpleNamespace(global_step=0)
    zero = torch.zeros(())
    total, parts = module.total_loss({"flow": zero, "quantizer": (), "x1_hat": a, "t": t}, b)
    torch.testing.assert_close(parts["perceptual"], by_hand(a, b).mean())
    torch.testing.assert_close(total, 0.5 * by_hand(a, b).mean())
    assert by_hand(a.clamp(-1, 1), b).mean() > 1.1 * parts["perceptual"]


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


FILE = Path(os.environ.get("DAR_VGG16", Path(__file__).parents[3] / "runs" / "vgg16.safetensors"))


@pytest.mark.skipif(not FILE.is_file(), reason="no VGG16: set DAR_VGG16 to a file of data/convert_vgg16.py")
def test_values_and_gradients_are_those_of_the_package():
    """Of smooth pictures, and the same with noise of growing strength: (4, 3, 64, 64) in [-1, 1]."""
    published = pytest.importorskip("lpips").LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    tensors = read_checkpoint(FILE)
    for name, parameter in published.net.named_parameters():
        parameter.data.copy_(tensors["features." + name.split(".", 1)[1]])
    generator = torch.Generator().manual_seed(0)
    images = F.interpolate(torch.rand(4, 3, 8, 8, generator=generator) * 2 - 1, size=64, mode="bicubic").clamp(-1, 1)
    strength = torch.tensor([0.02, 0.1, 0.3, 1.0]).view(4, 1, 1, 1)
    noisy = (images + strength * torch.randn(images.shape, generator=generator)).clamp(-1, 1)
    found = []
    for distance in (PerceptualLoss(weights_path=str(FILE)).distance, published):
        first = noisy.clone().requires_grad_()
        values = distance(first, images)
        found.append((values.detach().flatten(), torch.autograd.grad(values.sum(), first)[0]))
    (mine, my_gradient), (theirs, their_gradient) = found
    assert theirs.min() > 0.01
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    # Seen where features vanish: torchmetrics adds 1e-8 under the root of their norm, the package 1e-10 beside it.
    assert (my_gradient - their_gradient).norm() < 2e-3 * their_gradient.norm()


SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "data" / "convert_vgg16.py"))


@pytest.fixture(scope="module")
def vgg():
    return random_vgg()


@pytest.fixture(scope="module")
def tree(vgg):
    """What the package holds: numpy arrays, height and width first, of a network whose weights are known."""
    layers = [layer for layer in vgg if isinstance(layer, torch.nn.Conv2d)]
    heads = [head.model[-1] for head in _LPIPS(net="vgg", pnet_rand=True).lins]
    kernels = [layer.weight.detach().permute(2, 3, 1, 0).contiguous().numpy() for layer in (*layers, *heads)]
    pairs = zip(layers, kernels, strict=False)
    convolutions = [{"kernel": kernel, "bias": layer.bias.detach().numpy()} for layer, kernel in pairs]
    tree = {"VGG16_0": {f"Conv_{i}": convolution for i, convolution in enumerate(convolutions)}}
    return tree | {f"NetLinLayer_{i}": {"Conv_0": {"kernel": k}} for i, k in enumerate(kernels[len(layers) :])}


def test_converted_weights_are_torchvisions(tree, vgg, tmp_path, monkeypatch):
    checkpoint, output = tmp_path / "vgg16.ckpt", tmp_path / "vgg16.safetensors"
    # as numpy 1 wrote the published file: the unpickler knows these names
    checkpoint.write_bytes(pickle.dumps(tree, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    monkeypatch.setattr("sys.argv", ["convert", "--checkpoint", str(checkpoint), "--output", str(output)])
    SCRIPT["main"]()
    loss = PerceptualLoss(weights_path=str(output))
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(loss.distance.network.vgg(x)[-1], vgg[:-1](x))  # up to the last ReLU


class Malice:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_what_is_refused(tree, tmp_path, monkeypatch):
    """A head that differs from the published one, and a pickle of anything but arrays."""
    changed = tree | {"NetLinLayer_2": {"Conv_0": {"kernel": tree["NetLinLayer_2"]["Conv_0"]["kernel"] + 1}}}
    content = pickle.dumps(changed, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    with pytest.raises(ValueError, match="linear head 2"):
        SCRIPT["convert"](content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="is not a part of an array"):
        SCRIPT["convert"](pickle.dumps({"VGG16_0": Malice()}))
    assert not (tmp_path / "pwned").exists()


NAME = "vit_base_patch14_dinov2.lvd142m"


def cubic(x: float, a: float = -0.75) -> float:
    """The cubic kernel of bicubic interpolation."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resampling(old: int, new: int, scale: float) -> np.ndarray:
    """(new, old) weights of output i, which looks at (i + 0.5) / scale - 0.5 without antialiasing."""
    weights = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) / scale - 0.5
        for place in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            weights[i, np.clip(place, 0, old - 1)] += cubic(at - place)
    return weights


def test_the_table_is_resampled_as_dinov2_does(monkeypatch, tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model(NAME, pretrained=False, num_classes=0, depth=1)
    vit.blocks[0].ls1.gamma.data.fill_(1.0)
    smooth = F.interpolate(torch.randn(1, 768, 5, 5), size=37, mode="bicubic")  # neighbours are alike, as if trained
    vit.pos_embed.data[:, 1:] = smooth.flatten(2).transpose(1, 2)
    torch.save(vit.state_dict(), tmp_path / "model.pth")
    table = vit.pos_embed.detach()[0]  # (1 + 37 * 37, 768), the class token's row first
    create = timm.create_model  # what it would download is the file
    overlay = {"depth": 1, "pretrained_cfg_overlay": {"file": str(tmp_path / "model.pth")}}
    monkeypatch.setattr(timm, "create_model", lambda *names, **options: create(*names, **options | overlay))

    loss, downloaded = RepaLoss(weights_path=str(tmp_path / "model.pth")), RepaLoss()
    assert loss.grid == (16, 16)
    axis = resampling(37, 16, 16.1 / 37)
    by_hand = np.einsum("ia,jb,abd->ijd", axis, axis, table[1:].double().numpy().reshape(37, 37, 768))
    by_hand = torch.cat([table[:1], torch.from_numpy(by_hand).flatten(0, 1).float()])
    for each in (loss, downloaded):
        torch.testing.assert_close(each.teacher.network.vit.pos_embed[0], by_hand, atol=1e-5, rtol=1e-4)

    timms = timm.create_model(NAME, pretrained=True, num_classes=0, img_size=224).eval()
    assert (timms.pos_embed[0] - by_hand)[1:].norm() > 0.01 * by_hand[1:].norm(), "timm's own table"
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    seen = F.interpolate((images / 2 + 0.5 - mean) / std, size=224, mode="bicubic")
    with torch.no_grad():
        with_timms = timms.forward_features(seen)[:, 1:]
        timms.pos_embed.data[0] = by_hand
        expected = timms.forward_features(seen)[:, 1:]
    torch.testing.assert_close(loss.features(images), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(with_timms, expected, atol=1e-4, rtol=1e-4)


SMALL = dict(channels=4, depth=2)


def test_one_backward_pass_gives_each_its_own_gradient():
    """As in the usual form: two optimizers' two passes, the discriminator frozen in the generator's."""
    torch.manual_seed(0)
    loss = AdversarialLoss(t_power=1.0, **SMALL)
    real, fake, t = torch.randn(3, 3, 32, 32), torch.randn(3, 3, 32, 32), torch.tensor([0.0, 0.5, 1.0])
    estimate = fake.clone().requires_grad_()
    mine, critic = loss(estimate, real, t)
    (0.3 * mine + critic).backward()

    other = copy.deepcopy(loss.discriminator)
    other.zero_grad()
    by_hand = (F.relu(1 - other(real)).mean() + F.relu(1 + other(fake)).mean()) / 2
    by_hand.backward()
    torch.testing.assert_close(critic, by_hand)
    for parameter, theirs in zip(loss.discriminator.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, theirs.grad)
    other.requires_grad_(False)
    twin = fake.clone().requires_grad_()
    each = torch.stack([-other(twin[i : i + 1]).mean() for i in range(3)])  # an image is judged alone
    (0.3 * (each * t).mean()).backward()
    torch.testing.assert_close(mine, (each * t).mean())
    torch.testing.assert_close(estimate.grad, twin.grad)
    assert list(other.buffers()) == []


def test_what_a_patch_sees():
    """70x70 pixels, as in pix2pix: one logit's gradient reaches no farther."""
    discriminator = PatchDiscriminator(channels=4)
    for layer in discriminator:  # GroupNorm looks at the whole image
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = lambda x: x
    pixels = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = discriminator(pixels)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    seen = pixels.grad[0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]


@pytest.mark.parametrize("options", [{"depth": 0}, {"channels": 40}, {"start_step": -1}], ids=str)
def test_adversarial_options_out_of_range(options):
    refused(f"^{next(iter(options))} is ", AdversarialLoss, **options)


def test_the_tokenizer_feels_it_from_start_step_on_and_gradients_are_clipped_apart(images):
    adversarial = AdversarialLoss(start_step=2, **SMALL)
    module = tokenizer_module(optimizer=OptimizerConfig(lr=1e-3), adversarial=adversarial)
    logged = []
    module.log_dict = lambda values, **_: logged.append({name: float(value) for name, value in values.items()})
    before = copy.deepcopy(adversarial.state_dict())
    trainer(max_steps=4, gradient_clip_val=1e-3, limit_val_batches=0).fit(module, image_data(images))
    for number, values in enumerate(logged):
        parts = values["train/flow"] + values["train/vq"] + values["train/commit"]
        felt = 0.5 * values["train/adversarial"] if number >= 2 else 0.0
        assert values["train/loss"] == pytest.approx(parts + felt, rel=1e-5)
    assert logged[0]["train/discriminator"] == pytest.approx(1.0, abs=0.1), "it knows nothing yet"
    for part in (module.tokenizer, adversarial):
        gradients = [parameter.grad for parameter in part.parameters()]
        assert float(torch.nn.utils.get_total_norm(gradients)) == pytest.approx(1e-3, rel=1e-2)
    kernels = {name: tensor for name, tensor in adversarial.state_dict().items() if tensor.ndim == 4}
    assert [name for name, tensor in kernels.items() if torch.equal(before[name], tensor)] == []


def test_a_checkpoint_without_it_is_refused():
    with pytest.raises(UserError, match="adversarial is set and the checkpoint has no discriminator"):
        tokenizer_module(adversarial=AdversarialLoss(**SMALL)).on_load_checkpoint({"state_dict": {}})
