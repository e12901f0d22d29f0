"""Our folders there and back, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from refusals import refused
from tiny_models import make_ar, make_tokenizer

from dar_lightning import ARModel, SequentialDiffusionTokenizer
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.formats.pretrained import CONFIG_NAME, WEIGHTS_NAME

CLASSES = {"tokenizer": SequentialDiffusionTokenizer, "ar": ARModel}


def edited(folder: Path, pipeline: str, part: str, **changes) -> Path:
    """A copy of a saved model, its config changed; None takes a value away."""
    config = json.loads((Path(pipeline) / part / CONFIG_NAME).read_text()) | changes
    config = {name: value for name, value in config.items() if name not in changes or value is not None}
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    (folder / WEIGHTS_NAME).symlink_to(Path(pipeline) / part / WEIGHTS_NAME)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [make_tokenizer, make_ar])
def test_round_trip_is_bit_exact(make, dtype, tmp_path):
    model = make().to(dtype)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG_NAME, WEIGHTS_NAME]
    state = torch.get_rng_state()
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state), "loading draws no random number"
    assert again.config == model.config
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    buffers = dict(again.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
    assert all(p.requires_grad and p.dtype == dtype for p in again.parameters())
    assert model_sha256(again) == model_sha256(model) == model_sha256(model.float())


def test_an_interrupted_save_leaves_a_folder_that_is_refused(tmp_path, monkeypatch):
    ar = make_ar()
    ar.save_pretrained(tmp_path)
    weights = (tmp_path / WEIGHTS_NAME).read_bytes()
    monkeypatch.setattr("dar_lightning.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    refused("disk full", ar.save_pretrained, tmp_path)
    assert (tmp_path / WEIGHTS_NAME).read_bytes() == weights
    assert not list(tmp_path.glob(".*")), "no half-written file is left"
    refused(r"config\.json is missing", ARModel.from_pretrained, tmp_path)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("tokenizer", {"surprise": 1}, "has no surprise"),
        ("tokenizer", {"num_tokens": "32"}, "num_tokens is '32', need int"),
        ("tokenizer", {"low_rank_queries": 1}, "low_rank_queries is 1, need bool"),
        ("tokenizer", {"repa_layer": True}, r"repa_layer is True, need int \| None"),
        ("tokenizer", {"group_rounding": "floor"}, "group_rounding is 'floor'"),
        ("tokenizer", {"num_groups": 5}, "num_groups 5"),
        ("tokenizer", {"encoder_depth": 3}, r"missing encoder\.blocks\.1"),
        ("tokenizer", {"encoder_depth": 10**9}, "encoder_depth is 1000000000: must be at least 1, at most 100000"),
        ("tokenizer", {"codebook_size": 10**12}, r"quantizer\.codebook is \(32, 4\), need \(10{12}, 4\)"),
        ("tokenizer", {"decoder_dim": 64 * 10**12}, "no SequentialDiffusionTokenizer has these sizes"),
        ("tokenizer", {"codebook_size": 10**30}, "no SequentialDiffusionTokenizer has these sizes"),
        ("tokenizer", {"data_std": 10**400}, "too large"),
        ("tokenizer", {"model_type": "ARModel"}, "model_type is 'ARModel', need 'SequentialDiffusionTokenizer'"),
        ("tokenizer", {"format_version": 99}, "format_version is 99, need 1"),
        ("tokenizer", {"ema": "yes"}, "ema is 'yes', need true or false"),
        ("ar", {"num_tokens": 10**11}, "num_tokens is 10{11}"),
        ("ar", {"dim": 2 * 10**12, "num_heads": 1}, "ARModel"),
    ],
)
def test_configs_are_refused_by_key(pipeline, tmp_path, part, changes, message):
    refused(message, lambda: CLASSES[part].from_pretrained(edited(tmp_path, pipeline, part, **changes)))


def test_folders_that_lack_something(pipeline, tmp_path):
    """An option younger than the file has its default; weights are needed, and a config that can be read."""
    folder = edited(tmp_path, pipeline, "tokenizer", latent_norm=None)
    assert SequentialDiffusionTokenizer.from_pretrained(folder).config == make_tokenizer().config
    (folder / WEIGHTS_NAME).unlink()
    refused(r"model\.safetensors is missing", SequentialDiffusionTokenizer.from_pretrained, folder)
    for text in ("", "{", "[]", "\x00", '{"a": 1}', "[" * 100_000):
        (folder / CONFIG_NAME).write_text(text)
        refused(CONFIG_NAME, ARModel.from_pretrained, folder)


def test_a_model_beside_a_folder_that_is_called_as_a_pipelines_part(tmp_path):
    make_ar(seed=1).save_pretrained(tmp_path)
    make_ar(seed=2).save_pretrained(tmp_path / "ar")
    assert model_sha256(ARModel.from_pretrained(tmp_path)) == model_sha256(make_ar(seed=1))


@pytest.mark.parametrize("start", ["meta", "cpu"])
def test_tables_that_are_not_saved_are_filled_by_to_empty(start):
    several = make_ar(tokens_per_pass=2, sequential_tokens=2, order="interleaved", order_groups=4)
    for fresh in (several, make_ar(order="reversed")):
        with torch.device(start):
            again = ARModel(fresh.config).bfloat16().to_empty(device="cpu")
        found = {name: again.get_buffer(name) for name in fresh.tables()}
        assert found.keys() == {"rotary", "order"} | ({"read_by", "last_seen"} if fresh is several else set())
        for name, table in found.items():
            assert torch.equal(table, fresh.get_buffer(name)), name
            assert table.dtype == fresh.get_buffer(name).dtype


def test_a_mistyped_path_does_not_ask_the_network(tmp_path, monkeypatch):
    """What could be a name is asked for, and refused in one line."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("absent/folder", "a/b/c"):
        refused(r"^.* is not a folder, .*$", ARModel.from_pretrained, name)
    download = "dar_lightning.formats.pretrained.snapshot_download"
    monkeypatch.setattr(download, lambda *_, **__: pytest.fail("asked the Hub"))
    for name in ("/absent/folder", "./absent", "../absent", "runs/absent", Path("runs") / "absent"):
        refused("no such folder", ARModel.from_pretrained, name)
    refused(r"need one with config\.json", ARModel.from_pretrained, "runs/file")


