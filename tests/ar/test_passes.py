"""Several tokens a pass: what each place may know, cached against teacher forcing, nats lost; and Jacobi sampling."""

import math

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from tiny_models import CLASSES, CODES, GROUPS, SIZE, TOKENS, make_ar, make_tokenizer, seeds

from dar_lightning import ARConfig, ARModel, DARPipeline
from dar_lightning.ar.draw import draw_tokens
from dar_lightning.ar.guidance import guidance_schedule
from dar_lightning.ar.gumbel import draw_keys
from dar_lightning.ar.order import IN_GROUPS, fixed_order, placed
from dar_lightning.ar.pass_layout import last_seen, pass_end, read_by
from dar_lightning.ar.sampling import generate, stream_tokens

LABELS = torch.tensor([0, 3, 1])
LAYOUTS = [(0, 4), (4, 4), (8, 8), (2, 3), (0, 8), (16, 4), (0, 32), (1, 31), (5, 1)]  # w, m of 32 tokens
CAPTIONS = {"condition": "caption_tokens", "condition_options": {"vocabulary": "[PAD] [UNK] red blue", "length": 3}}


def several(size: int, alone: int = 0, **changes) -> ARModel:
    return make_ar(tokens_per_pass=size, sequential_tokens=alone, order_groups=GROUPS, **changes)


def codes(rows: int = 3) -> torch.Tensor:
    return torch.randint(CODES, (rows, TOKENS), generator=torch.Generator().manual_seed(0))


def blocks(count: int, alone: int, size: int) -> list[range]:
    """Tokens of each pass."""
    return [range(i, i + 1) for i in range(alone)] + [range(i, i + size) for i in range(alone, count, size)]


@torch.no_grad()
def test_one_token_a_pass_is_the_model_as_it_was():
    plain, ar = make_ar(), make_ar(sequential_tokens=3, block_attention="causal")
    assert plain.state_dict().keys() == ar.state_dict().keys()
    assert torch.equal(plain(LABELS, codes()), ar(LABELS, codes()))
    one, other = (generate(each, LABELS, guidance=2.0, generator=seeds(1, 2, 3)) for each in (plain, ar))
    assert torch.equal(one, other)


@pytest.mark.parametrize(("alone", "size"), LAYOUTS)
def test_layouts(alone, size):
    config = ARConfig.preset("tiny", tokens_per_pass=size, sequential_tokens=alone)
    passes, ends = blocks(32, alone, size), [0]
    while ends[-1] < 32:
        ends.append(pass_end(config, ends[-1]))
    assert ends[1:] == [each.stop for each in passes]
    assert config.passes == len(passes) == alone + (32 - alone) // size
    assert last_seen(config, 2).tolist() == [0, 1] + [2 + each.stop - 1 for each in passes for _ in each]
    read = read_by(config).tolist()
    for each in passes:
        known = {read[place] for place in range(each.stop)} - {*range(-size, 0)}
        assert known == {*range(each.start)}, "all earlier tokens, and no other"
    assert read == [*range(-1, alone - 1), *range(alone - size, 32 - size)]


@pytest.mark.parametrize(("alone", "size"), [(0, 4), (2, 3), (4, 2), (0, 8)])
@torch.no_grad()
def test_a_block_knows_all_earlier_tokens_and_none_of_its_own(alone, size):
    ar, drawn = several(size, alone), codes(1)
    before = ar(LABELS[:1], drawn)
    for place in range(TOKENS):
        other = drawn.clone()
        other[0, place] = (other[0, place] + 1) % CODES
        changed = (ar(LABELS[:1], other) != before).any(dim=2)[0].tolist()
        later = [place < each.start for each in blocks(TOKENS, alone, size) for _ in each]
        assert changed == later


@torch.no_grad()
def test_the_first_block_tells_its_places_apart_by_the_learned_vectors_alone():
    ar = several(4)
    first = ar(LABELS, codes())[:, :4]
    assert (first[:, :1] - first[:, 1:]).abs().amax(dim=(0, 2)).min() > 0.1
    ar.place_embedding.weight.zero_()
    first = ar(LABELS, codes())[:, :4]
    torch.testing.assert_close(first[:, :1].expand_as(first), first)


