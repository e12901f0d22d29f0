"""Official checkpoints in ours, our folders there and back, and what is refused."""

import argparse
import copy
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.model import ARModel
from dar_lightning.commands.convert import convert
from dar_lightning.errors import UserError
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.formats.pretrained import CONFIG_NAME, WEIGHTS_NAME
from dar_lightning.generation.pipeline import DARPipeline
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer
from dar_lightning.weights import load_official_ar, load_official_tokenizer

FULL_SIZE_KEYS = Path(__file__).parents[1] / "goldens" / "full_size_keys"
NO_REPA = pytest.mark.filterwarnings("ignore:.*has no REPA head")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def tokenizer_file(tmp_path, official_state, official_config, monkeypatch):
    """Writes a .pt as the official training does: a pickled Namespace and the official code's own Config class."""

    def write(**content) -> Path:
        module = types.ModuleType("config_util")
        module.Config = type("Config", (), {"__module__": "config_util"})
        monkeypatch.setitem(sys.modules, "config_util", module)
        config = module.Config()
        config._data = official_config("tokenizer_a")
        content = {"config": config, "args": argparse.Namespace(lr=2e-4, data_path="x"), "steps": 7} | content
        torch.save(content, tmp_path / "official.pt")
        monkeypatch.delitem(sys.modules, "config_util")
        return tmp_path / "official.pt"

    return write


def tiny_models():
    torch.manual_seed(0)
    ar = ARModel(ARConfig.preset("tiny"))
    torch.nn.init.normal_(ar.head.weight)
    return [SequentialDiffusionTokenizer(TokenizerConfig.preset("tiny")), ar]


# ---- official files


@pytest.mark.parametrize(
    ("name", "millions"),
    [("tokenizer_v1", 307.44), ("GPT-B", 110.9), ("GPT-L", 342.9), ("GPT-XL", 774.7), ("GPT-XXL", 1411.0)],
)
def test_every_key_of_the_released_sizes_is_consumed(name, millions):
    golden = json.loads((FULL_SIZE_KEYS / f"{name}.json").read_text())
    state = {key: torch.empty(entry["shape"], device="meta") for key, entry in golden["keys"].items()}
    if name == "tokenizer_v1":
        model = load_official_tokenizer(state, {"model": golden["config"]})
        assert model.config == TokenizerConfig.preset("v1")
        assert sum(p.numel() for p in model.decoder.repa_head.parameters()) == pytest.approx(7.34e6, rel=1e-3)
    else:
        model = load_official_ar(state, golden["config"])
        assert model.config == ARConfig.preset(name.removeprefix("GPT-"))
        assert load_official_ar(state).config == model.config, "a released size needs no config"
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == golden["total_parameters"]
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_a_full_size_key_more_or_less_is_named():
    golden = json.loads((FULL_SIZE_KEYS / "GPT-B.json").read_text())
    state = {key: torch.empty(entry["shape"], device="meta") for key, entry in golden["keys"].items()}
    with pytest.raises(UserError, match=r"missing layers\.3\.attention\.wo\.weight"):
        load_official_ar({key: value for key, value in state.items() if key != "layers.3.attention.wo.weight"})
    with pytest.raises(UserError, match=r"unknown layers\.3\.bias"):
        load_official_ar(state | {"layers.3.bias": torch.empty(1, device="meta")})


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("container", ["model", "module", "state_dict", None])
def test_layouts_and_prefixes(official_state, official_config, prefix, container):
    state = {prefix + name: tensor for name, tensor in official_state("ar_a").items()}
    source = state if container is None else {container: state, "optimizer": {"state": {}}, "steps": 3}
    expected = load_official_ar(official_state("ar_a"), official_config("ar_a")["model"])
    assert model_sha256(load_official_ar(source, official_config("ar_a")["model"])) == model_sha256(expected)


