"""The model card that `dar export` writes: what it says of a pipeline, and the shipped one."""

import re
from pathlib import Path

import pytest
from tiny_models import CLASSES, GROUPS, SIZE, TOKENS, make_pipeline

from dar_lightning.cli import main
from dar_lightning.commands.export import export
from dar_lightning.errors import UserError
from dar_lightning.formats.pretrained import SHIPPED


def test_the_shipped_card_is_what_the_command_writes(tmp_path):
    main(["export", "--pipeline", "fruit64", "--format", "card", "--output", str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == (SHIPPED / "fruit64" / "README.md").read_text()


def test_a_card_says_what_the_pipeline_is_and_ends_with_its_notes(tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "my_pictures")
    (tmp_path / "my_pictures" / "NOTES.md").write_text("Of my own photos.\n")
    export(pipeline=str(tmp_path / "my_pictures"), output=tmp_path / "my_pictures", format="card")
    text = (tmp_path / "my_pictures" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: dar-lightning\n")
    assert text.endswith("```\n\nOf my own photos.\n")
    assert "\n# my pictures\n" in text
    assert f"{SIZE}x{SIZE} pixels" in text
    assert f"{TOKENS} tokens in {GROUPS} groups" in text
    counts = [sum(p.numel() for p in model.parameters()) for model in (pipe.tokenizer, pipe.ar)]
    assert f"| parameters | {counts[0]:,} | {counts[1]:,} |" in text
    assert f"Classes: {', '.join(f'{name} ({i})' for i, name in enumerate(CLASSES))}." in text
    (python,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict = {}
    exec(python, names)
    assert names["images"].shape == (2, 3, SIZE, SIZE)


def test_what_a_card_needs():
    both = {"pipeline": "fruit64", "ckpt": Path("x.ckpt")}
    for options, says in (({}, "pipeline is missing"), (both, "ckpt: format")):
        with pytest.raises(UserError, match=says):
            export(output=Path("never"), format="card", **options)
