"""Every initial weight against the official models': rule, spread and bounds."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from refusals import refusal, refused
from tiny_models import TOKENIZER, fit_tokenizer

from dar_lightning import ARConfig, ARModel, SequentialDiffusionTokenizer, TokenizerConfig
from dar_lightning.tokenizer.init import TokenizerInit
from dar_lightning.weights.official import AR_NAMES, TOKENIZER_NAMES, official_name

GOLDENS = Path(__file__).parent / "goldens" / "init"
# Of the full widths, which decide every rule, and of two blocks each.
SHALLOW = dict(encoder_depth=2, conditioner_depth=2, decoder_depth=2, repa_layer=1)
LIGHT = TokenizerConfig.preset("light").to_dict() | {"low_rank_queries": False}
MODELS = {
    "tokenizer_v1": lambda: SequentialDiffusionTokenizer(TokenizerConfig(**SHALLOW)),
    "tokenizer_light_fullrank": lambda: SequentialDiffusionTokenizer(TokenizerConfig(**LIGHT | SHALLOW)),
    "GPT-B": lambda: ARModel(ARConfig.preset("B", depth=2)),
}


def check(name: str, values: torch.Tensor, golden: dict, rule: dict) -> None:
    """One tensor against its rule, within five standard errors."""
    assert values.numel() == math.prod(golden["shape"]), name  # a 1x1 convolution there is a linear layer here
    if golden["rule"] in ("zeros", "ones"):
        assert (values == rule["mean"]).all(), name
        return
    n, std = values.numel(), golden["std"]
    bound = golden.get("b", rule.get("bound", 10 * std))  # nothing of 300 million normals is 10 spreads away
    assert max(map(abs, torch.stack(values.aminmax()).tolist())) <= bound * (1 + 1e-6), name
    if golden["rule"] == "codebook":
        assert torch.allclose(values.norm(dim=1), torch.ones(len(values))), name
    squares, kurtosis = values.square(), rule.get("kurtosis", 3)  # the means are far below the spreads
    mean, spread = values.mean().item(), squares.mean().sqrt().item()
    assert abs(mean) < 5 * std / math.sqrt(n), name
    assert abs(spread / std - 1) < 5 * math.sqrt((kurtosis - 1) / (4 * n)), name
    if n > 2000 and "kurtosis" in rule:
        assert abs(squares.square_().mean().item() / spread**4 - kurtosis) < 0.3, name


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_starts_as_the_official_one(name):
    golden = json.loads((GOLDENS / f"{name}.json").read_text())
    rules = {word: rule for word, rule in golden["rules"].items() if word != "buffer_zeros"}
    expected = {word: entry for word, entry in golden["parameters"].items() if entry["rule"] in rules}
    torch.manual_seed(0)
    names = AR_NAMES if name.startswith("GPT") else TOKENIZER_NAMES
    found = {official_name(ours, names): weight.detach() for ours, weight in MODELS[name]().named_parameters()}
    kept = {word for word in expected if not re.search(r"(layers|blocks)\.([2-9]|\d\d)\.", word)}
    assert found.keys() == kept
    for word in kept:
        check(word, found[word], expected[word], rules[expected[word]["rule"]])


def test_tokens_make_up_nearly_all_of_a_fresh_conditioning():
    """Of the conditioner's variance; a position table of N(0, 1) would leave them 4%."""
    torch.manual_seed(0)
    shallow = TokenizerConfig(encoder_depth=1, conditioner_depth=1, decoder_depth=1, repa_layer=None)  # of v1's widths
    conditioner = SequentialDiffusionTokenizer(shallow).conditioner
    codes = torch.nn.functional.normalize(torch.randn(4096, 8), dim=-1)
    token, place = conditioner.from_latent(codes).var(), conditioner.positions.weight.var()
    assert token / (token + place) > 0.98


def test_what_differs_from_the_official_start():
    starts = []
    for init in (TokenizerInit(), TokenizerInit(modulation_std=0.3)):
        torch.manual_seed(0)
        starts.append(SequentialDiffusionTokenizer(TokenizerConfig(**TOKENIZER), init).state_dict())
    official, changed = starts
    name = "decoder.blocks.0.modulation.weight"
    assert {each for each in changed if not torch.equal(changed[each], official[each])} == {name}
    assert abs(changed[name].std() / 0.3 - 1) < 0.1
    for value in (math.nan, math.inf, -0.1):
        refused(r"^init.modulation_std is [^\n]*$", TokenizerInit, value)


def test_old_names_of_the_start_are_read_and_left_out(tmp_path):
    """Files of version 0.1 kept the start among the hyperparameters."""
    SequentialDiffusionTokenizer(TokenizerConfig(**TOKENIZER)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    old = {"gate_init": 1.0, "modulation_init_std": 0.2, "position_init_std": 0.05, "input_init_scale": 0.02}
    path.write_text(json.dumps(json.loads(path.read_text()) | old))
    assert SequentialDiffusionTokenizer.from_pretrained(tmp_path).config == TokenizerConfig(**TOKENIZER)


@pytest.mark.parametrize("road", ["yaml", "json", "option"])
def test_old_names_of_the_start_in_a_training_config_are_told_their_new_place(road, tmp_path, capsys):
    words = fit_tokenizer("nowhere", "nowhere", tmp_path / "run", max_steps=1)
    for old, instead in TokenizerConfig.REMOVED.items():
        (tmp_path / "old.yaml").write_text(f"model:\n  init_args:\n    config:\n      {old}: 0.5\n")
        given = {
            "yaml": f"--config={tmp_path / 'old.yaml'}",
            "json": f"--model.init_args.config={json.dumps(TOKENIZER | {old: 0.5})}",
            "option": f"--model.init_args.config.{old}=0.5",
        }
        said = f"dar fit: model.init_args.config.{old} is {instead}"
        assert refusal(capsys, [*words, given[road]]) == said