def test_ema_or_raw_weights(official_state, official_config):
    raw, config = official_state("ar_a"), official_config("ar_a")["model"]
    ema = raw | {"norm.weight": raw["norm.weight"] + 1}
    both = {"model": raw, "ema": ema}
    loaded = {w: load_official_ar(both, config, weights=w) for w in ("auto", "raw", "ema")}
    assert {w: model.averaged for w, model in loaded.items()} == {"auto": False, "raw": False, "ema": True}
    assert load_official_ar({"model": raw}, config).averaged is None, "the file does not tell"
    norms = {w: model.norm.weight for w, model in loaded.items()}
    assert torch.equal(norms["raw"], raw["norm.weight"])
    assert torch.equal(norms["ema"], ema["norm.weight"])
    assert torch.equal(norms["auto"], norms["raw"]), "the official AR sampler reads 'model'"
    with pytest.raises(UserError, match="no EMA weights"):
        load_official_ar({"model": raw}, config, weights="ema")
    with pytest.raises(UserError, match=r"no EMA weights: .* the file has model, 7"):
        load_official_ar({"model": raw, 7: 1}, config, weights="ema")
    with pytest.raises(UserError, match="only EMA weights"):
        load_official_ar({"ema": ema}, config, weights="raw")

    raw = official_state("tokenizer_a")
    both = {"model": raw, "ema": raw | {"query_linear.bias": raw["query_linear.bias"].float() + 1}}
    auto = load_official_tokenizer(both, official_config("tokenizer_a"))
    assert torch.equal(auto.encoder.query_proj.bias, both["ema"]["query_linear.bias"]), (
        "the official loader prefers EMA"
    )


def test_official_file_with_its_two_pickled_classes(tokenizer_file, official_state, official_config):
    state = official_state("tokenizer_a")
    path = tokenizer_file(model=state, ema=state | {"quantize.codebook_used": torch.zeros(65536)})
    tokenizer = load_official_tokenizer(path)
    expected = load_official_tokenizer(state, official_config("tokenizer_a"))
    assert model_sha256(tokenizer) == model_sha256(expected)
    assert load_official_tokenizer(path, official_config("tokenizer_a")).config == expected.config
    other = copy.deepcopy(official_config("tokenizer_a"))
    other["model"]["diff_decoder"]["data_std"] = 0.5
    with pytest.raises(UserError, match="differs from the given one"):
        load_official_tokenizer(path, other)


def test_half_precision_files_become_float32(official_state, official_config):
    state = official_state("tokenizer_a")
    halves = {name: tensor.half() for name, tensor in state.items()}
    tokenizer = load_official_tokenizer(halves, official_config("tokenizer_a"))
    assert {p.dtype for p in tokenizer.parameters()} == {torch.float32}


