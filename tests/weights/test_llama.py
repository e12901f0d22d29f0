"""The AR model as a folder of transformers: what is written, that it comes back bit for bit, and what is refused.

test_transformers.py compares what the two compute.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from refusals import refusal, refused
from safetensors.torch import load_file, save_file
from tiny_models import CLASSES, CODES, TOKENS, make_ar

from dar_lightning import ARModel
from dar_lightning.cli import main
from dar_lightning.errors import UserError
from dar_lightning.weights import load_llama, save_llama

IDS = CODES + len(CLASSES) + 1
LAYER = "model.layers.1.self_attn"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder that tests copy, not to be written to."""
    folder = tmp_path_factory.mktemp("llama")
    save_llama(make_ar(), folder, CLASSES)
    return folder


def test_what_is_written(written):
    """The ids of classes come after the codes; what a Llama has by default would end pictures or draw classes."""
    ar, tensors = make_ar(), load_file(written / "model.safetensors")
    table, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    assert torch.equal(table[CODES + 3], ar.class_embedding.weight[3])
    assert torch.equal(table[-1], ar.class_embedding.weight[ar.null_class])
    assert torch.equal(head[:CODES], ar.head.weight)
    assert head[CODES:].shape == (5, 32)
    assert not head[CODES:].any()
    config = json.loads((written / "config.json").read_text())
    named = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "dtype")}
    assert named == dict(bos_token_id=None, eos_token_id=None, pad_token_id=None, vocab_size=IDS, dtype="float32")
    assert config["dar_lightning"]["classes"] == list(CLASSES)
    drawing = json.loads((written / "generation_config.json").read_text())
    assert drawing["suppress_tokens"] == list(range(CODES, IDS))
    assert (drawing["max_length"], drawing["top_k"], drawing["eos_token_id"]) == (1 + TOKENS, 0, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, dict(num_heads=4, num_kv_heads=2, order="reversed", rope_base=500.0)])
def test_it_comes_back_bit_for_bit(changes, dtype, tmp_path):
    ar = make_ar(**changes).to(dtype)
    ar.averaged = True
    save_llama(ar, tmp_path)
    again = load_llama(tmp_path)
    assert (again.config, again.averaged, again.training) == (ar.config, True, False)
    expected = ar.state_dict()
    assert list(again.state_dict()) == list(expected)
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name


def test_the_commands(pipeline, tmp_path, capsys):
    main(["export", f"--pipeline={pipeline}", "--format=transformers", f"--output={tmp_path}/llama"])
    about = json.loads((tmp_path / "llama/config.json").read_text())["dar_lightning"]
    assert about["classes"] == list(CLASSES)
    assert json.loads((tmp_path / "llama/export.json").read_text()) == {"pipeline": pipeline, "ema": None}
    main(["convert", f"--input={tmp_path}/llama", f"--output={tmp_path}/ours"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.split("SHA-256 ")[1] == second.split("SHA-256 ")[1]
    expected = ARModel.from_pretrained(f"{pipeline}/ar").state_dict()
    found = ARModel.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format=transformers"], "ckpt, pipeline: format 'transformers' needs one of the two"),
        (["--format=transformers", "--pipeline=P", "--ckpt=x.ckpt"], "ckpt, pipeline: .* one of the two"),
        (["--format=transformers", "--pipeline=P", "--tokenizer=T"], "tokenizer is 'T': .* leave it out"),
        (["--format=transformers", "--pipeline=P", "--weights=ema"], "weights is 'ema': .* leave it out"),
        (["--format=transformers", "--pipeline=P", "--shards=S"], "shards is 'S': .* leave it out"),
        (["--pipeline=P"], "pipeline is '.*', which is in format 'dar' already"),
        ([], "ckpt is missing"),
    ],
)
def test_options_of_export_that_do_not_fit(options, message, pipeline, tmp_path, capsys):
    options = [f"--pipeline={pipeline}" if option == "--pipeline=P" else option for option in options]
    assert re.search(message, refusal(capsys, ["export", *options, f"--output={tmp_path}/out"]))
    assert not (tmp_path / "out").exists()


