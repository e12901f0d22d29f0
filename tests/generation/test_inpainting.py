"""Editing an image: known pixels to the bit, the identities of start and evidence, and what spreads into a hole."""

import pytest
import torch
from refusals import refused
from tiny_models import CLASSES, GROUPS, SIZE, TOKENS, make_ar, make_pipeline, make_tokenizer, seeds

from dar_lightning import DARPipeline
from dar_lightning.generation.drawing import Job, draw_images
from dar_lightning.generation.editing import draw_alike, mix_noise
from dar_lightning.generation.inpainting import Edit, fill, spread
from dar_lightning.tokenizer.flow import SOLVERS, shift_time

LABELS = torch.tensor([0, 3, 1])
HALF = (torch.arange(SIZE) < SIZE // 2).expand(1, 1, SIZE, -1)


def photos(count: int = 3) -> torch.Tensor:
    """Smooth images in [-1, 1]."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    return torch.nn.functional.interpolate(coarse, size=SIZE, mode="bicubic").clamp(0, 1) * 2 - 1


def draw(pipe: DARPipeline, labels=LABELS, numbers=(1, 2, 3), **options):
    return list(pipe.stream(labels, guidance=2.0, generator=seeds(*numbers), **options))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def pipe(request) -> DARPipeline:
    return make_pipeline().to(request.param)


def test_an_image_of_which_nothing_is_used_changes_no_bit(pipe):
    plain = draw(pipe)
    none = torch.zeros(3, 1, SIZE, SIZE, dtype=torch.bool)
    for options in ({"known": none}, {"start": 0, "evidence": 0.0}, {"known": none, "evidence": 0.0}):
        edited = draw(pipe, image=photos(), **options)
        for before, after in zip(plain, edited, strict=True):
            assert torch.equal(before.images, after.images)
            assert torch.equal(before.codes, after.codes)


def test_known_pixels_are_kept_to_the_bit_in_every_preview(pipe):
    images = photos()
    some = torch.rand(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) < 0.5
    for known in (some, torch.ones_like(some[:1])):
        for start in (0, 2):
            previews = draw(pipe, image=images, known=known, start=start)
            assert [preview.group for preview in previews] == list(range(start + 1, GROUPS + 1))
            assert all(torch.equal((preview.images - images) * known, 0 * images) for preview in previews)
    plain = draw(pipe, image=images, known=some)[-1].images
    assert ((plain - images).abs() * ~some).amax(dim=(1, 2, 3)).min() > 0.01, "the rest is drawn"


@pytest.mark.parametrize("prediction", ["image", "velocity"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [None, 7, 33])
def test_the_solver_itself_keeps_known_pixels(prediction, solver, steps):
    tokenizer, images = make_tokenizer(prediction=prediction), photos()
    noise = tokenizer.draw_noise(3, torch.Generator().manual_seed(0))
    edit = Edit(tokenizer, noise, images, HALF)
    codes = tokenizer.tokenize(photos().flip(0))
    for preview in tokenizer.stream([codes], edit.state, solver, steps, correct=edit.correct):
        assert ((preview - images) * HALF).abs().max() < 1e-4


@pytest.mark.parametrize("order", ["coarse_to_fine", "reversed", "interleaved", "random_per_sample"])
def test_much_evidence_gives_the_images_own_tokens(order):
    """Whatever the order of writing: the evidence is that of a token's place."""
    options = {"order_groups": GROUPS} if order == "interleaved" else {}
    pipe = DARPipeline(make_tokenizer(), make_ar(order=order, **options), CLASSES)
    codes = draw(pipe, image=photos(), evidence=1e5)[-1].codes
    assert torch.equal(codes, pipe.tokenizer.tokenize(photos()))
    assert not torch.equal(draw(pipe)[-1].codes, codes)


@pytest.mark.parametrize(
    ("quantizer", "sizes"),
    [("lfq", (32, 5)), ("bsq", (32, 5)), ("fsq", (27, 3)), ("ibq", (32, 4)), ("simvq", (32, 4))],
)
def test_evidence_with_other_quantizers(quantizer, sizes):
    """Signs are the likeliest by cosine; codes of other lengths weigh no more for being longer."""
    sizes = dict(zip(("codebook_size", "codebook_dim"), sizes, strict=True))
    tokenizer = make_tokenizer(quantizer=quantizer, **sizes)
    edit = Edit(tokenizer, tokenizer.draw_noise(3), photos(), evidence=8.0)
    bias = torch.stack([edit.bias(torch.full((3,), place)) for place in range(TOKENS)], dim=1)  # (B, N, V)
    limits = 8.0 * 0.5 ** torch.arange(GROUPS).repeat_interleave(TOKENS // GROUPS)
    assert (bias.abs().amax(dim=(0, 2)) <= limits + 1e-5).all()
    if quantizer in ("lfq", "bsq"):
        assert torch.equal(bias.argmax(dim=-1), tokenizer.tokenize(photos()))


def test_evidence_is_the_weighted_cosine_of_the_filled_image():
    pipe, images = make_pipeline(), photos()
    tokenizer = pipe.tokenizer
    edit = Edit(tokenizer, tokenizer.draw_noise(3), images, HALF, evidence=6.0)
    latents = tokenizer.encoder(fill(images, HALF), running_statistics=True)
    codes = tokenizer.quantizer.lookup(torch.arange(tokenizer.config.codebook_size))
    for place, weight in ((0, 6.0), (1, 6.0), (2, 3.0), (7, 0.75)):
        expected = weight * torch.cosine_similarity(latents[:, place, None], codes[None], dim=-1)
        assert torch.allclose(edit.bias(torch.full((3,), place)), expected, atol=1e-5)


@pytest.mark.parametrize("steps", [2, 4, 6])
def test_a_start_is_a_time_on_the_noised_image(steps):
    """Euler's method by hand, from uniform time start / K on."""
    tokenizer, images, start = make_tokenizer(), photos(), 1
    config, noise = tokenizer.config, tokenizer.draw_noise(3, torch.Generator().manual_seed(0))
    edit, codes = Edit(tokenizer, noise, images, start=start, evidence=0.0), tokenizer.tokenize(photos().flip(0))
    previews = list(tokenizer.stream([codes], edit.state, "euler", steps, start=start))
    assert len(previews) == GROUPS - start
    u = [start / GROUPS, *(i / steps for i in range(steps + 1) if i / steps > start / GROUPS)]
    t = [shift_time(each, config.time_shift) for each in u]
    x = t[0] * config.data_std * images + (1 - t[0]) * noise
    cond = tokenizer.condition(codes)
    for i in range(len(t) - 1):
        token = tokenizer.schedule.start(tokenizer.schedule.group_of_step(steps - len(t) + 1 + i, steps))
        with torch.no_grad():
            v = tokenizer.decoder(x, torch.full((3,), t[i]), cond[:, token : token + config.window])
        x = x + (t[i + 1] - t[i]) * v
    assert torch.allclose(previews[-1], x / config.data_std, atol=1e-5)


def test_later_starts_are_nearer_to_the_image():
    pipe, images = make_pipeline(), photos()
    ends = [draw(pipe, image=images, start=start, evidence=0.0)[-1].images for start in range(GROUPS)]
    distances = [(end - images).square().mean().item() for end in ends]
    assert distances == sorted(distances, reverse=True)


def test_a_row_alone_is_its_row_of_a_batch():
    pipe, images = make_pipeline(), photos()
    known = HALF.repeat(3, 1, 1, 1)
    known[1] = False  # of which nothing is known
    options = [{"start": 0}, {"start": 2}]
    for each in options:
        batch = draw(pipe, image=images, known=known, **each)[-1].images
        for row in range(3):
            some = slice(row, row + 1)
            alone = draw(pipe, LABELS[some], (row + 1,), image=images[some], known=known[some], **each)[-1].images
            assert torch.allclose(alone, batch[some], atol=1e-5)


@pytest.mark.parametrize(("count", "masks"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_one_image_or_mask_is_for_all(count, masks):
    pipe, images = make_pipeline(), photos(count)
    known = torch.rand(masks, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) < 0.5
    each = {"image": images.expand(3, -1, -1, -1), "known": known.expand(3, -1, -1, -1)}
    drawn, expected = draw(pipe, image=images, known=known)[-1].images, draw(pipe, **each)[-1].images
    assert torch.allclose(drawn, expected, atol=1e-5)
    assert torch.equal(drawn * known, images * known + 0 * drawn)


def test_overlapped_and_in_turns_are_equal(pipe):
    options = {"image": photos(), "known": HALF, "start": 1}
    ahead, turns = (draw(pipe, overlap=overlap, **options)[-1].images for overlap in (True, False))
    assert torch.equal(ahead, turns)


def test_generate_counts_groups_from_the_first_also_with_a_start():
    pipe, options = make_pipeline(), {"image": photos(), "start": 1}
    previews = draw(pipe, **options)
    some = pipe.generate(LABELS, groups=3, guidance=2.0, generator=seeds(1, 2, 3), **options)
    assert torch.equal(some, previews[1].images)
    refused(r"^groups is 1: .* from 1 to 4, those after start 1 from 2$", pipe.generate, LABELS, groups=1, **options)


def test_spread_is_linear_and_fades_as_the_closed_form_says():
    known = (torch.arange(64) < 20).expand(1, 1, 8, -1)
    x, y = torch.randn(2, 1, 3, 8, 64, generator=torch.Generator().manual_seed(0))
    both = spread(2 * x - 3 * y, known, 4)
    assert torch.allclose(both, 2 * spread(x, known, 4) - 3 * spread(y, known, 4), atol=1e-5)
    assert torch.equal(spread(torch.zeros_like(x), known, 4), torch.zeros_like(x))
    assert torch.equal(torch.where(known, spread(x, known, 4), x), x)
    # A gap between columns of ones: each value is a share of the mean of its four neighbours, two of them its equals.
    share = 4 / (4 + 1 / 4**2)
    for width, expected in ((1, share / (2 - share)), (2, share / (4 - 3 * share))):
        gap = (torch.arange(64) < 20) | (torch.arange(64) >= 20 + width)
        found = spread(torch.ones_like(x), gap.expand(1, 1, 8, -1), 4)[..., 20 : 20 + width]
        assert torch.allclose(found, torch.full_like(found, expected), rtol=0.01)
    flat = spread(torch.ones_like(x), known, 4)[0, 0, 0, 20:]
    assert (flat[:16] > flat[1:17]).all()
    assert flat[16:].max() == 0, "farther than the sweeps"


def test_fill_keeps_what_is_known_and_is_smooth_between():
    hole = torch.ones(1, 1, SIZE, SIZE, dtype=torch.bool)
    hole[..., 9:22, 5:27] = False
    constant = torch.full((2, 3, SIZE, SIZE), 0.3)
    assert torch.allclose(fill(constant, hole), constant, atol=1e-6)
    ramp = torch.linspace(-1, 1, SIZE).expand(1, 3, SIZE, SIZE).contiguous()
    assert (fill(ramp, hole) - ramp).abs().max() < 0.1, "Laplace's equation has it as its solution"
    noise = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    out = fill(noise, hole)
    assert torch.equal(torch.where(hole, out, noise), noise)
    assert noise[hole.expand_as(noise)].min() <= out.min() <= out.max() <= noise[hole.expand_as(noise)].max()
    wide = fill(noise[..., :6, :], hole[..., :6, :] & (torch.arange(SIZE) < 3))
    assert wide[..., -1].abs().min() > 1e-3, "what is known goes on to the far end"


def test_noise_is_mixed_on_the_sphere():
    noise, new = torch.randn(2, 1, 3, 100, 100, generator=torch.Generator().manual_seed(0))
    for strength in (0.0, 0.3, 1.0):
        mixed = mix_noise(noise, new, strength)
        assert mixed.std().item() == pytest.approx(1, abs=0.02)
        assert (mixed * new).mean().item() == pytest.approx(strength, abs=0.02)
    assert torch.equal(mix_noise(noise, new, 0.0), noise)


def test_images_alike_keep_all_tokens_and_differ_by_strength():
    pipe = make_pipeline()
    ((previews, codes),) = draw_images(pipe, [Job(2, 5)], 7, 4, {"guidance": 2.0})
    jobs = [Job(2, number, codes) for number in (6, 7)]
    distances = []
    for strength in (0.0, 0.5, 1.0):
        found = list(draw_alike(pipe, jobs, 5, 7, strength, 4))
        assert [kept.tolist() for _, kept in found] == [codes.tolist()] * 2
        distances.append((found[0][0].float() - previews.float()).abs().mean().item())
        (alone,) = draw_alike(pipe, jobs[1:], 5, 7, strength, 1)
        assert (alone[0].int() - found[1][0].int()).abs().max() <= 1
    assert distances[0] < 0.01 < 0.1 < distances[1] < distances[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"known": HALF}, "known and start are of an image: give the image, too"),
        ({"start": 1}, "known and start are of an image: give the image, too"),
        ({"image": photos(2)}, r"image is torch.float32 \(2, 3, 32, 32\): need floats \(3 or 1, 3, 32, 32\)"),
        ({"image": photos()[..., :16]}, r"image is torch.float32 \(3, 3, 32, 16\): need floats"),
        ({"image": photos().int()}, "image is torch.int32 .*: need floats"),
        ({"image": photos(), "known": HALF[..., :8]}, r"known is torch.bool \(1, 1, 32, 8\): need bool \(3 or 1, 1,"),
        ({"image": photos(), "known": HALF.float()}, "known is torch.float32 .*: need bool"),
        ({"image": photos(), "start": GROUPS}, "start is 4: it must be from 0 to 3 groups"),
        ({"image": photos(), "start": -1}, "start is -1: it must be from 0 to 3 groups"),
        ({"image": photos(), "evidence": -1.0}, "evidence is -1.0: must be at least 0"),
        ({"image": photos(), "evidence": float("nan")}, "evidence is nan: must be at least 0"),
    ],
)
def test_mistakes(options, message):
    refused(f"^{message}", lambda: draw(make_pipeline(), **options))
