"""A language model's folder as a backbone: the logits of transformers for the same text and codes; what is refused."""

import json
import shutil

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny_models import AR, CODES, TOKENS, make_ar, seeds

from dar_lightning import ARConfig, ARModel
from dar_lightning.ar.sampling import generate
from dar_lightning.training import ARModule
from dar_lightning.training.flops import step_flops
from dar_lightning.weights.backbone import read_backbone

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<none>", "<s>", "a", "red", "blue", "apple", "pear"]
SIZES = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(rms_norm_eps=1e-4, max_position_embeddings=64)
PROMPTS = ["a red apple", "pear"]


def write_tokenizer(path, words=WORDS) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $0", special_tokens=[("<s>", 1)])
    made.enable_truncation(2)  # which some folders have on
    made.save(str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Qwen3 with tied embeddings, as transformers writes it in bfloat16, and its tokenizer."""
    folder = tmp_path_factory.mktemp("qwen3")
    rope = {"rope_type": "default", "rope_theta": 500.0}
    config = transformers.Qwen3Config(
        vocab_size=9,
        head_dim=16,
        tie_word_embeddings=True,
        rope_parameters=rope,
        bos_token_id=1,
        eos_token_id=2,
        **SIZES,
    )
    torch.manual_seed(0)
    network = transformers.Qwen3ForCausalLM(config)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    network.to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder / "tokenizer.json")
    return folder


def config(folder, **changes) -> dict:
    """Sizes of AR that are not the folder's are left out; text of at most 5 tokens."""
    own = {n: v for n, v in AR.items() if n not in ("dim", "depth", "num_heads", "multiple_of")}
    text = {"condition": "backbone_text", "condition_options": {"length": 5}, "residual_dropout": 0, "ffn_dropout": 0}
    return own | text | {"backbone": "transformers", "backbone_options": {"folder": str(folder)}} | changes


@pytest.fixture(scope="module")
def module(folder) -> ARModule:
    module = ARModule(ARConfig(**config(folder)))
    torch.nn.init.normal_(module.ar.head.weight, std=0.3)
    return module.eval()


def codes() -> torch.Tensor:
    return torch.randint(CODES, (2, TOKENS), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_it_is_the_language_model(folder, module):
    """Logits from the network that transformers itself loads, fed each prompt without padding."""
    ar, found = module.ar, module.ar.config
    assert (found.dim, found.depth, found.num_heads, found.num_kv_heads) == (24, 2, 4, 2)
    assert (found.norm_eps, found.rope_base) == (1e-4, 500.0)
    kept = {"model_type": "qwen3", "intermediate_size": 40, "head_dim": 16, "max_position_embeddings": 64}
    assert found.backbone_options == kept
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model
    batch = ar.condition.from_prompts(PROMPTS)
    assert batch.tolist() == [[-1, 1, 2, 3, 5], [-1, -1, -1, 1, 6]]
    logits = ar(torch.cat([batch, ar.condition.null(1)]), codes()[[0, 1, 0]])
    for row, text in enumerate(([1, 2, 3, 5], [1, 6], [])):
        of_codes = ar.token_embedding(codes()[row % 2, :-1])
        x = torch.cat([network.embed_tokens(torch.tensor(text, dtype=torch.long)), ar.condition.begin.weight, of_codes])
        hidden = network(inputs_embeds=x[None]).last_hidden_state[0, len(text) :]
        torch.testing.assert_close(logits[row], hidden @ ar.head.weight.T, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits[0], logits[2], atol=0.1)
    frozen = [name for name, weight in ar.named_parameters() if not weight.requires_grad]
    assert frozen == ["condition_embedding.embedding.weight"]


def test_saved_weights_need_no_folder(folder, module, tmp_path, caplog):
    """Weights, text embeddings and tokenizer travel with the model, in any dtype."""
    module.ar.save_pretrained(tmp_path)
    assert str(folder) not in (tmp_path / "config.json").read_text()
    again = ARModel.from_pretrained(tmp_path)
    batch = again.condition.from_prompts(PROMPTS)
    assert torch.equal(batch, module.ar.condition.from_prompts(PROMPTS))
    drawn = [generate(ar, batch, guidance=2.0, generator=seeds(1, 2)) for ar in (module.ar, again)]
    assert torch.equal(*drawn)
    again.to(torch.bfloat16).save_pretrained(tmp_path)
    assert torch.equal(ARModel.from_pretrained(tmp_path).condition.from_prompts(PROMPTS), batch)
    assert again.condition.from_prompts(["red " * 9]).tolist() == [[1, 3, 3, 3, 3]]
    assert "has 10 tokens: cut to the first 5" in caplog.text
    refused("number 1 is '': say what to draw", again.condition.from_prompts, ["red", ""])
    refused(r"texts are of shape \(2,\): need \(B, 5\)", generate, again, torch.tensor([1, 2]))
    again.condition.tokenizer.zero_()
    again.condition._read.clear()
    refused(r"the model's tokenizer is no tokenizer\.json", again.condition.from_prompts, ["red"])


def test_flops_in_closed_form(module):
    """5 places of text and one more, then the codes but the last; of attention's scores half."""
    places = 5 + TOKENS
    linear = sum(weight.numel() for weight in module.ar.backbone.parameters() if weight.dim() == 2)
    scores = 2 * 2 * 2 * 4 * 16 * places * (places // 2)  # layers, products, 4 heads of 16
    head = 2 * TOKENS * module.ar.head.weight.numel()
    batch = {"codes": codes(), "caption": PROMPTS}
    assert step_flops(module, batch) == 2 * 3 * (2 * places * linear + scores + head)


def test_split_weights_and_other_conditions(folder, module, tmp_path):
    """The files into which transformers splits large models; a network saved without a head; classes."""
    transformers.AutoModel.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="4KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    ar = ARModule(ARConfig(**config(tmp_path, condition="class", condition_options={}))).ar
    theirs = module.ar.backbone.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ar.backbone.state_dict().items())


def changed(folder, path, **values):
    """A copy with other values in its config.json."""
    shutil.copytree(folder, path)
    said = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(said | values))
    return path


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "bert"}, r"config\.json: model_type is 'bert': need llama, qwen2, qwen3"),
        ({"auto_map": {"AutoModel": "x.Y"}}, r"config\.json: it has auto_map: code of others is not run"),
        ({"quantization_config": {"bits": 4}}, "it has quantization_config: quantized weights are not trained"),
        ({"hidden_size": 48}, "does not fit qwen3: layers.0.self_attn.q_proj.weight is .*, need"),
        ({"num_hidden_layers": 3, "layer_types": None}, r"does not fit qwen3: missing layers\.2\."),
        ({"hidden_size": "wide"}, "transformers does not read it: Validation error"),
        ({"vocab_size": 12}, r"does not fit its vocabulary: embed_tokens\.weight is \(9, 24\), need \(12, 24\)"),
    ],
)
def test_folders_that_are_refused(folder, tmp_path, values, said):
    refused(said, lambda: ARModule(ARConfig(**config(changed(folder, tmp_path / "x", **values)))))