CASES = {
    "in blocks": dict(size=4),
    "the first ones alone": dict(size=3, alone=2),
    "causal in a block": dict(size=4, block_attention="causal"),
    "captions": dict(size=2, alone=2) | CAPTIONS,
    "strided": dict(size=2, order="strided_in_group"),
    "shuffled groups": dict(size=2, order="random_in_group"),
    "shuffled": dict(size=4, order="random_per_sample"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("guidance", ["linear,1.5,4", "interval,3,1,2"])  # the latter ends within a block of 3 or 4
@torch.no_grad()
def test_cached_passes_draw_what_teacher_forcing_says(name, guidance):
    """Each token is that of its logits given the earlier passes, its own scale and its own key."""
    ar = several(**CASES[name])
    asked = ar.condition.from_prompts(["red", "blue red", "blue"]) if "captions" in name else LABELS
    order, groups = ar.draw_order(3, seeds(4, 5, 6)), [1] * 3 + [2] * 2 + [3] * 3
    options = dict(guidance=guidance, order=order, token_groups=groups, temperature=0.9)
    drawn = torch.stack(list(stream_tokens(ar, asked, generator=seeds(1, 2, 3), **options)), dim=1)
    keys = draw_keys(3, TOKENS, seeds(1, 2, 3), drawn.device)
    scales = torch.tensor(guidance_schedule(guidance, TOKENS, groups))[:, None]
    cond, null = (ar(each, drawn, order) for each in (asked, ar.condition.null(3)))
    logits = (null + scales * (cond - null)) / 0.9
    wanted = torch.stack([draw_tokens(logits[:, i], keys[:, i]) for i in range(TOKENS)], dim=1)
    assert torch.equal(drawn, wanted)
    alone = torch.stack(list(stream_tokens(ar, asked[1:2], generator=seeds(2), **options | {"order": order[1:2]})), 1)
    assert torch.equal(alone, drawn[1:2])
    cut = torch.stack(list(stream_tokens(ar, asked, generator=seeds(1, 2, 3), num_tokens=5, **options)), dim=1)
    assert torch.equal(cut, drawn[:, :5])


def test_orders_in_groups():
    in_fours, in_twos = (fixed_order("strided_in_group", 16, 2, 0, *passes).tolist() for passes in ((4,), (2, 4)))
    assert in_fours == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert in_twos == [0, 1, 2, 3, 4, 6, 5, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    for size in (1, 8):
        assert fixed_order("strided_in_group", 16, 2, 0, size).tolist() == list(range(16))
    ar = make_ar(order="random_in_group", order_groups=2)
    orders = ar.draw_order(50, seeds(*range(50)))
    assert torch.equal(orders[7:8], ar.draw_order(1, seeds(7)))
    assert (orders[:, :4].sort(dim=1).values == torch.arange(4)).all()
    assert (orders[:, 4:].sort(dim=1).values == torch.arange(4, 8)).all()
    assert len({tuple(row) for row in orders[:, :4].tolist()}) > 15, "of 24"


@pytest.mark.parametrize("order", IN_GROUPS)
def test_groups_stream_in_their_places(order):
    ar = several(2, order=order)
    pipe = DARPipeline(make_tokenizer(), ar)
    noise = torch.randn(3, 3, SIZE, SIZE)
    drawn = generate(ar, LABELS, guidance=2.0, generator=seeds(1, 2, 3))
    order = ar.draw_order(3, generator := seeds(1, 2, 3))
    as_written = list(stream_tokens(ar, LABELS, guidance=2.0, generator=generator, order=order))
    assert torch.equal(placed(torch.stack(as_written, dim=1), order), drawn)
    stream = pipe.stream(LABELS, guidance=2.0, noise=noise, generator=seeds(1, 2, 3))
    first = next(stream)
    assert first.codes.shape == (3, TOKENS // GROUPS), "after a group, not after all"
    images = torch.stack([first.images] + [preview.images for preview in stream], dim=1)
    torch.testing.assert_close(images, pipe.tokenizer.previews(drawn, noise), atol=1e-4, rtol=1e-4)
    kept = generate(ar, LABELS, prefix=drawn[:, :4], generator=seeds(7, 8, 9))
    assert torch.equal(kept[:, :4], drawn[:, :4])
    assert not torch.equal(kept, drawn)


@torch.no_grad()
def test_a_prefix_is_read_as_what_was_drawn():
    ar = several(3, 2)
    drawn = generate(ar, LABELS, top_k=1)
    for length in (1, 2, 5):
        assert torch.equal(generate(ar, LABELS, top_k=1, prefix=drawn[:, :length]), drawn)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_per_pass": 3}, r"tokens_per_pass is 3: it must divide num_tokens - sequential_tokens, 8 - 0$"),
        ({"tokens_per_pass": 0}, r"tokens_per_pass is 0: it must be from 1 to num_tokens, 8$"),
        ({"sequential_tokens": 8}, r"sequential_tokens is 8: it must be from 0 to 7$"),
        ({"tokens_per_pass": 2, "place_tables": "own_and_target"}, "with tokens_per_pass 2 it must be target"),
        ({"block_attention": "none"}, r"block_attention is 'none': choose full or causal$"),
        ({"order": "strided_in_group", "order_groups": 3}, r"order_groups is 3: it must divide num_tokens, 8$"),
        ({"order": "strided_in_group", "order_groups": 4, "tokens_per_pass": 4}, r"groups of 2 .* must divide 2$"),
        ({"order": "random_in_group", "order_groups": 2, "tokens_per_pass": 4, "sequential_tokens": 2}, "8 - 2"),
        (
            dict(order="random_in_group", order_groups=2, tokens_per_pass=2, sequential_tokens=2, num_tokens=6),
            r"groups of 3 tokens in whole passes, it must divide 3$",
        ),
    ],
)
def test_layouts_that_there_are_not(changes, message):
    refused(message, ARConfig, **{"num_tokens": TOKENS} | changes)


@pytest.mark.parametrize(
    ("changes", "length", "message"),
    [
        (dict(size=4), 2, r"prefix: 2 tokens are kept, this model predicts 4 a pass: need a multiple of 4$"),
        (dict(size=3, alone=2), 4, r"need up to 2, or 2 and a multiple of 3$"),
        (dict(size=2, order="strided_in_group"), 3, r"order is strided_in_group: need a multiple of 2, whole groups$"),
    ],
)
def test_prefixes_off_a_border_are_refused(changes, length, message):
    refused(message, lambda: generate(several(**changes), LABELS, prefix=codes()[:, :length]))


def test_teacher_forcing_off_a_border_is_refused():
    """A pass that is cut would see fewer of its own places, and give other logits."""
    ar = several(size=4)
    assert torch.allclose(ar(LABELS, codes()[:, :4]), ar(LABELS, codes())[:, :4], atol=1e-5)
    refused("codes hold 5 tokens: this model predicts 4 a pass, they must end one", lambda: ar(LABELS, codes()[:, :5]))


def test_groups_of_an_order_lie_within_those_of_the_tokenizer():
    ar = make_ar(order="strided_in_group", order_groups=2)
    refused(
        "order_groups is 2: a group of the order has 4 tokens, one of the tokenizer 2",
        lambda: DARPipeline(make_tokenizer(), ar),
    )
    assert DARPipeline(make_tokenizer(), make_ar(order="strided_in_group", order_groups=GROUPS)).num_groups == GROUPS


def test_what_was_trained_with_one_number_refuses_another(tmp_path):
    ar = several(4)
    ar.save_pretrained(tmp_path)
    assert torch.equal(generate(ARModel.from_pretrained(tmp_path), LABELS, top_k=1), generate(ar, LABELS, top_k=1))
    config = tmp_path / "config.json"
    text = config.read_text()
    for new in ('"tokens_per_pass": 2', '"tokens_per_pass": 1'):
        config.write_text(text.replace('"tokens_per_pass": 4', new))
        refused(r"are \[2, 0, 0\].*trained with \[4, 0, 0\]|unknown pass", ARModel.from_pretrained, tmp_path)
    refused("static: this model predicts 4 tokens a pass", generate, ar, LABELS, static=True)


@pytest.mark.parametrize(
    ("pairs", "lost"),
    [
        ([(x, x) for x in range(4)], math.log(4)),
        ([(1, 2), (2, 1)], math.log(2)),
        ([(x, y) for x in range(2) for y in range(2)], 0.0),
    ],
    ids=["a copy", "either way round", "independent"],
)
def test_nats_lost_are_the_total_correlation(pairs, lost):
    """Of data that is known: what two tokens a pass cost more than one, once both have learnt all that they can."""
    data, losses = torch.tensor(pairs), []
    for size in (1, 2):
        torch.manual_seed(0)
        sizes = dict(vocab_size=4, num_tokens=2, num_classes=1, dim=16, depth=1, num_heads=1, multiple_of=16)
        off = dict.fromkeys(("class_dropout", "token_dropout", "residual_dropout", "ffn_dropout"), 0.0)
        ar = ARModel(ARConfig(**sizes, **off, tokens_per_pass=size))
        optimizer = torch.optim.Adam(ar.parameters(), lr=0.05)
        for _ in range(80):
            logits = ar(torch.zeros(len(data), dtype=torch.long), data)
            loss = F.cross_entropy(logits.flatten(0, 1), data.flatten()) * 2  # nats a pair
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] - losses[0] == pytest.approx(lost, abs=0.03)
    assert losses[0] == pytest.approx(math.log(len(data)), abs=0.03), "the entropy of the pairs"


@pytest.mark.parametrize("window", [1, 3, TOKENS])
@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        (
            {"num_kv_heads": 1, "place_tables": "own_and_target"},
            {"guidance": (1.5, 4.0), "top_k": 5, "top_p": 0.9, "temperature": 0.8},
        ),
        ({"order": "random_per_sample"}, {"guidance": "interval,3,1,2", "token_groups": [1] * 2 + [2] * 3 + [3] * 3}),
        (CAPTIONS, {"guidance": 3.0, "num_tokens": 7}),
    ],
    ids=["plain", "filters", "an order per sample, guidance that ends", "captions"],
)
@torch.no_grad()
def test_tokens_are_those_of_drawing_one_by_one(changes, options, window):
    ar = make_ar(**changes).double()
    asked = ar.condition.from_prompts(["red", "blue red", "blue"]) if changes == CAPTIONS else LABELS
    one = torch.stack(list(stream_tokens(ar, asked, generator=seeds(1, 2, 3), **options)), dim=1)
    drawn = torch.stack(list(stream_tokens(ar, asked, generator=seeds(1, 2, 3), jacobi=window, **options)), dim=1)
    assert torch.equal(drawn, one)


