"""Every quantizer against closed forms and against vector-quantize-pytorch; names, own classes, saved weights."""

import json
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from tiny_models import SIZE, TOKENIZER, make_tokenizer
from torch import nn

from dar_lightning import SequentialDiffusionTokenizer, TokenizerConfig
from dar_lightning.errors import UserError
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.tokenizer import quantizers
from dar_lightning.tokenizer.quantizers import ibq
from dar_lightning.tokenizer.quantizers.entropy import bit_entropies

KINDS = {
    "vq": dict(codebook_size=32, codebook_dim=4),
    "fsq": dict(codebook_size=60, codebook_dim=3, quantizer_options={"levels": [5, 4, 3]}),
    "lfq": dict(codebook_size=32, codebook_dim=5, quantizer_options={"commit_weight": 0.25}),
    "bsq": dict(codebook_size=32, codebook_dim=5),
    "ibq": dict(codebook_size=32, codebook_dim=4),
    "simvq": dict(codebook_size=32, codebook_dim=4),
}
NAMES = {
    "vq": ("vq", "commit"),
    "fsq": (),
    "lfq": ("entropy", "batch_entropy", "commit"),
    "bsq": ("entropy", "batch_entropy"),
    "ibq": ("vq", "commit", "joint", "entropy", "batch_entropy"),
    "simvq": ("vq", "commit"),
}


def build(name: str, size: int, dim: int, **options) -> nn.Module:
    torch.manual_seed(0)
    return quantizers.make_quantizer(name, size, dim, options)


def latents(*shape: int, scale: float = 1.0) -> torch.Tensor:
    values = scale * torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return values.requires_grad_()


@pytest.fixture(params=KINDS)
def tokenizer(request) -> SequentialDiffusionTokenizer:
    return make_tokenizer(quantizer=request.param, **KINDS[request.param])


def test_all_are_tested():
    assert [*KINDS] == [name for name in quantizers.QUANTIZERS.classes if "." not in name]


def test_codes_are_those_that_training_reads(tokenizer):
    images, size = torch.rand(6, 3, SIZE, SIZE) * 2 - 1, tokenizer.config.codebook_size
    codes, quantizer = tokenizer.tokenize(images), tokenizer.quantizer
    assert codes.dtype == torch.int64
    assert 0 <= int(codes.min()) < int(codes.max()) < size
    found = tokenizer.encoder(images)
    values, indices, _ = quantizer.train()(found)
    assert torch.equal(indices, codes)
    torch.testing.assert_close(values, quantizer.lookup(codes))
    assert quantizer(found.bfloat16()).values.dtype == torch.bfloat16
    assert torch.equal(torch.cat([quantizer.nearest(found[i : i + 1]) for i in range(6)]), codes)
    table = quantizer.lookup(torch.arange(size)[None])
    assert len(table[0].unique(dim=0)) == size, "every code has values of its own"
    if tokenizer.config.quantizer not in ("ibq", "fsq"):  # a long code of ibq is nearest to short ones; fsq squashes
        assert torch.equal(quantizer.nearest(table)[0], torch.arange(size))
    assert len(quantizer.lookup(codes[0]).shape) == 2, "any shape of indices"


def test_the_encoder_learns_through_it(tokenizer):
    images, name = torch.rand(4, 3, SIZE, SIZE) * 2 - 1, tokenizer.config.quantizer
    losses = tokenizer.train().training_losses(images, torch.full((4,), 0.4))
    assert losses["quantizer"] == NAMES[name]
    assert all(losses[each].shape == () and losses[each] != 0 for each in NAMES[name])
    losses["flow"].backward()
    assert tokenizer.encoder.to_latent.weight.grad.abs().sum() > 0
    # Of the tokens that no step has read, nothing is known: only losses of the others count.
    read = torch.arange(tokenizer.config.num_tokens)[None] < torch.tensor([[2], [4]])
    z = latents(2, tokenizer.config.num_tokens, tokenizer.config.codebook_dim)
    changed = torch.where(read[..., None], z, 3 * z.flip(0))
    ours, theirs = tokenizer.quantizer(z, read).losses, tokenizer.quantizer(changed, read).losses
    for each in NAMES[name]:
        assert torch.equal(*(x[each] if x[each].ndim == 0 else x[each][read] for x in (ours, theirs)))


