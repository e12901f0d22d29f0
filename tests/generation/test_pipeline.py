"""DARPipeline: streaming is real, equals generate, and each image is its own."""

import pytest
import torch
from refusals import refused
from tiny_models import CLASSES, GROUPS, SIZE, TOKENS, make_ar, make_pipeline, make_tokenizer

from dar_lightning import DARPipeline
from dar_lightning.ar.sampling import generate

LABELS = torch.tensor([0, 3, 1])


@pytest.fixture(scope="module")
def pipe() -> DARPipeline:
    return make_pipeline()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("options", [{}, {"guidance": (1.0, 4.0), "top_k": 9, "num_steps": 6, "solver": "euler"}])
def test_the_last_preview_is_what_generate_returns(pipe, options):
    previews = list(pipe.stream(LABELS, generator=seeded(1), **options))
    assert [preview.group for preview in previews] == [1, 2, 3, 4]
    assert [preview.codes.shape for preview in previews] == [(3, 2), (3, 4), (3, 6), (3, 8)]
    images = pipe.generate(LABELS, generator=seeded(1), **options)
    assert torch.equal(previews[-1].images, images)
    assert torch.equal(previews[1].images, pipe.generate(LABELS, groups=2, generator=seeded(1), **options))
    assert not torch.equal(images, pipe.generate(LABELS, generator=seeded(2), **options))
    assert not images.requires_grad


def test_streaming_equals_all_tokens_first_and_all_pixels_then(pipe):
    """The same road without streaming: draw every token, then decode them at once."""
    noise = torch.randn(3, 3, SIZE, SIZE, generator=seeded(0))
    codes = generate(pipe.ar, LABELS, guidance=2.0, generator=seeded(1))
    at_once = pipe.tokenizer.previews(codes, noise)
    previews = list(pipe.stream(LABELS, guidance=2.0, noise=noise, generator=seeded(1)))
    assert torch.equal(previews[-1].codes, codes)
    streamed = torch.stack([preview.images for preview in previews], dim=1)
    assert torch.allclose(streamed, at_once, atol=1e-5)
    assert (at_once[:, 1:] - at_once[:, :-1]).abs().amax(dim=(0, 2, 3, 4)).min() > 1e-3, "each group changes something"


@pytest.mark.parametrize("kept", [0, 3])
def test_the_first_preview_costs_one_group_of_tokens_and_a_prefix_is_kept(pipe, monkeypatch, kept):
    steps = []
    original = type(pipe.ar).step
    monkeypatch.setattr(type(pipe.ar), "step", lambda self, *args: steps.append(1) or original(self, *args))
    prefix = torch.tensor([[5, 1, 30], [5, 1, 30], [7, 7, 7]])[:, :kept]
    stream = pipe.stream(LABELS, prefix=prefix, generator=seeded(0))
    for group in range(1, GROUPS + 1):
        preview = next(stream)
        assert preview.group == group
        drawn = group * TOKENS // GROUPS - kept  # the first of them costs no step, only the start
        assert len(steps) == max(drawn - 1, 0)
    assert torch.equal(preview.codes[:, :kept], prefix)


def test_an_image_with_its_own_generator_does_not_depend_on_its_batch(pipe):
    def draw(labels, seeds):
        return pipe.generate(torch.tensor(labels), guidance=2.0, generator=[seeded(seed) for seed in seeds])

    batch = draw([0, 3, 1], [10, 11, 12])
    assert torch.allclose(draw([3], [11])[0], batch[1], atol=1e-5)
    assert torch.allclose(draw([1, 0], [12, 10]), batch[[2, 0]], atol=1e-5)
    assert not torch.allclose(draw([3], [12])[0], batch[1], atol=1e-2)


def test_classes_by_name_and_number(pipe):
    assert [pipe.label(name) for name in (*CLASSES, "2", 3)] == [0, 1, 2, 3, 2, 3]
    for wrong in ("violet", "4", 4, -1, "-1", "", "1.0", "²"):
        refused("give 0 to 3 or one of red, green, blue, grey", pipe.label, wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 33}, "vocab_size 33, the tokenizer 32"),
        ({"num_tokens": 12}, "num_tokens 12, the tokenizer 8"),
        ({"num_classes": 5}, "4 class names for an AR model of 5 classes"),
    ],
)
def test_parts_that_do_not_belong_together(changes, message):
    refused(message, lambda: DARPipeline(make_tokenizer(), make_ar(**changes), CLASSES))


def test_there_and_back(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    again = DARPipeline.from_pretrained(tmp_path / "pipe")
    assert (again.classes, again.averaged) == (CLASSES, {"tokenizer": None, "ar": None})
    assert torch.equal(again.generate(LABELS, generator=seeded(3)), pipe.generate(LABELS, generator=seeded(3)))


@pytest.mark.parametrize("text", ['{"classes": "red"}', '{"classes": [1, 2, 3, 4]}', "[]", "{"])
def test_broken_class_names(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    refused(r"config\.json", DARPipeline.from_pretrained, tmp_path)
