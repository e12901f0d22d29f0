"""Adaptive projected guidance: its identities, and the tokens drawn by it one by one, in passes and by Jacobi."""

import json

import pytest
import torch
import torch.nn.functional as F
from tiny_models import TOKENS, make_ar, seeds

from dar_lightning.ar.draw import draw_tokens
from dar_lightning.ar.guidance import Projected, guide, read_guidance
from dar_lightning.ar.gumbel import draw_keys
from dar_lightning.ar.sampling import generate
from dar_lightning.cli import main
from dar_lightning.errors import UserError

LABELS = torch.tensor([0, 3, 1])


@pytest.fixture
def logits() -> torch.Tensor:
    """Conditional ones of 5 sequences, then unconditional ones."""
    return 3 * torch.randn(10, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def probabilities(logits: torch.Tensor, scale: float, **options) -> torch.Tensor:
    return guide(logits, scale, Projected(scale, **options).combine).softmax(dim=-1)


def test_identities(logits):
    cond, uncond = logits.chunk(2)
    for scale in (0.0, 2.0, 7.5):
        found = probabilities(logits, scale, eta=1.0)
        torch.testing.assert_close(found, guide(logits, scale).softmax(dim=-1))  # all kept: classifier-free
        for eta, radius in ((0.0, 0.0), (0.3, 2.0)):
            expected = probabilities(logits, scale, eta=eta, radius=radius)
            shifted = torch.cat([cond + 5, uncond - 3])
            torch.testing.assert_close(probabilities(shifted, scale, eta=eta, radius=radius), expected)
    for eta in (0.0, 0.5, 1.0):
        torch.testing.assert_close(probabilities(logits, 1.0, eta=eta), cond.softmax(dim=-1))


def test_what_only_sharpens_is_taken_away(logits):
    """Where u = (1 - a) c, guidance is a temperature of 1 / (1 + (s - 1) a): kept with eta 1, none of it with 0."""
    cond, share, scale = logits[:5], 0.25, 4.0
    both = torch.cat([cond, (1 - share) * cond])
    for eta in (0.0, 0.5, 1.0):
        expected = (cond * (1 + (scale - 1) * share * eta)).softmax(dim=-1)
        torch.testing.assert_close(probabilities(both, scale, eta=eta), expected)


def test_an_update_is_no_longer_than_its_radius(logits):
    cond = logits[:5] - logits[:5].mean(dim=-1, keepdim=True)
    direction = cond - (logits[5:] - logits[5:].mean(dim=-1, keepdim=True))
    for scale, radius in ((3.0, 2.0), (3.0, 1e3)):
        update = guide(logits, scale, Projected(scale, 1.0, radius).combine) - cond
        expected = (scale - 1) * direction.norm(dim=-1).clamp(max=radius)
        torch.testing.assert_close(update.norm(dim=-1), expected)
        assert (guide(logits, scale, Projected(scale, 0.0, radius).combine) - cond).norm(dim=-1).le(expected).all()


@pytest.mark.parametrize("options", [{}, {"tokens_per_pass": 4}, {"jacobi": 5}], ids=["one by one", "passes", "Jacobi"])
@torch.no_grad()
def test_tokens(options):
    """Against teacher forcing and the formula, written out."""
    model = {name: value for name, value in options.items() if name != "jacobi"}
    ar, draw = make_ar(**model).double(), {"jacobi": options.get("jacobi", 0)}
    tokens = generate(ar, LABELS, guidance="apg,3,0.5,2", generator=seeds(1, 2, 3), **draw)
    cond, null = (ar(each, tokens).double() for each in (LABELS, ar.condition.null(3)))
    cond, null = (each - each.mean(dim=-1, keepdim=True) for each in (cond, null))
    d = cond - null
    d = d * (2 / d.norm(dim=-1, keepdim=True)).clamp(max=1)
    part = F.cosine_similarity(d, cond, dim=-1)[..., None] * d.norm(dim=-1, keepdim=True) * F.normalize(cond, dim=-1)
    logits, keys = cond + 2 * (d - 0.5 * part), draw_keys(3, TOKENS, seeds(1, 2, 3), tokens.device)
    assert torch.equal(tokens, torch.stack([draw_tokens(logits[:, i], keys[:, i]) for i in range(TOKENS)], dim=1))
    plain, whole = (generate(ar, LABELS, guidance=each, generator=seeds(1, 2, 3), **draw) for each in (3.0, "apg,3,1"))
    assert torch.equal(plain, whole)
    assert not torch.equal(plain, tokens)


def test_as_an_option(pipeline, tmp_path):
    assert read_guidance("apg,3") == read_guidance("apg,eta=0,scale=3.0") == "apg,scale=3,eta=0,radius=0"
    words = ["--guidance=apg,3,0.5", "--classes=red", "--per_class=1", "--frames=1", "--device=cpu"]
    main(["sample", f"--pipeline={pipeline}", f"--output={tmp_path}", *words])
    record = json.loads((tmp_path / "samples.json").read_text())
    assert (record["guidance"], record["decoding"]) == ("apg,scale=3,eta=0.5,radius=0", "eager")
    with pytest.raises(UserError, match="guidance apg: radius is -1: it must be at least 0"):
        read_guidance("apg,3,0,-1")
    with pytest.raises(UserError, match="static is true: guidance apg,3 is drawn without, leave it out"):
        generate(make_ar(), LABELS, guidance="apg,3", static=True)
