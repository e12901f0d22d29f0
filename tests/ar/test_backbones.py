"""Other networks between embeddings and head: what they compute, stated a second way; what is refused."""

import sys

import pytest
import torch
from refusals import refused
from tiny_models import AR, CODES, TOKENS, make_ar, seeds
from torch import nn

from dar_lightning import ARConfig, ARModel
from dar_lightning.ar import backbones
from dar_lightning.ar.backbones import Backbone, merge_lora
from dar_lightning.ar.backbones.language_model import MODEL_TYPES
from dar_lightning.ar.decode_road import choose_road
from dar_lightning.ar.sampling import generate
from dar_lightning.errors import UserError
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.weights.llama import save_llama, to_llama

LABELS = torch.tensor([0, 3, 2])
NO_DROPOUT = {"residual_dropout": 0.0, "ffn_dropout": 0.0}
PADDED = {"condition": "features", "condition_options": {"channels": 4, "length": 3}}


def other(model_type: str, config: dict | None = None, **options) -> dict:
    """Values of an ARConfig."""
    return (
        NO_DROPOUT
        | {"backbone": "transformers", "backbone_options": {"model_type": model_type} | options}
        | (config or {})
    )


def codes(count: int = 3) -> torch.Tensor:
    return torch.randint(CODES, (count, TOKENS), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "changes", [{}, {"num_kv_heads": 1, "rope_base": 500.0, "norm_eps": 1e-2}, {"order": "reversed"}]
)
def test_a_llama_of_transformers_is_ours(transformers, changes):
    """With the same weights: logits, and tokens that the same generators draw, by its own cache."""
    ours = make_ar(**NO_DROPOUT | changes)
    theirs = ARModel(ARConfig(**AR | other("llama", changes))).eval()
    trunk = {n.removeprefix("model."): t for n, t in to_llama(ours.config, ours.state_dict()).items()}
    trunk = {f"backbone.trunk.{n}": t for n, t in trunk.items() if n not in ("embed_tokens.weight", "lm_head.weight")}
    rest = {n: t for n, t in ours.state_dict().items() if not n.startswith(("blocks.", "norm."))}
    theirs.load_state_dict(trunk | rest)
    expected = ours(LABELS, codes())
    assert expected.abs().max() > 1
    torch.testing.assert_close(theirs(LABELS, codes()), expected, atol=1e-5, rtol=1e-5)
    kept = {} if "order" in changes else {"prefix": codes()[:, :2]}
    for options in ({"guidance": (4.0, 1.0), "top_p": 0.9}, {"top_k": 1}, kept):
        drawn = [generate(ar, LABELS, generator=seeds(1, 2, 3), **options) for ar in (ours, theirs)]
        assert torch.equal(*drawn), options
    assert choose_road(theirs) == "eager"
    refused("static: only our Llama has the step, backbone is 'transformers'", generate, theirs, LABELS, static=True)
    refused(
        "jacobi is 4: it cuts the cache of our Llama, backbone is 'transformers'", generate, theirs, LABELS, jacobi=4
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.no_grad()
def test_each_model_type(transformers, model_type):
    """Causal; its cache is teacher forcing, also after the null half has left; padding is not seen."""
    ar = make_ar(**other(model_type, PADDED | {"order": "random_per_sample"}))
    features = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    features[0, 0] = 0
    order, drawn = ar.draw_order(2, torch.Generator().manual_seed(0)), codes(2)
    whole = ar(features, drawn, order)
    changed = drawn.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % CODES
    assert torch.equal(ar(features, changed, order)[:, :5], whole[:, :5])
    assert not torch.allclose(ar(features, changed, order)[:, 5:], whole[:, 5:])

    both = torch.cat([features, ar.condition.null(2)])
    logits, cache = ar.start(both, drawn[:, :2].repeat(2, 1), order.repeat(2, 1))
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(logits[:2], whole[:, 2], **close)
    logits = ar.step(drawn[:, 2].repeat(2), cache, order.repeat(2, 1))
    torch.testing.assert_close(logits[2:], ar(ar.condition.null(2), drawn, order)[:, 3], **close)
    cache.keep(2)
    torch.testing.assert_close(ar.step(drawn[:, 3], cache, order), whole[:, 4], **close)
    assert cache.length == 3 + 4

    longer = {"condition_options": {"channels": 4, "length": 5}, "order": "random_per_sample"}
    wide = ARModel(ARConfig(**AR | other(model_type, PADDED | longer))).eval()
    wide.load_state_dict(ar.state_dict())
    padded = torch.cat([torch.zeros(2, 2, 4), features], dim=1)
    torch.testing.assert_close(wide(padded, drawn, order), whole, **close)


def test_it_is_saved_and_cast(transformers, tmp_path):
    """RoPE's table is not saved: it is there after loading, and stays in float32."""
    ar = make_ar(
        **other(
            "qwen3",
            head_dim=32,
            attention_bias=True,
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
        )
    )
    table = ar.backbone.trunk.rotary_emb.inv_freq.clone()
    assert ar.backbone.trunk.layers[0].self_attn.q_proj.bias.shape == (64,)
    ar.save_pretrained(tmp_path / "a")
    again = ARModel.from_pretrained(tmp_path / "a")
    assert model_sha256(again) == model_sha256(ar) != model_sha256(make_ar(**other("qwen3")))
    assert torch.equal(again(LABELS, codes()), ar(LABELS, codes()))
    ar.to(torch.bfloat16).save_pretrained(tmp_path / "b")
    for each in (ar, ARModel.from_pretrained(tmp_path / "b")):
        assert each.head.weight.dtype == torch.bfloat16
        assert torch.equal(each.backbone.trunk.rotary_emb.inv_freq, table)
    refused("backbone is 'transformers': only our Llama goes to transformers", save_llama, ar, tmp_path / "c")


def test_activation_checkpointing_changes_no_gradient(transformers):
    ar = make_ar(**other("qwen2", {"token_dropout": 0.0, "class_dropout": 0.0})).train()
    found = []
    for ar.recompute in (True, False):
        ar.zero_grad()
        nn.functional.cross_entropy(ar(LABELS, codes()).flatten(0, 1), codes().flatten()).backward()
        found.append([parameter.grad for parameter in ar.parameters()])
    assert all(map(torch.equal, *found))
    calls = []
    layer = ar.backbone.trunk.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(0))
    for ar.recompute in (True, False):
        ar(LABELS, codes()).sum().backward()
    assert len(calls) == 3  # twice, once


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"backbone": "gpt"}, "backbone is 'gpt': it must be 'llama' or 'transformers', or the class path of your own"),
        ({"backbone": "some.Where"}, r"not registered, and a config imports no code: call register_backbone\(Where\)"),
        ({"backbone_options": {"x": 1}}, "backbone_options: x: backbone 'llama' has no options"),
        ({"backbone_options": {"x": {"y": {1, 2}}}}, "backbone_options: x is .*: it must be a number, a word"),
        (other("bert"), "model_type is 'bert': choose from llama, qwen2, qwen3, mistral"),
        ({"backbone": "transformers"}, r"residual_dropout is 0\.1: backbone 'transformers' has none, set it to 0"),
        (other("qwen3", hidden_size=8), "hidden_size is 8: set config.dim"),
        (other("qwen3", tie_word_embeddings=True), "tie_word_embeddings is True: codes have a table and a head of"),
        (other("qwen3", vocab_size=151936), "vocab_size is 151936: codes have a table"),
        (other("llama", attn_implementation="x/kernels"), "attn_implementation is 'x/kernels': attention is torch's"),
        (other("llama", auto_map={"AutoModel": "a.B"}), "auto_map is .*: code of others is not run"),
        (other("llama", sliding_windows=3), "sliding_windows is 3: a llama has no such option"),
        (other("llama", hidden_act="no"), "transformers makes no llama of them: 'no'"),
        (other("llama", intermediate_size="wide"), "transformers has no such llama: "),
        (other("llama", {"tokens_per_pass": 2}), "tokens_per_pass is 2: only our Llama predicts several, backbone is"),
        (other("llama", lora_targets=["q_proj"]), "alpha must be positive, and both need lora_rank"),
        (other("llama", lora_rank=2, lora_alpha=0), "alpha must be positive, and both need lora_rank"),
        (other("llama", pad_token_id=5), "pad_token_id is 5: codes have a table"),
        (other("llama", lora_rank="4"), "lora_rank '4', lora_alpha None, lora_targets None: need a rank from 0"),
    ],
)
def test_what_is_refused(transformers, values, said):
    refused(said, lambda: ARModel(ARConfig(**AR | values)))


