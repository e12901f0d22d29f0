"""Captions on their whole road: token shards, training, export, `dar sample --prompt`, the page; what is refused."""

import copy
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import write_images
from PIL import Image
from refusals import refusal, refused
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_encoder import write_encoder
from tiny_models import AR, CLASSES, fit_ar, make_ar, make_tokenizer, picture, write_tokens
from torch import nn

from dar_lightning import DARPipeline
from dar_lightning.ar import conditions
from dar_lightning.cli import main
from dar_lightning.commands import extract as command
from dar_lightning.commands import serve as serve_command
from dar_lightning.commands.extract import extract
from dar_lightning.commands.serve_page import draw_previews, repeat
from dar_lightning.commands.shard import shard
from dar_lightning.data.codes import CodesDataModule
from dar_lightning.data.transforms import to_uint8
from dar_lightning.errors import UserError
from dar_lightning.files import file_sha256
from dar_lightning.generation.card import model_card
from dar_lightning.training import ARModule
from dar_lightning.training.flops import step_flops

WORDS = "[PAD] [UNK] a red green blue grey picture ##s"
LAST = "--trainer.callbacks+=dar_lightning.training.callbacks.LastStepCheckpoint"


class LettersEncoder(nn.Module):
    """Stands in for a network of transformers: each letter's number, in two channels."""

    dim, sha256 = 2, "a" * 64

    def __init__(self, source, length):
        super().__init__()
        self.name, self.length = source, length

    def count_tokens(self, texts):
        return [len(text) for text in texts]

    def forward(self, texts, batch_size=64):
        numbers = [np.array([[ord(letter), 1] for letter in text], np.float16) for text in texts]
        return [each[: self.length] for each in numbers]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Image shards of 8 pictures with two captions each, without labels, and a tokenizer."""
    root = tmp_path_factory.mktemp("captioned")
    for number in range(8):
        write_images(root / "photos", {f"{number}.txt": f"a {CLASSES[number % 4]} picture\n{number}".encode()})
        picture(number).save(root / "photos" / f"{number}.png")
    shard(str(root / "photos"), str(root / "shards"), workers=1, seed=None)
    make_tokenizer().save_pretrained(root / "tokenizer")
    return root


def tokens(root, name, **options) -> str:
    common = {"crops": "center", "accelerator": "cpu", "devices": 1, "caption_length": 5}
    extract(str(root / "tokenizer"), str(root / "shards"), str(root / name), **common | options)
    return str(root / name)


def config(folder, name: str, **options) -> dict:
    return AR | {"condition": name, "condition_options": {"file": f"{folder}/condition.json"} | options}


@pytest.fixture(scope="module")
def words(root):
    """Token shards with a vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "train_vocabulary", lambda captions, size: WORDS)
        return tokens(root, "words", vocabulary=9)


