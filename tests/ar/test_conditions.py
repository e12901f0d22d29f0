"""Conditions as prefixes: what each of them computes, stated a second way; what is refused."""

import pytest
import torch
from refusals import refused
from tiny_models import AR, CODES, TOKENS, make_ar, make_pipeline, make_tokenizer
from torch import nn

from dar_lightning import ARConfig, ARModel, DARPipeline
from dar_lightning.ar import conditions
from dar_lightning.ar.conditions import Condition, Prefix
from dar_lightning.ar.conditions.caption_tokens import train_vocabulary, words
from dar_lightning.ar.sampling import generate
from dar_lightning.errors import UserError
from dar_lightning.formats.model_sha256 import model_sha256

VOCABULARY = "[PAD] [UNK] a p l e red app ##le ##p blue , ##s"
CAPTIONS = {"condition": "caption_tokens", "condition_options": {"vocabulary": VOCABULARY, "length": 5}}
LABELS = torch.tensor([0, 3, 2])


class Ragged(Condition):
    """Rows of vectors, padded at the left with zeros, which are hidden."""

    def __init__(self, dim: int, length: int = 3, channels: int = 32):
        super().__init__()
        self.length, self.channels = length, channels
        self.project = nn.Linear(channels, dim, bias=False)

    def forward(self, batch):
        real = batch.abs().sum(-1) > 0
        return Prefix(self.project(batch), real)

    def null(self, count):
        return torch.zeros(count, self.length, self.channels)


@pytest.fixture(autouse=True)
def own_class(monkeypatch):
    monkeypatch.setattr(conditions.CONDITIONS, "classes", dict(conditions.CONDITIONS.classes))
    conditions.register_condition(Ragged, "tests.Ragged")


def codes(count: int = 3) -> torch.Tensor:
    return torch.randint(CODES, (count, TOKENS), generator=torch.Generator().manual_seed(5))


def with_weights_of(ar: ARModel, **changes) -> ARModel:
    """A model of another condition whose other weights are those of a class model."""
    made = ARModel(ARConfig(**AR | changes)).eval()
    made.load_state_dict({n: t for n, t in ar.state_dict().items() if n != "class_embedding.weight"}, strict=False)
    return made


def test_no_condition_is_the_class_model_at_no_class():
    ar = make_ar()
    none = with_weights_of(ar, condition="none")
    none.condition.embedding.weight.data[0] = ar.class_embedding.weight[ar.null_class].detach()
    assert next(iter(none.state_dict())) == "condition_embedding.embedding.weight"
    null = torch.full_like(LABELS, ar.null_class)
    assert torch.equal(none(LABELS, codes()), ar(null, codes()))
    seeded = [torch.Generator().manual_seed(3) for _ in range(2)]
    drawn = generate(none, LABELS, generator=seeded[0]), generate(ar, null, generator=seeded[1])
    assert torch.equal(*drawn)
    refused(r"guidance is 2\.0: this model has no condition to guide by", generate, none, LABELS, guidance=2.0)