def test_saved_weights_name_it(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantizer"] == tokenizer.config.quantizer
    assert config["quantizer_options"] == tokenizer.config.quantizer_options
    again = SequentialDiffusionTokenizer.from_pretrained(tmp_path)
    assert model_sha256(again) == model_sha256(tokenizer)
    has = {name.removeprefix("quantizer.") for name in again.state_dict() if name.startswith("quantizer.")}
    projection = {"rows", "projection.weight", "projection.bias"}
    assert has == {"vq": {"codebook"}, "ibq": {"codebook"}, "simvq": projection}.get(tokenizer.config.quantizer, set())
    images, noise = torch.rand(2, 3, SIZE, SIZE), torch.randn(2, 3, SIZE, SIZE)
    codes = tokenizer.tokenize(images)
    assert torch.equal(again.tokenize(images), codes)
    assert torch.equal(again.detokenize(codes, noise), tokenizer.detokenize(codes, noise))
    half = again.to(torch.bfloat16)
    assert half.detokenize(half.tokenize(images), noise).isfinite().all()


def test_latents_that_are_not_numbers_have_a_code_and_no_values(tokenizer):
    """As a step that SkipBadSteps skips: what counts the codes goes on."""
    z = torch.full((1, 2, tokenizer.config.codebook_dim), float("nan"))
    values, codes, _ = tokenizer.quantizer(z)
    assert values.isnan().all()
    assert 0 <= int(codes.min()) <= int(codes.max()) < tokenizer.config.codebook_size


@pytest.mark.parametrize("name", KINDS)
def test_200_steps_lower_the_loss(name):
    """Of points that only their codes tell apart: what decodes knows nothing else."""
    config = TokenizerConfig(**TOKENIZER | {"quantizer": name} | KINDS[name])
    quantizer = build(name, config.codebook_size, config.codebook_dim, **config.quantizer_options)
    encoder, decoder = nn.Linear(2, config.codebook_dim), nn.Linear(config.codebook_dim, 8)
    parameters = [*encoder.parameters(), *decoder.parameters(), *quantizer.parameters()]
    optimizer, spread = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0), torch.randn(2, 8)
    errors, totals = [], []
    for _ in range(200):
        points = torch.randn(16, 8, 2)
        values, _, losses = quantizer(encoder(points))
        error = (decoder(values) - points @ spread).square().mean() / spread.square().mean() / 2
        total = error + sum(loss.mean() for loss in losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        errors.append(float(error))
        totals.append(float(total))
    assert sum(errors[-20:]) / 20 < 0.6, "1 is the error of the mean, without codes"
    assert sum(totals[-20:]) < sum(totals[:20])


def test_entropy_of_bits_is_that_of_all_codes():
    """A token's exactly; the batch's, the sum of the bits', bounds that of the codes from above."""
    dim, temperature = 6, 0.5
    z, read = latents(3, 5, dim), torch.rand(3, 5, generator=torch.Generator().manual_seed(2)) < 0.7
    codes = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * dim)
    p = (2 * z @ codes.T / temperature).softmax(dim=-1)
    each, batch = bit_entropies(4 * z / temperature, read, training=False)
    torch.testing.assert_close(each, torch.special.entr(p).sum(dim=-1))
    mean = p[read].mean(dim=0)
    ones = torch.stack([mean[codes[:, bit] > 0].sum() for bit in range(dim)])
    torch.testing.assert_close(batch, (torch.special.entr(ones) + torch.special.entr(1 - ones)).sum())
    assert torch.special.entr(mean).sum() < batch < dim * torch.log(torch.tensor(2.0))
    sure = latents(2, 3, 4, scale=0.0) + 100.0
    gradient = torch.autograd.grad(sum(x.sum() for x in bit_entropies(sure, None, False)), sure)[0]
    assert gradient.isfinite().all()


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("vector_quantize_pytorch")


@pytest.mark.parametrize("levels", [[3] * 4, [4, 4], [2] * 5, [8, 8, 5, 5], [7, 6]], ids=str)
def test_fsq_is_the_librarys(library, levels):
    size = int(torch.tensor(levels).prod())
    ours = build("fsq", size, len(levels), levels=levels)
    theirs = library.FSQ(levels, preserve_symmetry=levels[0] == 2)
    z, weights = latents(2, 50, len(levels), scale=2.0), torch.randn(2, 50, len(levels))
    values, codes, losses = ours(z)
    expected, indices = theirs(z)
    assert losses == {}
    assert torch.equal(codes, indices)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(ours.lookup(codes), theirs.indices_to_codes(codes))
    gradients = [torch.autograd.grad((found * weights).sum(), z)[0] for found in (values, expected)]
    torch.testing.assert_close(*gradients)
    if len(set(levels)) == 1:
        assert build("fsq", size, len(levels)).levels == levels


