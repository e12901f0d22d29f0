"""Official checkpoints in ours, and what is refused."""

import pytest
import torch
from official import numbers, save_pt, state_dict
from refusals import refused

from dar_lightning import ARConfig, TokenizerConfig
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.weights import load_official_ar, load_official_tokenizer


@pytest.fixture(scope="module")
def ar_config() -> dict:
    return numbers("ar_a", "config")["model"]


@pytest.fixture(scope="module")
def ar_state() -> dict[str, torch.Tensor]:
    return state_dict("ar_a")


@pytest.fixture(scope="module")
def tokenizer_state() -> dict[str, torch.Tensor]:
    return state_dict("tokenizer_a")


@pytest.fixture
def tokenizer_config() -> dict:
    return numbers("tokenizer_a", "config")


@pytest.mark.parametrize(
    ("name", "millions"),
    [("tokenizer_v1", 307.44), ("GPT-B", 110.9), ("GPT-L", 342.9), ("GPT-XL", 774.7), ("GPT-XXL", 1411.0)],
)
def test_every_key_of_the_released_sizes_is_consumed(name, millions):
    """A golden says what a released model has; its tensors are without data here."""
    golden = numbers("full_size_keys", name)
    state = {key: torch.empty(entry["shape"], device="meta") for key, entry in golden["keys"].items()}
    if name == "tokenizer_v1":
        model = load_official_tokenizer(state, {"model": golden["config"]})
        assert model.config == TokenizerConfig.preset("v1")
        assert sum(p.numel() for p in model.decoder.repa_head.parameters()) == pytest.approx(7.34e6, rel=1e-3)
    else:
        model = load_official_ar(state, golden["config"])
        assert model.config == ARConfig.preset(name.removeprefix("GPT-"))
        if name == "GPT-B":
            assert load_official_ar(state).config == model.config, "a released size needs no config"
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == golden["total_parameters"]
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("container", ["model", "module", "state_dict", None])
def test_layouts_and_prefixes(ar_state, ar_config, prefix, container):
    state = {prefix + name: tensor for name, tensor in ar_state.items()}
    source = state if container is None else {container: state, "optimizer": {"state": {}}, "steps": 3}
    assert model_sha256(load_official_ar(source, ar_config)) == model_sha256(load_official_ar(ar_state, ar_config))


def test_ema_or_raw_weights(ar_state, ar_config, tokenizer_state, tokenizer_config):
    ema = ar_state | {"norm.weight": ar_state["norm.weight"] + 1}
    both = {"model": ar_state, "ema": ema}
    for weights, averaged in (("auto", False), ("raw", False), ("ema", True)):  # the official AR sampler reads 'model'
        model = load_official_ar(both, ar_config, weights=weights)
        assert model.averaged is averaged
        assert torch.equal(model.norm.weight, (ema if averaged else ar_state)["norm.weight"])
    assert load_official_ar({"model": ar_state}, ar_config).averaged is None, "the file does not tell"
    refused(
        r"no EMA weights: .* the file has model, 7",
        load_official_ar,
        {"model": ar_state, 7: 1},
        ar_config,
        weights="ema",
    )
    refused("only EMA weights", load_official_ar, {"ema": ema}, ar_config, weights="raw")

    ema = tokenizer_state | {"query_linear.bias": tokenizer_state["query_linear.bias"].float() + 1}
    auto = load_official_tokenizer({"model": tokenizer_state, "ema": ema}, tokenizer_config)
    assert torch.equal(auto.encoder.query_proj.bias, ema["query_linear.bias"]), "the official loader prefers EMA"


def test_official_file_with_its_two_pickled_classes(tmp_path, tokenizer_state, tokenizer_config):
    path = save_pt(
        tmp_path / "x.pt", tokenizer_config, ema=tokenizer_state | {"quantize.codebook_used": torch.zeros(65536)}
    )
    expected = load_official_tokenizer(tokenizer_state, tokenizer_config)
    assert model_sha256(load_official_tokenizer(path)) == model_sha256(expected)
    assert load_official_tokenizer(path, tokenizer_config).config == expected.config
    tokenizer_config["model"]["diff_decoder"]["data_std"] = 0.5
    refused("differs from the given one", load_official_tokenizer, path, tokenizer_config)


def test_half_precision_files_become_float32_in_memory_of_their_own(ar_state, ar_config):
    halves = load_official_ar({name: tensor.half() for name, tensor in ar_state.items()}, ar_config)
    assert {parameter.dtype for parameter in halves.parameters()} == {torch.float32}
    ar = load_official_ar(ar_state, ar_config)
    with torch.no_grad():
        ar.norm.weight += 1
    assert torch.equal(ar.norm.weight, ar_state["norm.weight"] + 1)