def test_without_repa_head_there_is_a_warning_and_no_head(official_state, official_config):
    state = {name: tensor for name, tensor in official_state("tokenizer_a").items() if "repa_out" not in name}
    with pytest.warns(UserWarning, match="no REPA head"):
        tokenizer = load_official_tokenizer(state, official_config("tokenizer_a"))
    assert tokenizer.config.repa_layer is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("patchify.bias"), r"missing patchify\.bias"),
        (lambda s: s.pop("diff_decoder.net.repa_out.2.bias"), r"missing diff_decoder\.net\.repa_out\.2\.bias"),
        (lambda s: s.update(extra=torch.zeros(2)), "unknown extra"),
        (lambda s: s.update({"patchify.bias": torch.zeros(3)}), r"patchify\.bias is \(3,\), need \(64,\)"),
        (lambda s: s.update({"patchify.bias": "x"}), r"patchify\.bias is a str, not a tensor"),
        (lambda s: s.update({"patchify.bias": torch.zeros(64, dtype=torch.int64)}), r"patchify\.bias is torch\.int64"),
        (lambda s: s.update({"patchify.bias": torch.zeros(64).to_sparse()}), r"patchify\.bias is torch\.sparse_coo"),
        (lambda s: s["patchify.bias"].fill_(torch.nan), r"patchify\.bias holds NaN or infinity"),
        (lambda s: s["patchify.bias"][5].fill_(torch.inf), r"patchify\.bias holds NaN or infinity"),
        (lambda s: s.update({"patchify.bias": torch.zeros(()).expand(10**15)}), r"patchify\.bias is \(10{15},\)"),
    ],
)
def test_tensors_are_refused_by_their_official_name(official_state, official_config, change, message):
    state = official_state("tokenizer_a")
    change(state)
    with pytest.raises(UserError, match=message) as refusal:
        load_official_tokenizer(state, official_config("tokenizer_a"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("model"), "no section 'model'"),
        (lambda c: c["model"].pop("diff_decoder"), "no section 'diff_decoder'"),
        (lambda c: c["model"].pop("vq_dim"), "lacks vq_dim"),
        (lambda c: c["model"].update(surprise=1), "unknown keys: surprise"),
        (lambda c: c["model"].update(vq_enable=False), "vq_enable is False"),
        (lambda c: c["model"].update(vq_dim="8"), "codebook_dim is '8', need int"),
        (lambda c: c["model"]["diff_decoder"].update(cond_dim=32), "cond_dim is 32"),
        (lambda c: c["model"]["diff_decoder"].update(mlp_head=True), "mlp_head is True"),
        (lambda c: c["model"].update(num_query_groups=5, num_denoising_steps=5), "num_groups 5"),
        (lambda c: c["model"].update(num_query_groups=0, num_denoising_steps=0), "num_groups is 0"),
        (lambda c: c["model"].update(num_query_groups="4", num_denoising_steps="4"), "num_groups is '4', need int"),
        (lambda c: c["model"].update(rope_base_len=torch.zeros(2)), "rope_base_len must be plain values"),
        (lambda c: c["model"].update({7: 1, None: 2}), "unknown keys: 7, None"),
    ],
)
def test_configs_are_refused_by_key(official_state, official_config, change, message):
    config = official_config("tokenizer_a")
    change(config)
    with pytest.raises(UserError, match=message):
        load_official_tokenizer(official_state("tokenizer_a"), config)


def test_ar_configs(official_state, official_config):
    state, config = official_state("ar_a"), official_config("ar_a")["model"]
    with pytest.raises(UserError, match="no released size"):
        load_official_ar(state)
    with pytest.raises(UserError, match="unknown keys: surprise"):
        load_official_ar(state, config | {"surprise": 1})
    with pytest.raises(UserError, match="cls_token_num is 2"):
        load_official_ar(state, config | {"cls_token_num": 2})
    with pytest.raises(UserError, match="ffn_hidden is 7"):
        load_official_ar(state, config | {"ffn_hidden": 7})
    with pytest.raises(UserError, match=r"missing layers\.3"):
        load_official_ar(state, config | {"n_layer": 4})
    with pytest.raises(UserError, match="is a list"):
        load_official_ar(state, [1])
    for number in ("99999999", "9" * 5000):
        with pytest.raises(UserError, match=r"unknown layers\.9999"):
            load_official_ar(state | {f"layers.{number}.x": torch.zeros(1)}, config)
    with pytest.raises(UserError, match="depth is 10000, the weights are only"):
        load_official_ar(state | {"layers.9999.x": torch.zeros(1)}, {k: v for k, v in config.items() if k != "n_layer"})
    with pytest.raises(UserError, match="no official AR model"):
        load_official_ar({"x": torch.zeros(1)})
    with pytest.raises(UserError, match="carries no config"):
        load_official_tokenizer(official_state("tokenizer_a"))


def test_more_steps_than_groups_is_said(official_state, official_config):
    config = official_config("tokenizer_a")
    config["model"]["num_denoising_steps"] = 8
    with pytest.warns(UserWarning, match="num_steps=8"):
        load_official_tokenizer(official_state("tokenizer_a"), config)


# ---- our format