@torch.no_grad()
def test_a_prefix_and_a_bias_are_kept():
    ar = make_ar().double()
    prefix = torch.tensor([[3, 1, 2], [0, 0, 0], [5, 6, 7]])
    wanted = torch.zeros(TOKENS, 32).index_fill_(0, torch.tensor(5), -torch.inf)
    wanted[5, 9] = 1e4  # of place 5
    options = dict(prefix=prefix, bias=lambda places: wanted[places], guidance=2.0)
    one = generate(ar, LABELS, generator=seeds(1, 2, 3), **options)
    drawn = generate(ar, LABELS, generator=seeds(1, 2, 3), jacobi=4, **options)
    assert torch.equal(drawn, one)
    assert (drawn[:, 5] == 9).all()
    assert torch.equal(drawn[:, :3], prefix)


def count_passes(ar: ARModel, monkeypatch, **options) -> tuple[int, list[int]]:
    """Passes of one drawing, and after how many of them each token came."""
    passes, read = [], ARModel.read
    monkeypatch.setattr(ARModel, "read", lambda *arguments: passes.append(1) or read(*arguments))
    came = [len(passes) for _ in stream_tokens(ar, LABELS[:1], generator=seeds(1), **options)]
    monkeypatch.undo()
    return len(passes), came


def counting(ar: ARModel, depends: bool) -> ARModel:
    """A model whose next token is the last one plus 1, or always 5, whatever it reads."""
    for parameter in ar.parameters():
        parameter.data.zero_()
    ar.norm.weight.data.fill_(1)
    ar.token_embedding.weight.data.copy_(torch.eye(32))
    ar.class_embedding.weight.data[:, 0] = 1
    ar.head.weight.data.copy_(100 * (torch.eye(32).roll(1, dims=0) if depends else torch.zeros(32, 32)))
    if not depends:
        ar.head.weight.data[5] = 100
    return ar


