"""LogitsProcessor for transformers' `generate`: guidance that changes over the tokens, and our own sampler."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dar_lightning.ar.conditions.class_label import check_labels
from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.guidance import Guidance, guide, scales_and_combine
from dar_lightning.ar.gumbel import draw_keys
from dar_lightning.ar.order import placed
from dar_lightning.ar.sampling import check_options, draw_tokens, filter_logits
from dar_lightning.errors import UserError, require
from dar_lightning.formats.pretrained import build_config
from dar_lightning.layers import Generators


class GuidedLogitsProcessor:
    """Classifier-free guidance for a Llama that `dar export --format transformers` wrote, and the choice of its tokens.

    `llama.generate(processor.input_ids, logits_processor=[processor])` draws the tokens that `ar.sampling.generate`
    does, up to rounding; `processor.codes` takes them out. The unconditional sequences are further rows of the batch,
    so there is one KV cache, and one pass a token. It leaves one token possible in each row: temperature, top_k, top_p
    and do_sample of transformers have no say. For one call of `generate`; transformers itself is not imported here.

    Args:
        llama_config: of the model, `llama.config`, or config.json as a dict.
        labels: (B,) int64 classes, on the model's device. It and the others are as in `ar.sampling.stream_tokens`.

    Raises:
        UserError: if the Llama is not from here, or for a value outside the ranges there.
    """

    def __init__(
        self,
        llama_config: Any,
        labels: Tensor,
        guidance: Guidance = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        prefix: Tensor | None = None,
        generator: Generators = None,
        token_groups: Sequence[int] | None = None,
    ):
        values = llama_config if isinstance(llama_config, Mapping) else vars(llama_config)
        about = values.get("dar_lightning")
        if not isinstance(about, Mapping) or not isinstance(about.get("config"), Mapping):
            raise UserError("llama_config has no section 'dar_lightning': it is of no Llama that dar export wrote")
        self.config = build_config(ARConfig, about["config"], "llama_config")
        codes, count = self.config.vocab_size, self.config.num_tokens
        prefix = labels.new_empty(len(labels), 0) if prefix is None else prefix.to(labels.device)
        check_options(self.config, labels, temperature, top_k, top_p, prefix, count)
        check_labels(labels, self.config.num_classes)
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.scales, self.combine = scales_and_combine(guidance, count, token_groups)
        self.guided = any(scale != 1.0 for scale in self.scales)
        self.keys = draw_keys(len(labels), count, generator, labels.device)
        self.input_ids = torch.cat([codes + labels[:, None], prefix], dim=1)  # (B or 2B, 1 + m): the prompts
        if self.guided:
            null = torch.full_like(labels, codes + self.config.num_classes)
            self.input_ids = torch.cat([self.input_ids, torch.cat([null[:, None], prefix], dim=1)])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B or 2B, ids) of the next token: 0 for the one that is drawn, -inf for all others."""
        rows, position = len(self.input_ids), input_ids.shape[1] - 1
        said = f"generate has {len(scores)} rows for {rows}: no num_beams, no num_return_sequences"
        require(len(scores) == rows, said)
        count = self.config.num_tokens
        require(position < count, f"generate goes on after {count} tokens: set max_length to {count + 1} or less")
        logits = scores[:, : self.config.vocab_size]
        logits = guide(logits, self.scales[position], self.combine) if self.guided else logits
        tokens = draw_tokens(filter_logits(logits / self.temperature, self.top_k, self.top_p), self.keys[:, position])
        tokens = tokens.repeat(2) if self.guided else tokens
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    def codes(self, output: Tensor) -> Tensor:
        """The pictures' codes in what `generate` returns, in the tokenizer's order: (B or 2B, 1 + N) -> (B, N)."""
        config, codes = self.config, output[: len(self.keys), 1:]
        order = config.fixed_order()
        whole = codes.shape[1] == config.num_tokens
        return placed(codes, order.to(codes.device).expand(len(codes), -1)) if whole else codes
