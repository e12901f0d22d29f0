"""The section of docs/elsewhere.md on transformers, run as it stands there."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from dar_lightning import ARModel, DARPipeline
from dar_lightning.ar.sampling import generate
from dar_lightning.cli import main

PAGE = (Path(__file__).parents[1] / "docs/elsewhere.md").read_text()
SECTION = re.split(r"(?m)^##+ ", PAGE.split("## In transformers\n")[1])[0]


def test_drawing_with_transformers_and_decoding_here(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    names, found = {}, []
    for language, text in re.findall(r"```(bash|python)\n(.*?)```", SECTION, flags=re.DOTALL):
        if language == "bash":
            main(shlex.split(text, comments=True)[1:])
        else:
            exec(text, names)
            found.append((names["codes"], names.get("images")))
    alone, decoded, guided = found
    assert alone[0].shape == (2, 64)
    assert alone[0].max() < 1024
    assert decoded[1].shape == (2, 3, 64, 64)
    pipe = DARPipeline.from_pretrained("fruit64").to(torch.float32)
    labels = torch.tensor([pipe.label("Orange"), pipe.label("Watermelon")])
    ours = generate(pipe.ar, labels, guidance=(1.1, 3.0), generator=torch.Generator().manual_seed(0))
    assert torch.equal(guided[0], ours)
    assert guided[1].shape == (2, 3, 64, 64)

    with torch.no_grad():
        labels, codes = torch.arange(15)[:, None], ours[:1].expand(15, -1)
        expected = pipe.ar(labels[:, 0], codes)
        logits = names["llama"](input_ids=torch.cat([1024 + labels, codes[:, :-1]], dim=1)).logits[..., :1024]
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max(), "the page says so"
    weights = ARModel.from_pretrained("fruit64").state_dict()
    again = ARModel.from_pretrained("runs/fruit64_ar").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