def test_warnings(tokenizer_state, tokenizer_config):
    state = {name: tensor for name, tensor in tokenizer_state.items() if "repa_out" not in name}
    with pytest.warns(UserWarning, match="no REPA head"):
        assert load_official_tokenizer(state, tokenizer_config).config.repa_layer is None
    tokenizer_config["model"]["num_denoising_steps"] = 8  # more than there are groups
    with pytest.warns(UserWarning, match="num_steps=8"):
        load_official_tokenizer(tokenizer_state, tokenizer_config)


BIAS = "patchify.bias"


def refuse(load, source, config, message: str) -> None:
    refused(message, load, source, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({BIAS: None}, r"missing patchify\.bias"),
        ({"diff_decoder.net.repa_out.2.bias": None}, r"missing diff_decoder\.net\.repa_out\.2\.bias"),
        ({"extra": torch.zeros(2)}, "unknown extra"),
        ({BIAS: torch.zeros(3)}, r"patchify\.bias is \(3,\), need \(64,\)"),
        ({BIAS: "x"}, r"patchify\.bias is a str, need \(64,\)"),
        ({BIAS: torch.zeros(64, dtype=torch.int64)}, r"patchify\.bias is \(64,\) of whole numbers, need \(64,\)"),
        ({BIAS: torch.zeros(64).to_sparse()}, r"patchify\.bias is \(64,\) torch\.sparse_coo, need"),
        ({BIAS: torch.zeros(64).index_fill(0, torch.tensor(5), torch.inf)}, r"patchify\.bias holds NaN or infinity"),
        ({BIAS: torch.zeros(()).expand(10**15)}, r"patchify\.bias is \(10{15},\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_are_refused_by_their_official_name(tokenizer_state, tokenizer_config, changes, message):
    state = {name: value for name, value in (tokenizer_state | changes).items() if value is not None}
    refuse(load_official_tokenizer, state, tokenizer_config, message)


def test_tokenizer_configs_are_refused_by_key(tokenizer_state, tokenizer_config):
    model = tokenizer_config["model"]
    decoder = model["diff_decoder"]
    for config, message in (
        (None, "carries no config"),
        ({}, "no section 'model'"),
        ({"model": model | {"diff_decoder": None}}, "no section 'diff_decoder'"),
        ({"model": {name: value for name, value in model.items() if name != "vq_dim"}}, "lacks vq_dim"),
        ({"model": model | {"vq_enable": False}}, "vq_enable is False"),
        ({"model": model | {"vq_dim": "8"}}, "codebook_dim is '8', need int"),
        ({"model": model | {"diff_decoder": decoder | {"cond_dim": 32}}}, "cond_dim is 32"),
        ({"model": model | {"diff_decoder": decoder | {"mlp_head": True}}}, "mlp_head is True"),
        ({"model": model | {"num_query_groups": 5, "num_denoising_steps": 5}}, "num_groups 5"),
        ({"model": model | {"rope_base_len": torch.zeros(2)}}, "rope_base_len must be plain values"),
        ({"model": model | {7: 1, None: 2}}, "unknown keys: 7, None"),
    ):
        refuse(load_official_tokenizer, tokenizer_state, config, message)


def test_ar_models_are_refused(ar_state, ar_config):
    without = {name: value for name, value in ar_config.items() if name != "n_layer"}
    for config, tensors, message in (
        (ar_config | {"surprise": 1}, {}, "unknown keys: surprise"),
        (ar_config | {"cls_token_num": 2}, {}, "cls_token_num is 2"),
        (ar_config | {"ffn_hidden": 7}, {}, "ffn_hidden is 7"),
        (ar_config | {"n_layer": 4}, {}, r"missing layers\.3"),
        (ar_config, {"layers.99999999.x": torch.zeros(1)}, r"unknown layers\.9999"),
        (ar_config, {f"layers.{'9' * 5000}.x": torch.zeros(1)}, r"unknown layers\.9999"),
        (without, {"layers.9999.x": torch.zeros(1)}, "depth is 10000, the weights are only"),
        (None, {}, "no released size"),
        ([1], {}, "is a list"),
        (None, {"tok_embeddings.weight": torch.zeros(1)}, "no official AR model"),
    ):
        refuse(load_official_ar, ar_state | tensors, config, message)
