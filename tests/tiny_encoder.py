"""Tiny text encoders of transformers, with random weights, in a folder."""

from pathlib import Path
from typing import Any

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "apple"]


def write_encoder(folder: Path, kind: str) -> Any:
    """Write a "bert", "t5" or "clip" (text and vision) of width 16 with a tokenizer of WORDS; the network."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    if kind == "bert":
        config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)
        network = transformers.BertModel(config)
    elif kind == "clip":
        text = sizes | dict(vocab_size=len(WORDS), max_position_embeddings=32, eos_token_id=3, bos_token_id=2)
        vision = sizes | dict(image_size=16, patch_size=8)
        network = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    else:
        config = transformers.T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        network = transformers.T5ForConditionalGeneration(config)
    network.eval().save_pretrained(folder)
    return network
