"""Every quantizer under a Trainer: curves by the losses' names, codebook use, frozen tokens, CodebookWarmup."""

import pytest
import torch
from tiny_models import SIZE
from tiny_training import image_data, scalars, tokenizer_module, trainer

from dar_lightning.errors import UserError
from dar_lightning.tokenizer.quantizers import QUANTIZERS
from dar_lightning.training import TokenizerModule
from dar_lightning.training.callbacks import CodebookMonitor, CodebookWarmup, GroupLoss
from dar_lightning.training.flops import step_flops

OPTIONS = {"fsq": {"levels": [4, 2, 2, 2]}, "lfq": {"commit_weight": 0.25}, "bsq": {"commit_weight": 0.25}}
BITS = {"lfq": {"codebook_dim": 5}, "bsq": {"codebook_dim": 5}}


def config_of(name: str) -> dict:
    return {"quantizer": name, "quantizer_options": OPTIONS.get(name, {})} | BITS.get(name, {})


@pytest.mark.parametrize("name", [name for name in QUANTIZERS.classes if "." not in name])
def test_curves_use_and_frozen_tokens(name, images, tmp_path):
    module = tokenizer_module(config_of(name))
    if name == "vq":
        CodebookWarmup(warmup_steps=100).setup(None, module, "fit")
    else:
        with pytest.raises(
            UserError, match=f"CodebookWarmup: quantizer is '{name}', and it moves the codes of vq alone"
        ):
            CodebookWarmup(warmup_steps=100).setup(None, module, "fit")
    fit = trainer(
        CodebookMonitor(), GroupLoss(1), folder=tmp_path, max_steps=2, limit_val_batches=1, val_check_interval=2
    )
    fit.fit(module, datamodule=image_data(images))
    curves = scalars(tmp_path)
    names = module.tokenizer.training_losses(torch.zeros(1, 3, SIZE, SIZE))["quantizer"]
    parts = [curves[f"train/{part}"][1] for part in ("flow", *names)]
    assert curves["train/loss"][1] == pytest.approx(sum(parts), rel=1e-4)
    assert {f"val/{part}" for part in names} | {
        "codebook/use",
        "codebook/perplexity",
        "val/codebook_use",
    } <= curves.keys()
    assert 1 <= curves["codebook/perplexity"][1] <= 32

    module.tokenizer.save_pretrained(tmp_path / "weights")
    frozen = TokenizerModule(module.tokenizer.config, init_from=str(tmp_path / "weights"), freeze_encoder=True)
    before = {key: value.clone() for key, value in frozen.tokenizer.state_dict().items()}
    trainer(max_steps=2, limit_val_batches=0).fit(frozen.train(), datamodule=image_data(images))
    after = frozen.tokenizer.state_dict()
    moved = {key.partition(".")[0] for key, value in before.items() if not torch.equal(value, after[key])}
    assert moved == {"conditioner", "decoder"}
    assert not frozen.tokenizer.quantizer.training


def test_frozen_tokens_need_the_options_that_made_them(tmp_path):
    module = tokenizer_module(config_of("fsq"))
    module.tokenizer.save_pretrained(tmp_path)
    other = tokenizer_module(config_of("fsq") | {"quantizer_options": {"levels": [2, 2, 2, 4]}}).tokenizer.config
    with pytest.raises(UserError, match=r"config\.quantizer_options is .*2, 4\].*other tokens"):
        TokenizerModule(other, init_from=str(tmp_path), freeze_encoder=True)


def flops_while_other_ranks_wait(name: str) -> int:
    """Both ranks are in a group, and only this one counts."""
    batch = {"image": torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)}
    return step_flops(tokenizer_module(config_of(name)), batch) if torch.distributed.get_rank() == 0 else 0


def test_flops_are_counted_on_one_rank_alone(two_ranks):
    found, _ = two_ranks(flops_while_other_ranks_wait, "lfq")
    assert found > 0