def test_models_that_are_no_llama(tmp_path):
    refused(
        "tokens_per_pass is 2: a Llama predicts one token a pass",
        lambda: save_llama(make_ar(tokens_per_pass=2), tmp_path / "out"),
    )
    with pytest.raises(UserError, match="order is 'random_per_sample': a Llama is not told"):
        save_llama(make_ar(order="random_per_sample"), tmp_path / "out")
    with pytest.raises(UserError, match=r"^2 class names for an AR model of 4 classes$"):
        save_llama(make_ar(), tmp_path / "out", ("cat", "dog"))
    (tmp_path / "file").write_text("")
    refused("cannot write", lambda: save_llama(make_ar(), tmp_path / "file"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, tensors: config.pop("dar_lightning"), "has no section 'dar_lightning': need a folder of dar"),
        (lambda config, tensors: config.update(rms_norm_eps=1e-6), "rms_norm_eps is 1e-06, its AR model needs 1e-05"),
        (lambda config, tensors: config.pop("rms_norm_eps"), "rms_norm_eps is 1e-06"),
        (lambda config, tensors: config.update(tie_word_embeddings=True), "tie_word_embeddings is True"),
        (lambda config, tensors: config.update(model_type="qwen3"), "model_type is 'qwen3', .* needs 'llama'"),
        (lambda config, tensors: config["rope_parameters"].update(rope_theta=5e5), "rope_parameters is {.*500000.0"),
        (lambda config, tensors: config["rope_parameters"].update(rope_type="linear", factor=2), "'linear'"),
        (lambda config, tensors: config["dar_lightning"].update(format_version=9), "format_version is 9, need 1"),
        (lambda config, tensors: config["dar_lightning"].update(ema="yes"), "ema is 'yes'"),
        (lambda config, tensors: config["dar_lightning"]["config"].update(depth=10**9), "depth is 1000000000"),
        (lambda config, tensors: config["dar_lightning"]["config"].update(widht=1), "ARConfig has no widht"),
        (lambda config, tensors: tensors.pop(f"{LAYER}.q_proj.weight"), f"missing {LAYER}.q_proj.weight"),
        (lambda config, tensors: tensors.update(x=torch.zeros(1)), "unknown x"),
        (lambda config, tensors: tensors.update({"lm_head.weight": torch.zeros(3, 32)}), r"is \(3, 32\), need \(37,"),
        (lambda config, tensors: tensors["model.norm.weight"].fill_(torch.nan), "norm.weight holds NaN"),
    ],
)
def test_folders_that_are_not_ours(change, message, written, tmp_path):
    config, tensors = json.loads((written / "config.json").read_text()), load_file(written / "model.safetensors")
    change(config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    refused(message, load_llama, tmp_path)


def test_transformers_4_says_rope_in_other_words(written, tmp_path):
    config = json.loads((written / "config.json").read_text())
    config |= {"rope_scaling": None, "rope_theta": 10000.0}
    del config["rope_parameters"], config["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((written / "model.safetensors").read_bytes())
    assert torch.equal(load_llama(tmp_path).head.weight, make_ar().head.weight)


def test_an_index_names_files_beside_it(written, tmp_path):
    """An index from elsewhere does not lead out of the folder, and a broken one gets a line."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/config.json").write_bytes((written / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((written / "model.safetensors").read_bytes())
    elsewhere = {"x": "../model.safetensors"}
    for weight_map, message in ((elsewhere, "llama/model.safetensors is missing"), ([], "weight_map must name")):
        (tmp_path / "llama/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        refused(message, load_llama, tmp_path / "llama")


def test_a_folder_takes_no_options_of_official_files(written, tmp_path, capsys):
    for option, value in (("part", "tokenizer"), ("weights", "raw"), ("official_config", "x.yaml")):
        words = ["convert", f"--input={written}", f"--output={tmp_path}/out", f"--{option}={value}"]
        assert f"{option} is '{value}', which is for an official file" in refusal(capsys, words)