@pytest.fixture(scope="module")
def features(root):
    """Token shards with features."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "TextEncoder", LettersEncoder)
        return tokens(root, "features", encoder="letters")


def test_captions_that_are_cut_are_counted(root, features, words, monkeypatch, capsys):
    """Of features; and of tokens, whose vocabulary stays when only the length changes."""
    monkeypatch.setattr(command, "TextEncoder", LettersEncoder)
    tokens(root, "counted", encoder="letters")
    assert "features of 16 captions, 8 of them longer than caption_length 5 tokens, and cut" in capsys.readouterr().out
    monkeypatch.setattr(command, "train_vocabulary", None)
    before = Path(words, "condition.json").read_text()
    tokens(root, "words", vocabulary=9, caption_length=2)
    assert read(words) == {"vocabulary": WORDS, "length": 2}
    assert "9 pieces kept, for 16 captions, 8 of them longer than caption_length 2" in capsys.readouterr().out
    Path(words, "condition.json").write_text(before)


def test_captions_of_a_batch(words, features):
    data = CodesDataModule(features, features, batch_size=8)
    (batch,) = data.val_dataloader()
    assert batch["caption"] == [f"a {CLASSES[i % 4]} picture" for i in range(8)]
    assert batch["label"].tolist() == [-1] * 8
    assert batch["features"].shape == (8, 5, 2)
    assert batch["features"][1, :, 0].tolist() == [ord(letter) for letter in "a gre"]
    found = set()
    for _ in range(4):
        for each in data.train_dataloader():
            for row, text in enumerate(each["caption"]):
                found.add(text)
                letters = [0] * max(0, 5 - len(text)) + [ord(letter) for letter in text[:5]]
                assert each["features"][row, :, 0].tolist() == letters
        data._loader.sampler.position += 8
    assert found >= {"a red picture", "0", "7"}
    assert "features" not in next(iter(CodesDataModule(words, words).val_dataloader()))


def test_from_captions_to_pictures(root, words, tmp_path, capsys):
    run = tmp_path / "run"
    samples = ["--trainer.callbacks+=dar_lightning.training.callbacks.Samples"]
    samples.append(f"--trainer.callbacks.tokenizer={root}/tokenizer")
    fit = fit_ar(words, words, run, max_steps=2, val_check_interval=2)
    fit += [f"--model.init_args.config={json.dumps(config(words, 'caption_tokens'))}", LAST, *samples]
    main([*fit, "--trainer.callbacks.per_class=2"])
    # another length has the same weights, and would be another model
    other = f"--model.init_args.config={json.dumps(config(words, 'caption_tokens', length=4))}"
    said = "cannot resume: config.condition_options.length was 5 in the checkpoint and is 4 now"
    assert said in refusal(capsys, [*fit, other, "--ckpt_path=last"])
    (event,) = EventAccumulator(str(run / "logs")).Reload().Images("samples")
    assert event.height == 404  # four prompts, each to the left of two pictures
    assert event.width > 250

    options = ["--ckpt", f"{run}/checkpoints/last.ckpt", "--tokenizer", f"{root}/tokenizer"]
    main(["export", *options, "--output", f"{tmp_path}/pipeline"])
    assert "pipeline that takes prompts" in capsys.readouterr().out
    prompts = ["green picture", "a red, red picture of nothing known"]
    common = [f"--pipeline={tmp_path}/pipeline", "--per_class=2", "--guidance=2", "--device=cpu"]
    main(["sample", *common, f"--prompt={json.dumps(prompts)}", f"--output={tmp_path}/both"])
    main(["sample", *common, f"--prompt={prompts[0]}", f"--output={tmp_path}/one"])
    both, one = (np.load(tmp_path / name / "samples.npz") for name in ("both", "one"))
    assert set(both) == {"arr_0"}  # prompts are no classes
    assert np.abs(both["arr_0"][:2].astype(int) - one["arr_0"]).max() <= 1
    record = json.loads((tmp_path / "both/samples.json").read_text())
    assert (record["prompt"], record["classes"]) == (prompts, prompts)
    about = json.loads(Image.open(tmp_path / "both/images/001-1.png").text["dar"])
    assert (about["prompt"], about["number"]) == (prompts[1], 1)
    assert "class" not in about

    pipe = DARPipeline.from_pretrained(tmp_path / "pipeline")
    *_, (image, *_) = draw_previews(pipe, prompts[0], 0, 2.0)
    (written,) = re.findall(r"```python\n(.*?)```", (tmp_path / "pipeline/README.md").read_text(), flags=re.DOTALL)
    exec(written, card := {})
    assert card["images"].shape == (2, 3, 32, 32)
    assert "--prompt picture --guidance 3 --output" in (tmp_path / "pipeline/README.md").read_text()
    told, python = repeat(str(tmp_path / "pipeline"), prompts[0], 0, 2.0, None, 0)
    found = {}
    exec(python, found)
    main([*shlex.split(told)[1:-1], str(tmp_path / "page")])
    drawn = np.asarray(Image.open(tmp_path / "page/images/000-0.png")).astype(int)
    assert np.abs(drawn - one["arr_0"][0]).max() <= 1
    shown = ((found["image"][0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(shown - drawn).max() <= 1
    assert np.abs(np.asarray(image)[:: image.width // 32, :: image.width // 32].astype(int) - drawn).max() <= 1


def test_samples_of_features(root, features, tmp_path, monkeypatch, capsys):
    """Captions of the validation data need no encoder, prompts do, from the start; it is not kept."""
    run = fit_ar(features, features, tmp_path / "run", max_steps=2, val_check_interval=2)
    run.append(f"--model.init_args.config={json.dumps(config(features, 'features'))}")
    run += ["--trainer.callbacks+=dar_lightning.training.callbacks.Samples", "--trainer.callbacks.per_class=1"]
    run.append(f"--trainer.callbacks.tokenizer={root}/tokenizer")
    prompted = [*run, "--trainer.callbacks.prompts=[ab, cd]", f"--trainer.default_root_dir={tmp_path}/prompted"]
    assert "encoder: letters is not a folder" in refusal(capsys, prompted)
    assert not list(tmp_path.iterdir())
    main(run)
    monkeypatch.setattr("dar_lightning.ar.conditions.features.TextEncoder", LettersEncoder)
    main(prompted)
    heights = [
        EventAccumulator(str(tmp_path / name / "logs")).Reload().Images("samples")[0].height
        for name in ("run", "prompted")
    ]
    assert heights[0] > 1.5 * heights[1]  # four captions, two prompts


def test_a_training_step_of_features(features, words):
    """The batch's features reach the model; those of another encoder are refused."""
    module = ARModule(make_ar(**config(features, "features") | {"condition_options": read(features)}).config)
    data = CodesDataModule(features, features, batch_size=4)
    module.check_data(data)
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(module.condition(batch), batch["features"])
    module.training_step(batch, 0)["loss"].backward()
    assert module.ar.condition.project[0].weight.grad is not None
    for folder, other, said in (
        (features, "b" * 64, r"data\.train: its features are of encoder aaaaaaaaaaaa, the config names bbbbbbbbbbbb"),
        (words, "b" * 64, r"data\.train: its features are of encoder none"),
    ):
        changed = read(features) | {"sha256": other}
        module = ARModule(make_ar(condition="features", condition_options=changed).config)
        moved = {"hyper_parameters": {"config": module.ar.config.to_dict()}}
        moved["hyper_parameters"]["config"]["condition_options"] = changed | {"encoder": "elsewhere"}
        module.check_checkpoint(moved)
        moved["hyper_parameters"]["config"]["rope_base"] = 1e4 + 1
        refused(r"cannot resume: config.rope_base was 10001\.0 .* and is 10000\.0 now", module.check_checkpoint, moved)
        with pytest.raises(UserError, match=said):
            module.check_data(CodesDataModule(folder, folder))