def test_what_is_refused(folder, module, tmp_path):
    def refuse(said, where=folder, **changes):
        refused(said, lambda: ARModule(ARConfig(**config(where, **changes))))

    refuse("backbone_options: folder is nowhere: no such folder", "nowhere")
    refuse(r"config\.dim is 48: the language model in .* has 24; give that, or none", dim=48)
    options = {"folder": str(folder), "model_type": "llama"}
    refuse("model_type is not 'qwen3', which .* is; leave it out", backbone_options=options)
    other = changed(folder, tmp_path / "other")
    write_tokenizer(other / "tokenizer.json", [*WORDS, "of", "another", "model"])
    refuse(r"tokenizer\.json: it has tokens to 9, the model's table 9: need its own", other)
    (other / "tokenizer.json").write_text("{}")
    refuse(r"tokenizer\.json is no tokenizer\.json that Hugging Face tokenizers reads", other)
    (other / "tokenizer.json").unlink()
    refuse(r"tokenizer\.json is missing: condition 'backbone_text' needs it", other)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "q_norm" not in n}, other / "model.safetensors")
    refuse(
        r"does not fit qwen3: missing layers\.0\.self_attn\.q_norm\.weight",
        other,
        condition="none",
        condition_options={},
    )
    refuse(
        "has no vocabulary: it needs a language model with its weights: set backbone_options.folder",
        backbone_options={"model_type": "qwen3"},
    )
    refused(
        "compile: only our Llama's blocks are, backbone is 'transformers': leave it out",
        ARModule,
        module.ar.config,
        compile=True,
    )
    plain = make_ar().config
    assert read_backbone(plain) == (plain, None)


def test_adapters_over_a_folder(folder):
    """Its weights under frozen layers, and nothing else frozen."""
    pytest.importorskip("peft")
    options = {"folder": str(folder), "lora_rank": 2}
    ar = ARModule(ARConfig(**config(folder, backbone_options=options))).ar
    assert ar.config.backbone_options["lora_rank"] == 2
    network = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    state = ar.backbone.trunk.state_dict()
    for name, tensor in network.state_dict().items():
        assert name == "embed_tokens.weight" or torch.equal(state[name], tensor), name
    trained = {name.split(".")[0] for name, weight in ar.named_parameters() if weight.requires_grad}
    assert trained == {"condition_embedding", "token_embedding", "head", "backbone"}