@pytest.mark.parametrize("name", ["lfq", "bsq"])
def test_lfq_and_bsq_are_the_librarys(library, name):
    """But for the batch's entropy, which is of bits here."""
    dim, temperature = 5, 0.3
    ours = build(name, 2**dim, dim, temperature=temperature, commit_weight=0.25)
    theirs = library.LFQ(dim=dim, spherical=name == "bsq", commitment_loss_weight=0.25).train()
    z, weights = latents(2, 50, dim), torch.randn(2, 50, dim)
    values, codes, losses = ours(z)
    (expected, indices, _), parts = theirs(z, inv_temperature=1 / temperature, return_loss_breakdown=True)
    assert torch.equal(codes, indices)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(ours.lookup(codes), theirs.indices_to_codes(codes))
    gradients = [torch.autograd.grad((found * weights).sum(), z, retain_graph=True)[0] for found in (values, expected)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(losses["entropy"].mean(), 0.1 * parts.per_sample_entropy, rtol=1e-3, atol=0)
    torch.testing.assert_close(losses["commit"].mean(), 0.25 * parts.commitment)
    assert 0 < 0.1 * parts.batch_entropy <= -losses["batch_entropy"]


def test_simvq_is_the_librarys(library):
    ours = build("simvq", 64, 8)
    theirs = library.SimVQ(8, 64, rotation_trick=False)
    theirs.frozen_codebook.copy_(ours.rows)
    theirs.code_transform = ours.projection
    z = latents(2, 50, 8)
    values, codes, losses = ours(z)
    expected, indices, loss = theirs(z)
    assert torch.equal(codes, indices)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(sum(each.mean() for each in losses.values()), loss)
    plain = build("simvq", 64, 8)  # with W = 1 and b = 0, the nearest of the rows
    nn.init.eye_(plain.projection.weight)
    nn.init.zeros_(plain.projection.bias)
    assert torch.equal(plain.nearest(z), torch.cdist(z, plain.rows.expand(2, -1, -1)).argmin(dim=-1))


def test_ibq_is_its_formula(monkeypatch):
    """The dense straight-through form, (onehot - sg p + p) C; a chunk of a few tokens at a time gives the same."""
    size, dim = 256, 4
    quantizer, z = build("ibq", size, dim), latents(2, 20, dim)
    read = torch.arange(20) < torch.tensor([[20], [7]])
    weights = torch.randn(2, 20, dim)

    def gradients(loss):
        return [*torch.autograd.grad(loss, [z, quantizer.codebook]), loss.detach()]

    def ours():
        values, _, losses = quantizer(z, read)
        losses = {name: loss[read].mean() if loss.ndim else loss for name, loss in losses.items()}
        return gradients((values * weights).sum() + sum(losses.values()))

    codebook = quantizer.codebook
    logits = z @ codebook.T
    p, hard = logits.softmax(dim=-1), F.one_hot(logits.argmax(dim=-1), size)
    values, codes = (hard - p.detach() + p) @ codebook, hard.float() @ codebook
    losses = (values - z).square() + (codes.detach() - z).square() + 0.25 * (codes - z.detach()).square()
    sharp = (logits / 0.01).softmax(dim=-1)
    entropy = torch.special.entr(sharp.clamp(min=1e-30)).sum(dim=-1)[read].mean()
    batch = torch.special.entr(sharp[read].mean(dim=0).clamp(min=1e-30)).sum()
    dense = gradients((values * weights).sum() + losses.mean(dim=-1)[read].mean() + 0.05 * (entropy - batch))
    for one, other in zip(ours(), dense, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert (dense[1].abs().sum(dim=-1) > 0).all(), "every code learns"
    whole = ours()
    monkeypatch.setattr(ibq, "CHUNK", 7 * size)
    for one, other in zip(ours(), whole, strict=True):
        torch.testing.assert_close(one, other)


class Half(nn.Module):
    """Halves of a line; a Quantizer that does little."""

    bypass = False

    def __init__(self, codebook_size, codebook_dim, **options):
        super().__init__()
        self.options = options
        self.register_buffer("table", torch.zeros(1), persistent=not options.get("forgets", False))
        if options.get("lost", False):
            del type(self).lookup

    def nearest(self, z):
        return (z[..., 0] > 0).long()

    def lookup(self, indices):
        return indices[..., None].float().expand(*indices.shape, 4)

    def forward(self, z, read=None):
        codes = self.nearest(z)
        return quantizers.Quantized(z, codes, {self.options.get("loss", "mine"): torch.ones(z.shape[:2])})


@pytest.fixture
def own(monkeypatch) -> str:
    """The name of a registered class of one's own."""
    monkeypatch.setattr(quantizers.QUANTIZERS, "classes", dict(quantizers.QUANTIZERS.classes))
    quantizers.register_quantizer(Half)
    return f"{__name__}.Half"


def test_a_class_of_ones_own(own, tmp_path, monkeypatch):
    config = TokenizerConfig(**TOKENIZER | {"quantizer": own, "quantizer_options": {"depth": [1, 2]}})
    tokenizer = SequentialDiffusionTokenizer(config)
    assert tokenizer.quantizer.options == {"depth": [1, 2]}
    losses = tokenizer.training_losses(torch.zeros(2, 3, SIZE, SIZE))
    assert losses["quantizer"] == ("mine",)
    assert losses["mine"] == 1
    tokenizer.save_pretrained(tmp_path)
    assert isinstance(SequentialDiffusionTokenizer.from_pretrained(tmp_path).quantizer, Half)
    assert quantizers.register_quantizer(Half, "another.name") is Half
    assert quantizers.QUANTIZERS.classes["another.name"] is Half
    taken = SequentialDiffusionTokenizer(TokenizerConfig(**TOKENIZER | config_of(own, loss="flow")))
    refused("names a loss flow: give it another name", taken.training_losses, torch.zeros(2, 3, SIZE, SIZE))


def config_of(name: str, **options) -> dict:
    return {"quantizer": name, "quantizer_options": options}


def test_a_downloaded_config_imports_no_code(tmp_path, monkeypatch):
    (tmp_path / "evil_quantizer.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    make_tokenizer().save_pretrained(tmp_path / "weights")
    path = tmp_path / "weights/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantizer": "evil_quantizer.Evil"}))
    with pytest.raises(UserError) as error:
        SequentialDiffusionTokenizer.from_pretrained(tmp_path / "weights")
    said = "quantizer is 'evil_quantizer.Evil', a class that is not registered, and a config imports no code: call"
    assert said in str(error.value)
    assert "--trust evil_quantizer.Evil" in str(error.value)
    assert "\n" not in str(error.value)
    assert "evil_quantizer" not in sys.modules


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantizer": "pq"}, "quantizer is 'pq': it must be 'vq' or 'fsq' or 'lfq' or 'bsq' or 'ibq' or 'simvq', or"),
        ({"quantizer": "fsq", "codebook_size": 80}, "codebook_size is 80: fsq needs a number of levels to the power"),
        ({"quantizer": "fsq", "codebook_size": 1}, "codebook_size is 1: fsq needs"),
        ({"quantizer": "fsq", "codebook_dim": 10**9}, "codebook_size is 32: fsq needs"),
        (config_of("fsq", levels=[2, 2, 2, 5]), "codebook_size is 32: fsq needs the product of levels [2, 2, 2, 5],"),
        (config_of("fsq", levels=[4, 8]), "levels is [4, 8]: fsq needs 4 numbers of 2 or more, as codebook_dim says"),
        (config_of("fsq", levels=8), "levels is 8: fsq needs 4 numbers"),
        ({"quantizer": "lfq", "codebook_size": 81}, "codebook_size is 81: lfq needs 2 to the power of codebook_dim, 4"),
        ({"quantizer": "bsq", "codebook_dim": 10**9}, "codebook_size is 32: bsq needs 2 to the power"),
        (config_of("vq", beta=1), "quantizer_options: beta is 1: vq has no options"),
        (config_of("simvq", beta=1), "quantizer_options: beta is 1: simvq has the options commitment"),
        (config_of("ibq", commitment="much"), "quantizer_options: commitment is 'much': ibq needs a number"),
        (config_of("ibq", temperature=0), "temperature is 0: it must be positive and finite"),
        (config_of("simvq", commitment=-1), "commitment is -1: must be at least 0"),
    ],
    ids=str,
)
def test_impossible_quantizers(changes, message):
    line = f"^{re.escape(message)}[^\n]*$"
    with pytest.raises(UserError, match=line), torch.device("meta"):  # some sizes fit no memory
        SequentialDiffusionTokenizer(TokenizerConfig(**TOKENIZER | changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forgets": True}, "has the buffer table, which is not saved: a loaded model would find it empty"),
        ({"lost": True}, "is no Quantizer: it has no lookup"),
    ],
)
def test_classes_that_are_no_quantizers(options, message, own, monkeypatch):
    monkeypatch.setattr(Half, "lookup", Half.lookup)  # put back
    refused(message, quantizers.make_quantizer, own, 2, 4, options)


def test_what_cannot_be_registered():
    for given, name, message in ((Half, "vq", "it needs a dot"), (len, None, "is no torch module class")):
        refused(message, quantizers.register_quantizer, given, name)
    for name, message in (("no_such.Thing", "can be imported: No module"), ("json.Thing", "can be imported")):
        refused(message, quantizers.import_quantizer, name)
    refused("is no torch module class", quantizers.import_quantizer, "json.loads")