def read(folder) -> dict:
    return conditions.read_options({"file": f"{folder}/condition.json"})


def test_prompts_of_features(features, monkeypatch, caplog):
    monkeypatch.setattr("dar_lightning.ar.conditions.features.TextEncoder", LettersEncoder)
    ar = make_ar(condition="features", condition_options=read(features))
    batch = ar.condition.from_prompts(["ab", "abcdefg"])
    assert batch[:, :, 0].tolist() == [[0, 0, 0, 97, 98], [97, 98, 99, 100, 101]]
    assert caplog.messages == ["prompt 'abcdefg' has 7 tokens: cut to the first 5"]
    assert not copy.deepcopy(ar).condition._encoders  # EMA copies models
    prefix = ar.condition(torch.cat([batch, ar.condition.null(1)]))
    assert prefix.real.int().tolist() == [[0, 0, 0, 1, 1], [1] * 5, [0, 0, 0, 0, 1]]
    assert torch.equal(prefix.values[2, -1], ar.condition.null_embedding.weight[0])
    monkeypatch.setattr(LettersEncoder, "sha256", "c" * 64)
    refused(
        "encoder: elsewhere has weights cccccccccccc, the model was trained on", ar.condition.use_encoder, "elsewhere"
    )


def test_flops_count_the_prefix(words, features):
    """P - 1 more places in every linear layer but the head, and in half of the attention's scores."""
    batch = {"codes": torch.zeros(4, AR["num_tokens"], dtype=torch.long), "label": torch.zeros(4, dtype=torch.long)}
    dim, depth, tokens = AR["dim"], AR["depth"], AR["num_tokens"]
    module = ARModule(make_ar().config)
    per_place = 6 * sum(p.numel() for n, p in module.ar.named_parameters() if "blocks" in n and p.dim() == 2)
    longer = ARModule(make_ar(condition="caption_tokens", condition_options={"vocabulary": WORDS, "length": 5}).config)
    extra = step_flops(longer, batch) - step_flops(module, batch)
    halves = (tokens + 4) * ((tokens + 4) // 2) - tokens * (tokens // 2)
    assert extra == 4 * (4 * per_place + depth * 6 * 2 * halves * dim)
    masked = ARModule(make_ar(condition="features", condition_options=read(features)).config)
    projected = 4 * 5 * (2 * 2 * 2 * dim + 3 * 2 * dim * dim)  # features need no gradient
    assert step_flops(masked, batch) - step_flops(longer, batch) == projected


def test_a_sample_without_caption_is_counted(root, tmp_path):
    for name, count in (("few", 1), ("many", 3)):
        folder = tmp_path / name
        for number in range(4):
            (folder / "in").mkdir(parents=True, exist_ok=True)
            picture(number).save(folder / "in" / f"{number}.png")
            if number >= count:
                (folder / "in" / f"{number}.txt").write_text("a picture")
        shard(str(folder / "in"), str(folder / "shards"), workers=1)
    options = dict(vocabulary=8, crops="center", accelerator="cpu", devices=1, max_bad_share=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "train_vocabulary", lambda captions, size: WORDS)
        extract(str(root / "tokenizer"), str(tmp_path / "few/shards"), str(tmp_path / "few/codes"), **options)
        assert CodesDataModule(str(tmp_path / "few/codes")).index("train").skipped == ("000000.tar/0: no caption",)
        with pytest.raises(UserError, match="no caption"):
            extract(str(root / "tokenizer"), str(tmp_path / "many/shards"), str(tmp_path / "many/codes"), **options)


def test_what_is_refused(root, words, tmp_path):
    refused("vocabulary and encoder are both set", tokens, root, "both", vocabulary=9, encoder="x")
    refused("encoder: /no/such is not a folder", tokens, root, "x", encoder="/no/such")
    (tmp_path / "pickled").mkdir()
    refused(r"pickled has no \.safetensors", tokens, root, "x", encoder=str(tmp_path / "pickled"))
    with pytest.raises(UserError, match=r"data\.train: its images have no labels, which condition 'class' needs"):
        ARModule(make_ar().config).check_data(CodesDataModule(words))
    none = ARModule(make_ar(condition="none").config)
    none.check_data(CodesDataModule(words))
    none.training_step(next(iter(CodesDataModule(words, batch_size=2).train_dataloader())), 0)
    module = ARModule(make_ar(condition="caption_tokens", condition_options=read(words)).config)
    with pytest.raises(UserError, match=r"data\.train: its token shards have no captions, which condition 'caption_to"):
        module.check_data(CodesDataModule(write_tokens(tmp_path / "plain", 4)))
    refused(
        r"condition_options: file is nowhere\.json, which is no condition\.json",
        conditions.read_options,
        {"file": "nowhere.json"},
    )
    assert conditions.read_options({"file": f"{words}/condition.json", "length": 3})["length"] == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt=red", "--classes=1"], "classes and prompt are both set"),
        (["--prompt=red"], "prompts: this model takes labels, not text"),
        (["--encoder=x"], "encoder is x: condition 'class' needs none"),
    ],
)
def test_prompts_that_are_refused(pipeline, tmp_path, capsys, words, said):
    assert said in refusal(capsys, ["sample", f"--pipeline={pipeline}", f"--output={tmp_path}/out", *words])
    assert not (tmp_path / "out").exists()


