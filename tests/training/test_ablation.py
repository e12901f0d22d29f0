"""AblationModule: the paper's training step under other orders, measured by place, and what it exports."""

import json
import math

import pytest
import torch
from refusals import refused
from tiny_models import AR, CODES, GROUPS, TOKENS, random_codes, write_tokens
from tiny_training import STILL, ar_module, token_data, trainer

from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.order import fixed_order, placed
from dar_lightning.data.codes import CodesDataModule
from dar_lightning.errors import UserError
from dar_lightning.training import AblationModule, ARModule
from dar_lightning.training.callbacks import GenerationFID, Throughput
from dar_lightning.weights.lightning import load_lightning_checkpoint

BATCH = {"codes": torch.from_numpy(random_codes(4)), "label": torch.arange(4), "valid": torch.ones(4, dtype=bool)}


def make_module(**changes) -> AblationModule:
    module = ar_module({"order_groups": GROUPS} | STILL | changes, AblationModule)
    module.log = module.log_dict = lambda *args, **options: None
    return module


@pytest.mark.parametrize("order", ["coarse_to_fine", "random"])
def test_a_step_is_the_plain_one_on_permuted_tokens(order):
    module, plain = make_module(order=order), make_module()
    places = fixed_order(order, TOKENS, GROUPS, seed=0)
    outputs = module.training_step(BATCH, 0)
    wanted = plain.training_step(BATCH | {"codes": BATCH["codes"][:, places]}, 0)
    assert outputs["loss"] == wanted["loss"]
    assert torch.equal(outputs["token_loss"][:, places], wanted["token_loss"]), "each loss at its token's place"


def test_validation_by_place():
    module = make_module(order="random_per_sample").eval()
    outputs = module.validation_step(BATCH, 3)
    order = outputs["order"]
    codes = BATCH["codes"].gather(1, order)
    p = module.ar(BATCH["label"], codes, order).double().softmax(dim=-1)
    entropy = torch.distributions.Categorical(probs=p).entropy()
    assert torch.allclose(outputs["token_loss"].double(), placed(-p.gather(2, codes[..., None])[..., 0].log(), order))
    assert torch.allclose(outputs["entropy"].double(), placed(entropy, order), atol=1e-5)
    assert torch.equal(order, module.validation_step(BATCH, 3)["order"]), "every validation has the same orders"
    assert not torch.equal(order, module.validation_step(BATCH, 4)["order"])
    padded = BATCH | {"valid": torch.tensor([True, False, True, False])}
    assert torch.equal(module.validation_step(padded, 3)["hit"], outputs["hit"][[0, 2]])
    assert module.validation_step(BATCH | {"valid": torch.zeros(4, dtype=bool)}, 3) is None


@pytest.mark.parametrize(
    "changes", [{"order": "reversed"}, {"order": "random_per_sample", "num_tokens": 4, "order_groups": 2}]
)
def test_a_run_logs_groups_and_its_own_distance(changes, images, tokens, tokenizer_folder, tmp_path):
    fid = GenerationFID(tokenizer_folder, images[1], num_samples=8, features="color_edges")
    module = AblationModule(ARConfig(**AR | {"order_groups": GROUPS} | changes))
    groups = module.ar.config.order_groups
    fit = trainer(fid, Throughput(peak_tflops=1.0), folder=tmp_path, max_steps=2, val_check_interval=2)
    fit.fit(module, token_data(tokens))
    logged = {name: value.item() for name, value in fit.callback_metrics.items()}
    for name in ("groups/val_accuracy", "groups/val_entropy", "groups/train_loss"):
        assert {key for key in logged if key.startswith(f"{name}_")} == {f"{name}_{k}" for k in range(groups)}
    by_group, by_writing = ([logged[f"{name}/val_loss_{k}"] for k in range(groups)] for name in ("groups", "written"))
    assert sum(by_group) / groups == pytest.approx(logged["val/loss"], rel=1e-5)
    assert sum(by_writing) == pytest.approx(sum(by_group), rel=1e-5)
    if changes["order"] == "reversed":
        assert by_writing == pytest.approx(by_group[::-1])
    assert 0 < logged["val/entropy"] <= math.log(CODES) + 1e-6
    (written,) = (tmp_path / "evaluation").glob("*0000002.json")
    distance = json.loads(written.read_text())["metrics"]["gFD-color_edges"]
    assert distance == pytest.approx(logged["val/gFD-color_edges"])

    fit.save_checkpoint(tmp_path / "last.ckpt")
    exported = load_lightning_checkpoint(tmp_path / "last.ckpt")
    assert exported.config == module.ar.config
    codes = BATCH["codes"][:, : exported.config.num_tokens]
    order = exported.draw_order(4, torch.Generator().manual_seed(0))
    given = (BATCH["label"], codes, order)
    assert torch.equal(exported(*given), module.ar.eval()(*given))


def test_what_does_not_fit_is_said(tmp_path):
    """The first tokens must be whole groups of the data, where it says which."""
    refused(
        "ARModule trains coarse_to_fine, .*AblationModule the others",
        lambda: ARModule(ARConfig(**AR | {"order": "reversed"})),
    )
    data = CodesDataModule(write_tokens(tmp_path / "tokens", 4), batch_size=4)
    refused(
        "num_tokens is 16 in the config: the data has 8 per image", lambda: make_module(num_tokens=16).check_data(data)
    )
    with pytest.raises(UserError, match="num_tokens is 4 in the config: the data has 8 per image"):
        ARModule(ARConfig(**AR | {"num_tokens": 4})).check_data(data)
    make_module(num_tokens=TOKENS // 2).check_data(data)

    index = tmp_path / "tokens" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"tokenizer_config": {"num_groups": GROUPS}}))
    data = CodesDataModule(str(tmp_path / "tokens"), batch_size=4)
    make_module(num_tokens=TOKENS // 2, order_groups=GROUPS // 2).check_data(data)
    make_module(order_groups=2 * GROUPS).check_data(data)
    with pytest.raises(UserError, match=r"order_groups is 4 in the config: num_tokens 4 must be .* of the 2 tokens"):
        make_module(num_tokens=TOKENS // 2).check_data(data)
