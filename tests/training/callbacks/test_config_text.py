"""The config in TensorBoard's file is the one that the run used, with defaults, layers and options resolved."""

import yaml
from runs import events
from tiny_models import TOKENIZER, fit_tokenizer

from dar_lightning.cli import main


def test_the_config_is_text_beside_the_curves(images, tmp_path):
    (tmp_path / "layer.yaml").write_text("model:\n  init_args:\n    optimizer:\n      lr: 0.0123\n")
    command = fit_tokenizer(*images, tmp_path / "run", max_steps=1, limit_val_batches=0)
    main([str(word) for word in [*command, f"--config={tmp_path / 'layer.yaml'}"]])
    (event,) = events(tmp_path / "run").Tensors("config/text_summary")
    lines = event.tensor_proto.string_val[0].decode().splitlines()
    assert all(line.startswith("    ") for line in lines), "Markdown shows such lines as they are"
    found = yaml.safe_load("\n".join(line[4:] for line in lines))
    assert found == yaml.safe_load((tmp_path / "run" / "logs" / "config.yaml").read_text())
    assert found["model"]["init_args"]["optimizer"]["lr"] == 0.0123
    assert found["model"]["init_args"]["config"].items() >= TOKENIZER.items()
    assert found["model"]["init_args"]["freeze_encoder"] is False

    before = (tmp_path / "run" / "logs" / "config.yaml").read_bytes()
    main([str(word) for word in ["validate", *command[1:], "--ckpt_path=null", "--trainer.limit_val_batches=1"]])
    after = (tmp_path / "run" / "logs" / "config.yaml").read_bytes()
    assert after == before, "what only reads a run leaves its config alone"