def test_no_condition_on_the_command_line(tmp_path):
    DARPipeline(make_tokenizer(), make_ar(condition="none")).save_pretrained(tmp_path / "pipeline")
    card = model_card(DARPipeline.from_pretrained(tmp_path / "pipeline"), str(tmp_path / "pipeline"))
    (written,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    exec(written, found := {})
    assert found["images"].shape == (2, 3, 32, 32)
    assert "--guidance" not in card
    main(["sample", f"--pipeline={tmp_path}/pipeline", f"--output={tmp_path}/out", "--per_class=3", "--device=cpu"])
    assert set(np.load(tmp_path / "out/samples.npz")) == {"arr_0"}


PROMPT = "a red apple"


@pytest.fixture(scope="module")
def encoder_root(tmp_path_factory):
    pytest.importorskip("transformers")
    encoder_root = tmp_path_factory.mktemp("encoder")
    write_encoder(encoder_root / "bert", "bert")
    options = {"channels": 16, "length": 6, "encoder": "./nowhere"}
    options["sha256"] = file_sha256(encoder_root / "bert/model.safetensors")
    ar = make_ar(condition="features", condition_options=options)
    DARPipeline(make_tokenizer(), ar).save_pretrained(encoder_root / "pipeline")
    return encoder_root


def test_prompts_for_an_encoder_that_was_moved(encoder_root, tmp_path):
    pipeline, encoder = str(encoder_root / "pipeline"), str(encoder_root / "bert")
    told, python = repeat(pipeline, PROMPT, 0, 2.0, None, 0, encoder=encoder)
    main([*shlex.split(told)[1:-1], str(tmp_path / "one")])
    drawn = np.asarray(Image.open(tmp_path / "one/images/000-0.png")).astype(int)
    exec(python, found := {})
    assert np.abs(to_uint8(found["image"])[0].permute(1, 2, 0).numpy() - drawn).max() <= 1
    record = json.loads((tmp_path / "one/samples.json").read_text())
    assert record["encoder"] == encoder
    main([*shlex.split(record["command"])[1:-1], str(tmp_path / "again")])
    again = np.asarray(Image.open(tmp_path / "again/images/000-0.png")).astype(int)
    assert np.array_equal(again, drawn)
    main(["sample", f"--pipeline={pipeline}", f"--encoder={encoder}", "--prompt=apple", f"--output={tmp_path}/other"])
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "other/images/000-0.png")), drawn)


def test_the_page_looks_for_the_encoder_before_it_listens(encoder_root, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setattr(serve_command, "build_page", None)
    refused(r"encoder: \./nowhere is not a folder", serve_command.serve, str(encoder_root / "pipeline"))