def test_it_sees_weights_config_and_class():
    tokenizer, ar = make_tokenizer(), make_ar()
    hashes = [model_sha256(tokenizer), model_sha256(ar)]
    with torch.no_grad():
        ar.norm.weight[3] += 1e-6
    config = tokenizer.config
    tokenizer.config = dataclasses.replace(config, time_shift=1.0)
    hashes += [model_sha256(tokenizer), model_sha256(ar)]
    assert len(set(hashes)) == 4
    tokenizer.config = dataclasses.replace(config, time_shift=2)
    assert model_sha256(tokenizer) == hashes[0], "2 and 2.0 are one value"


def test_it_does_not_see_what_only_training_reads():
    tokenizer, ar = make_tokenizer(), make_ar()
    hashes = model_sha256(tokenizer), model_sha256(ar)
    tokenizer.config = dataclasses.replace(tokenizer.config, repa_layer=0)
    tokenizer.decoder.repa_head = torch.nn.Linear(2, 2)
    ar.config = dataclasses.replace(ar.config, class_dropout=0.5, ffn_dropout=0.0)
    assert (model_sha256(tokenizer), model_sha256(ar)) == hashes
    # Nor an option that a later version adds, off by default.
    later = dataclasses.make_dataclass("Later", [("option", str, "off")], bases=(type(ar.config),), frozen=True)
    ar.config = later(**ar.config.to_dict())
    assert model_sha256(ar) == hashes[1]
    ar.config = dataclasses.replace(ar.config, option="on")
    assert model_sha256(ar) != hashes[1]