def test_without_transformers_or_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    if "transformers" in sys.modules:
        with pytest.raises(UserError, match=r"lora_rank is 4, which needs peft: pip install 'dar-lightning\[peft\]'"):
            ARModel(ARConfig(**AR | other("llama", lora_rank=4)))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UserError, match=r"backbone 'transformers' needs it: pip install 'dar-lightning\[transformers\]'"
    ):
        ARModel(ARConfig(**AR | other("llama")))


class Buffered(Backbone):
    """Has a buffer that nobody would fill."""

    def __init__(self, config, length, size: int = 1):
        super().__init__()
        self.register_buffer("lost", torch.ones(size), persistent=False)

    def forward(self, x, real=None, cache=None, recompute=False):
        return x * self.lost


def test_own_classes_that_are_refused(monkeypatch):
    monkeypatch.setattr(backbones.BACKBONES, "classes", dict(backbones.BACKBONES.classes))
    backbones.register_backbone(Buffered, "tests.Buffered")
    backbones.register_backbone(nn.GRU, "tests.GRU")
    for name, options, said in (
        ("tests.Buffered", {}, "backbone tests.Buffered has the buffer lost, which is not saved"),
        ("tests.Buffered", {"sizes": 3}, "backbone_options: sizes is 3: tests.Buffered has the options size"),
        ("tests.GRU", {}, "tests.GRU is no Backbone: inherit from dar_lightning.ar.backbones.interface.Backbone"),
    ):
        with pytest.raises(UserError, match=said):
            ARModel(ARConfig(**AR, backbone=name, backbone_options=options))