def test_passes_at_worst_and_at_best(monkeypatch):
    """Where a token is a function of the one before it, a pass gives one; where it depends on none, two give all."""
    chain, free = counting(make_ar(), depends=True), counting(make_ar(), depends=False)
    assert torch.stack(list(stream_tokens(chain, LABELS, jacobi=TOKENS)), 1).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]] * 3
    assert count_passes(chain, monkeypatch, jacobi=TOKENS) == (8, [1, 2, 3, 4, 5, 6, 7, 8])
    assert count_passes(chain, monkeypatch, jacobi=1) == (8, [1, 2, 3, 4, 5, 6, 7, 8])
    assert count_passes(free, monkeypatch, jacobi=TOKENS) == (2, [1] + [2] * 7)
    assert count_passes(free, monkeypatch, jacobi=4) == (4, [1, 2, 2, 2, 2, 3, 4, 4])


def test_the_pipeline_draws_the_same_images():
    pipe = DARPipeline(make_tokenizer(), make_ar(), CLASSES)
    images = [pipe.generate(LABELS, guidance=2.0, generator=seeds(1, 2, 3), jacobi=window) for window in (0, 5)]
    torch.testing.assert_close(*images)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"jacobi": -1}, r"jacobi is -1: it must be 0 \(off\) or a window of up to 8 tokens$"),
        ({}, {"jacobi": 9}, "a window of up to 8 tokens"),
        ({"tokens_per_pass": 2}, {"jacobi": 4}, "jacobi is 4: this model predicts 2 tokens a pass already"),
        ({}, {"jacobi": 4, "static": True}, "jacobi is 4: it has no step of static shapes, leave static out"),
    ],
)
def test_what_cannot_be_drawn_so(changes, options, message):
    refused(message, lambda: generate(make_ar(**changes), LABELS, **options))