@pytest.mark.parametrize("model", tiny_models(), ids=lambda m: type(m).__name__)
def test_round_trip_is_bit_exact(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config == model.config
    assert not again.training
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert model_sha256(again) == model_sha256(model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", CONFIG_NAME, WEIGHTS_NAME]


@pytest.mark.parametrize("model", tiny_models(), ids=lambda m: type(m).__name__)
def test_bfloat16_weights_stay_bfloat16(model, tmp_path):
    model = model.bfloat16()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert model_sha256(again) == model_sha256(model) == model_sha256(model.float())


def test_an_interrupted_save_leaves_a_folder_that_is_refused(tmp_path, monkeypatch):
    tokenizer, _ = tiny_models()
    tokenizer.save_pretrained(tmp_path)
    weights = (tmp_path / WEIGHTS_NAME).read_bytes()
    monkeypatch.setattr("dar_lightning.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="disk full"):
        tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS_NAME).read_bytes() == weights
    assert not list(tmp_path.glob(".*")), "no half-written file is left"
    with pytest.raises(UserError, match=r"config\.json is missing"):
        SequentialDiffusionTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(surprise=1), "has no surprise"),
        (lambda c: c.update(num_tokens="32"), "num_tokens is '32', need int"),
        (lambda c: c.update(low_rank_queries=1), "low_rank_queries is 1, need bool"),
        (lambda c: c.update(group_rounding="floor"), "group_rounding is 'floor'"),
        (lambda c: c.update(num_groups=5), "num_groups 5"),
        (lambda c: c.update(codebook_size=65), r"quantizer\.codebook is \(64, 8\), need \(65, 8\)"),
        (lambda c: c.update(encoder_depth=3), r"missing encoder\.blocks\.2"),
        (lambda c: c.update(encoder_depth=10**9), "encoder_depth is 1000000000, the weights are only"),
        (lambda c: c.update(codebook_size=10**12), r"quantizer\.codebook is \(64, 8\), need \(10{12}, 8\)"),
        (lambda c: c.update(decoder_dim=64 * 10**12), "no SequentialDiffusionTokenizer has these sizes"),
        (lambda c: c.update(codebook_size=10**30), "no SequentialDiffusionTokenizer has these sizes"),
        (lambda c: c.update(data_std=10**400), "too large"),
        (lambda c: c.update(model_type="ARModel"), "model_type is 'ARModel', need 'SequentialDiffusionTokenizer'"),
        (lambda c: c.update(format_version=99), "format_version 99"),
    ],
)
def test_folders_are_refused_by_key(tmp_path, change, message):
    tokenizer, _ = tiny_models()
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    change(config)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        SequentialDiffusionTokenizer.from_pretrained(tmp_path)


def test_an_option_younger_than_the_file_has_its_default(tmp_path):
    tokenizer, _ = tiny_models()
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    del config["latent_norm"]
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    assert SequentialDiffusionTokenizer.from_pretrained(tmp_path).config == tokenizer.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 10**12}, r"token_embedding\.weight is \(64, 64\), need \(10{12}, 64\)"),
        ({"num_tokens": 10**11}, "num_tokens is 10{11}"),
        ({"depth": 10**9}, "depth is 1000000000, the weights are only"),
        ({"dim": 2 * 10**12, "num_heads": 1}, "ARModel"),
    ],
)
def test_sizes_that_no_machine_can_hold(tmp_path, change, message):
    _, ar = tiny_models()
    ar.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        ARModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("model", tiny_models(), ids=lambda m: type(m).__name__)
def test_loading_draws_no_random_number_and_restores_every_buffer(model, tmp_path):
    model.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    buffers = dict(again.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
    assert again.state_dict().keys() == model.state_dict().keys(), "what was not saved is not saved now"
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_a_loaded_model_shares_no_memory_with_its_source(official_state, official_config):
    state, config = official_state("ar_a"), official_config("ar_a")["model"]
    ar = load_official_ar(state, config)
    with torch.no_grad():
        ar.norm.weight += 1
    assert torch.equal(ar.norm.weight, state["norm.weight"] + 1)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", '{"a": 1}', "[" * 100_000])
def test_broken_config(tmp_path, text):
    (tmp_path / CONFIG_NAME).write_text(text)
    with pytest.raises(UserError, match=CONFIG_NAME):
        ARModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["/absent/folder", "./absent", "../absent", "runs/absent", Path("runs") / "absent"])
def test_a_mistyped_path_does_not_ask_the_network(name, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "dar_lightning.formats.pretrained.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub")
    )
    with pytest.raises(UserError, match="no such folder"):
        ARModel.from_pretrained(name)
    (tmp_path / "runs" / "file").touch()
    with pytest.raises(UserError, match=r"need one with config\.json"):
        ARModel.from_pretrained("runs/file")