def test_adapters_are_added_to_the_weights():
    """In closed form: W + alpha / r B A; without peft."""
    generator = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(*shape, generator=generator) for shape in ((6, 5), (2, 5), (6, 2)))
    tensors = {"x.q.weight": w, "x.q.lora_A.default.weight": a, "x.q.lora_B.default.weight": b, "head.weight": a}
    config = ARConfig(**AR | other("llama", lora_rank=2, lora_alpha=3.0))
    merged_config, merged = merge_lora(config, tensors)
    assert merged_config.backbone_options == {"model_type": "llama"}
    assert sorted(merged) == ["head.weight", "x.q.weight"]
    x = torch.randn(4, 5, generator=generator)
    torch.testing.assert_close(x @ merged["x.q.weight"].T, x @ w.T + 1.5 * (x @ a.T) @ b.T)
    plain = ARConfig(**AR)
    assert merge_lora(plain, tensors) == (plain, tensors)
    refused(r"adapters of x\.q do not fit it", merge_lora, config, tensors | {"x.q.lora_B.default.weight": w})


@torch.no_grad()
def test_lora(transformers, tmp_path):
    """Fresh adapters change nothing; merged they are the model; names are those of the model without."""
    pytest.importorskip("peft")
    plain = make_ar(**other("qwen3"))
    ar = ARModel(ARConfig(**AR | other("qwen3", lora_rank=2, lora_alpha=4.0))).eval()
    fresh = ar.load_state_dict(plain.state_dict(), strict=False)
    assert fresh.unexpected_keys == []
    assert all(".lora_" in name for name in fresh.missing_keys)
    assert torch.equal(ar(LABELS, codes()), plain(LABELS, codes()))
    trained = {name for name, weight in ar.named_parameters() if weight.requires_grad and name.startswith("backbone")}
    assert len(trained) == 2 * 7 * 2
    assert all(".lora_" in name for name in trained)
    for name, weight in ar.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(weight, std=0.3)
    expected = ar(LABELS, codes())
    assert not torch.allclose(expected, plain(LABELS, codes()), atol=0.1)
    ar.save_pretrained(tmp_path)
    assert torch.equal(ARModel.from_pretrained(tmp_path)(LABELS, codes()), expected)
    config, tensors = merge_lora(ar.config, ar.state_dict())
    merged = ARModel(config).eval()
    merged.load_state_dict(tensors)
    torch.testing.assert_close(merged(LABELS, codes()), expected, atol=1e-4, rtol=1e-4)
    drawn = [generate(each, LABELS, guidance=2.0, generator=seeds(1, 2, 3)) for each in (ar, merged)]
    assert torch.equal(*drawn)
    some = ARModel(ARConfig(**AR | other("qwen3", lora_rank=2, lora_targets=["q_proj"])))
    assert sum(".lora_A." in name for name, _ in some.named_parameters()) == 2
    with pytest.raises(UserError, match="lora_targets has qkv: choose from down_proj, gate_proj, k_proj"):
        ARModel(ARConfig(**AR | other("qwen3", lora_rank=2, lora_targets=["qkv"])))
