"""What transformers computes from an exported folder is what the AR model computes: logits, and tokens drawn."""

import pytest
import torch
from refusals import refused
from tiny_models import CLASSES, CODES, make_ar, random_codes, seeds

from dar_lightning.ar.logits_processor import GuidedLogitsProcessor
from dar_lightning.ar.sampling import generate
from dar_lightning.errors import UserError
from dar_lightning.weights import load_llama, save_llama

transformers = pytest.importorskip("transformers")

LABELS = torch.tensor([2, 0, 3])
NULL = CODES + len(CLASSES)
CONFIGS = {
    "plain": {},
    "grouped heads": dict(num_heads=4, num_kv_heads=2),
    "one key head, other constants": dict(num_kv_heads=1, rope_base=500.0, norm_eps=1e-2),
    "head of 20": dict(dim=40, num_tokens=24),
    "reversed": dict(order="reversed"),
}


@pytest.fixture(scope="module", params=CONFIGS)
def both(request, tmp_path_factory):
    """A model here, and its folder as transformers reads it."""
    ar, folder = make_ar(**CONFIGS[request.param]), tmp_path_factory.mktemp("llama")
    save_llama(ar, folder, CLASSES)
    return ar, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def test_logits(both):
    ar, llama = both
    count = ar.config.num_tokens
    assert type(llama) is transformers.LlamaForCausalLM
    labels, codes = torch.arange(5), torch.from_numpy(random_codes(5, count))  # the last label is "no class"
    expected = ar(labels, codes)
    found = llama(input_ids=torch.cat([CODES + labels[:, None], codes[:, :-1]], dim=1)).logits
    assert expected.abs().max() > 1
    assert (found[..., :CODES] - expected).abs().max() < 1e-5
    assert not found[..., CODES:].any()


def test_greedy_tokens(both):
    """Alone, with transformers' own guidance, and after kept codes; each as many as are left."""
    ar, llama = both
    order = ar.draw_order(3)
    prompt = CODES + LABELS[:, None]
    ours = generate(ar, LABELS, top_k=1).gather(1, order)  # as they are written
    assert torch.equal(llama.generate(prompt, do_sample=False)[:, 1:], ours)
    kept = torch.cat([prompt, ours[:, :3]], dim=1)
    assert torch.equal(llama.generate(kept, do_sample=False)[:, 1:], ours)
    guided = generate(ar, LABELS, top_k=1, guidance=2.5).gather(1, order)
    options = dict(guidance_scale=2.5, negative_prompt_ids=torch.full_like(prompt, NULL), do_sample=False)
    assert torch.equal(llama.generate(prompt, **options)[:, 1:], guided)
    assert not torch.equal(guided, ours)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(guidance=3.0, top_k=1),
        dict(guidance=(1.0, 4.0), temperature=0.9, top_k=12, top_p=0.9),
        dict(guidance=(4.0, 1.0), prefix=torch.from_numpy(random_codes(3, 5))),
    ],
)
def test_sampled_tokens(both, options):
    """Those of our sampler, for the same generators."""
    ar, llama = both
    if "prefix" in options and ar.config.order != "coarse_to_fine":
        pytest.skip("a prefix is the first tokens, which this model does not write first")
    ours = generate(ar, LABELS, generator=seeds(1, 2, 3), **options)
    processor = GuidedLogitsProcessor(llama.config, LABELS, generator=seeds(1, 2, 3), **options)
    output = llama.generate(processor.input_ids, logits_processor=[processor])
    assert torch.equal(processor.codes(output), ours)


def test_drawing_by_default_never_draws_a_class_and_never_stops_early(both):
    ar, llama = both
    torch.manual_seed(0)
    drawn = llama.generate(torch.full((40, 1), NULL))[:, 1:]
    assert drawn.shape == (40, ar.config.num_tokens)
    assert drawn.max() < CODES
    assert len(drawn.unique(dim=0)) == 40


def test_back_from_transformers(both, tmp_path):
    """Saved by transformers, in one file or split, it is the same model here."""
    ar, llama = both
    for folder, size in (("one", "1GB"), ("many", "20KB")):
        llama.save_pretrained(tmp_path / folder, max_shard_size=size)
        again = load_llama(tmp_path / folder)
        assert again.config == ar.config
        assert all(torch.equal(tensor, ar.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2


def test_what_the_processor_refuses(both):
    ar, llama = both
    processor = GuidedLogitsProcessor(llama.config.to_dict(), LABELS, guidance=2.0)  # config.json does as well
    with pytest.raises(UserError, match="12 rows for 6: no num_beams, no num_return_sequences"):
        llama.generate(processor.input_ids, logits_processor=[processor], num_return_sequences=2)
    count = ar.config.num_tokens
    with pytest.raises(UserError, match=f"after {count} tokens: set max_length to {count + 1}"):
        llama.generate(processor.input_ids, logits_processor=[processor], max_length=count + 2)
    refused("has no section 'dar_lightning'", lambda: GuidedLogitsProcessor(transformers.LlamaConfig(), LABELS))
    refused("temperature is 0", GuidedLogitsProcessor, llama.config, LABELS, temperature=0)
    refused("labels are from 0 to 9", GuidedLogitsProcessor, llama.config, torch.tensor([0, 9]))