def test_the_shipped_pipeline_and_its_parts(tmp_path, monkeypatch):
    tokenizer, _ = tiny_models()
    ar = ARModel(ARConfig.preset("tiny", num_classes=2))
    DARPipeline(tokenizer, ar, classes=("apple", "pear")).save_pretrained(tmp_path / "shipped" / "fruit64")
    monkeypatch.setattr("dar_lightning.formats.pretrained.SHIPPED", tmp_path / "shipped")
    assert model_sha256(SequentialDiffusionTokenizer.from_pretrained("fruit64")) == model_sha256(tokenizer)
    assert model_sha256(ARModel.from_pretrained("fruit64")) == model_sha256(ar)
    assert DARPipeline.from_pretrained("fruit64").classes == ("apple", "pear")


@pytest.mark.parametrize("name", ["absent/folder", "a/b/c"])
def test_neither_folder_nor_repository(name):
    with pytest.raises(UserError, match="is not a folder") as refusal:
        ARModel.from_pretrained(name)
    assert "\n" not in str(refusal.value)


def test_a_deep_copy_is_independent():
    """EMA callbacks copy the model."""
    tokenizer, _ = tiny_models()
    twin = copy.deepcopy(tokenizer)
    with torch.no_grad():
        twin.decoder.conv_in.bias += 1
    assert not torch.equal(twin.decoder.conv_in.bias, tokenizer.decoder.conv_in.bias)


def test_a_pipeline_folder_holds_both_parts_and_the_class_names(tmp_path):
    tokenizer, _ = tiny_models()
    ar = ARModel(ARConfig.preset("tiny", num_classes=2))
    pipeline = DARPipeline(tokenizer, ar, classes=("apple", "Birne"))
    pipeline.save_pretrained(tmp_path)
    again = DARPipeline.from_pretrained(tmp_path)
    assert again.classes == ("apple", "Birne")
    assert model_sha256(again.tokenizer) == model_sha256(tokenizer)
    assert model_sha256(again.ar) == model_sha256(ar)
    (tmp_path / "ar" / WEIGHTS_NAME).unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        DARPipeline.from_pretrained(tmp_path)


# ---- dar convert


def test_convert_an_official_tokenizer(tokenizer_file, official_state, tmp_path, capsys):
    path = tokenizer_file(ema=official_state("tokenizer_a"))
    convert(path, tmp_path / "out")
    again = SequentialDiffusionTokenizer.from_pretrained(tmp_path / "out")
    assert model_sha256(again) == model_sha256(load_official_tokenizer(path))
    assert model_sha256(again)[:12] in capsys.readouterr().out


@NO_REPA
@pytest.mark.parametrize("name", ["tokenizer_b", "ar_b"])
def test_convert_with_a_config_file(name, official_config, tmp_path):
    config = official_config(name)
    config = config if name == "tokenizer_b" else config["model"]
    (tmp_path / "official.yaml").write_text(json.dumps(config))  # JSON is YAML
    source = Path(__file__).parents[1] / "goldens" / name / "state_dict.safetensors"
    convert(source, tmp_path / "out", official_config=tmp_path / "official.yaml")
    assert (tmp_path / "out" / CONFIG_NAME).is_file()


def test_convert_refuses_what_is_neither(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="neither an official tokenizer nor"):
        convert(tmp_path / "x.safetensors", tmp_path / "out")
    with pytest.raises(UserError, match="is missing"):
        convert(tmp_path / "absent.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