def test_one_vector_is_the_class_model():
    """P = 1, all real, projection the identity: the class table's rows are the features, with a mask or without."""
    ar = make_ar(num_heads=2, num_kv_heads=1)
    options = {"length": 1, "channels": AR["dim"]}
    own = with_weights_of(ar, num_kv_heads=1, condition="tests.Ragged", condition_options=options)
    own.condition.project.weight.data = torch.eye(AR["dim"])
    features = ar.class_embedding.weight[LABELS][:, None].detach()
    torch.testing.assert_close(own(features, codes()), ar(LABELS, codes()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("short", [1, 2])
def test_padding_is_not_seen(short):
    """Left padding moves the whole sequence, which RoPE, being relative, does not notice."""
    small, large = ({"length": n, "channels": 32} for n in (3, 7))
    ar = make_ar(condition="tests.Ragged", condition_options=small)
    wide = ARModel(ARConfig(**AR, condition="tests.Ragged", condition_options=large)).eval()
    wide.load_state_dict(ar.state_dict())
    features = torch.randn(3, 3, 32, generator=torch.Generator().manual_seed(1))
    features[1, : 3 - short] = 0
    padded = torch.cat([torch.zeros(3, 4, 32), features], dim=1)
    torch.testing.assert_close(wide(padded, codes()), ar(features, codes()), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "changes",
    [
        CAPTIONS,
        {"condition": "tests.Ragged"},
        {"order": "random_per_sample"} | CAPTIONS,
        {"place_tables": "own_and_target"} | CAPTIONS,
    ],
)
@torch.no_grad()
def test_cached_steps_are_teacher_forcing(changes):
    """Prefill, steps and the null half that leaves after the last guided token: logits as of whole sequences."""
    ar = make_ar(**changes)
    text = changes["condition"] == "caption_tokens"
    batch = ar.condition.from_prompts(["red apples", "blue"]) if text else torch.randn(2, 3, 32)
    if not text:
        batch[0, 0] = 0
    order = ar.draw_order(2, torch.Generator().manual_seed(0))
    drawn = codes(2)
    whole = ar(batch, drawn, order)
    both = torch.cat([batch, ar.condition.null(2)])
    logits, cache = ar.start(both, drawn[:, :2].repeat(2, 1), order.repeat(2, 1))
    torch.testing.assert_close(logits[:2], whole[:, 2], atol=2e-5, rtol=2e-5)
    logits = ar.step(drawn[:, 2].repeat(2), cache, order.repeat(2, 1))
    torch.testing.assert_close(logits[:2], whole[:, 3], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(logits[2:], ar(ar.condition.null(2), drawn, order)[:, 3], atol=2e-5, rtol=2e-5)
    cache.keep(2)
    torch.testing.assert_close(ar.step(drawn[:, 3], cache, order), whole[:, 4], atol=2e-5, rtol=2e-5)
    assert cache.length == ar.condition.length + 4
    assert generate(ar, batch, guidance=(3.0, 1.0), order=order).shape == (2, TOKENS)


@pytest.mark.parametrize("changes", [CAPTIONS, {"condition": "tests.Ragged"}])
def test_the_step_of_static_shapes_reads_prefixes(changes):
    """As a GPU draws: the prefix a position at a time, with its padding."""
    ar = make_ar(**changes)
    batch = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2))
    batch[0, 0] = 0
    batch = ar.condition.from_prompts(["red apples", "blue"]) if changes == CAPTIONS else batch
    options = [dict(guidance=2.0, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(generate(ar, batch, static=True, **options[0]), generate(ar, batch, static=False, **options[1]))


def test_each_part_of_a_caption_counts_and_dropout_is_the_null():
    ar = make_ar(**CAPTIONS)
    batch = ar.condition.from_prompts(["red apples", "blue apples", "red apple"])
    assert batch.tolist() == [[6, 7, 8, 12, 0], [10, 7, 8, 12, 0], [6, 7, 8, 0, 0]]
    first = ar(batch, codes(1).repeat(3, 1))[:, 0]
    assert (first[0] - first[1]).abs().max() > 0.01 < (first[0] - first[2]).abs().max()
    always = ARModel(
        ARConfig(**AR | CAPTIONS, class_dropout=1 - 1e-9, token_dropout=0, residual_dropout=0, ffn_dropout=0)
    )
    always.load_state_dict(ar.state_dict())
    assert torch.equal(always.train()(batch, codes()), ar(ar.condition.null(3), codes()))


def test_a_model_learns_what_its_captions_say():
    """Four captions of the same two words in other places, four pictures: drawn again from their prompts."""
    torch.manual_seed(0)
    ar = ARModel(ARConfig(**AR | CAPTIONS, token_dropout=0, residual_dropout=0, ffn_dropout=0))
    prompts, pictures = ["red apple", "apple red", "apple apple", "red red"], codes(4)
    batch = ar.condition.from_prompts(prompts)
    optimizer = torch.optim.AdamW(ar.parameters(), lr=3e-3)
    for _ in range(120):
        loss = nn.functional.cross_entropy(ar.train()(batch, pictures).flatten(0, 1), pictures.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(generate(ar, batch, top_k=1), pictures)
    assert torch.equal(generate(ar, batch, top_k=1, guidance=2.0), pictures)


def test_word_pieces_are_those_of_tokenizers():
    tokenizers = pytest.importorskip("tokenizers")
    texts = ["red apple, noto style", "green apple, fluent style", "Ärger: 2 apples!", "clown-fish & snow"] * 2
    vocabulary = train_vocabulary(texts, 60)
    assert vocabulary.startswith("[PAD] [UNK] ")
    pieces = {piece: number for number, piece in enumerate(vocabulary.split())}
    theirs = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token="[UNK]"))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    ours = conditions.CaptionTokens(8, vocabulary)
    long = ["no" * 50, "no" * 50 + "o"]  # of 100 letters, and of 101, which is [UNK]
    for text in [*texts, "unseen words, £5", "no to apple ## [PAD]", *long]:
        assert ours.tokens(text) == theirs.encode(" ".join(words(text))).ids
    assert len(ours.tokens(long[0])) > 1 == len(ours.tokens(long[1]))
    refused("vocabulary is 5: the letters of the captions alone are", train_vocabulary, texts, 5)


def test_a_text_pipeline_is_saved_and_draws(tmp_path, caplog):
    pipe = DARPipeline(make_tokenizer(), make_ar(**CAPTIONS))
    pipe.save_pretrained(tmp_path)
    again = DARPipeline.from_pretrained(tmp_path)
    assert again.ar.config == pipe.ar.config
    assert model_sha256(again.ar) == model_sha256(pipe.ar)
    prompts = ["red apple", "blue"]
    seeded = [[torch.Generator().manual_seed(i) for i in range(2)] for _ in range(3)]
    images = pipe.generate(prompts=prompts, guidance=2.0, generator=seeded[0])
    assert torch.equal(images, again.generate(prompts=prompts, guidance=2.0, generator=seeded[1]))
    ids = pipe.ar.condition.from_prompts(prompts)
    assert torch.equal(images, pipe.generate(ids, guidance=2.0, generator=seeded[2]))
    pipe.condition(["red red apple apple red"])
    assert "has 7 tokens: cut to the first 5" in caplog.text


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([" "], "prompts: number 0 is ' ': say what to draw"),
        (["Ω Ω"], "prompts: 'Ω Ω' holds no word that this model has seen"),
        ([], "nothing to draw: this model takes prompts"),
        (torch.tensor([1]), r"captions are of shape \(1,\): need \(B, 5\)"),
    ],
)
def test_what_a_text_model_refuses(asked, said):
    pipe = DARPipeline(make_tokenizer(), make_ar(**CAPTIONS))
    refused(said, pipe.generate, asked)
    refused("takes prompts, not classes", pipe.label, "red")


def test_prompts_are_for_models_of_text():
    refused("prompts: this model takes labels, not text", lambda: make_pipeline().generate(prompts=["red"]))
    pipe = DARPipeline(make_tokenizer(), make_ar(**CAPTIONS))
    with pytest.raises(UserError, match="labels and prompts are both given: a model takes one of the two"):
        pipe.generate(torch.zeros(1, 5, dtype=torch.long), prompts=["red"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"condition": "text"}, "condition is 'text': it must be 'class' or 'none' or 'caption_tokens'.*, or the"),
        ({"condition": "some.Where"}, r"a config imports no code: call register_condition\(Where\)"),
        ({"condition": "none", "condition_options": {"file": "x"}}, "file is 'x': none has no options"),
        ({"condition_options": {"num_classes": 5}}, "condition 'class' has no num_classes: num_classes is all"),
        ({"condition": "caption_tokens"}, "vocabulary has 0 pieces and is none: give `file`"),
        ({"condition": "tests.Ragged", "condition_options": {"length": 2**20}}, "length is 1048576, need 1 to 65536"),
        ({"condition": "tests.Ragged", "condition_options": {"length": "2"}}, "length is '2': tests.Ragged needs a"),
    ],
)
def test_configs_that_are_refused(changes, said):
    refused(said, lambda: ARModel(ARConfig(**AR | changes)))


def test_a_condition_that_lacks_a_method_is_named():
    class Half(Condition):
        def forward(self, batch):
            return batch

    with pytest.raises(TypeError, match=r"Half.*null"):
        Half()
    refused("^condition Ragged has no method from_data, which training needs$", Ragged(8).from_data, {})
