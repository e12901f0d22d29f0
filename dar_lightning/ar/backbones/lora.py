"""LoRA through peft: trainable low-rank matrices beside frozen linear layers, under names without `base_layer`."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dar_lightning.ar.config import ARConfig
from dar_lightning.errors import UserError, naming

INSIDE = ".base_layer."  # what peft puts into the names of the layers that it wraps
A, B = ".lora_A.default.weight", ".lora_B.default.weight"


def add_lora(module: nn.Module, rank: int, alpha: float, targets: list[str]) -> None:
    """Freeze a module and put adapters that change nothing yet into its linear layers, in place.

    The weights of wrapped layers keep their names in state dicts, so that those without adapters load too.

    Args:
        module: with nn.Linear layers.
        rank: of the product B A, which is added to a layer's weight with the factor alpha / rank.
        alpha: see rank.
        targets: last names of the layers, such as "q_proj"; empty: all.

    Raises:
        UserError: peft is missing, or the module has no such layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(
            f"backbone_options: lora_rank is {rank}, which needs peft: pip install 'dar-lightning[peft]'"
        ) from error
    linear = sorted({name.rpartition(".")[2] for name, part in module.named_modules() if isinstance(part, nn.Linear)})
    if unknown := [name for name in targets if name not in linear]:
        raise UserError(f"backbone_options: lora_targets has {', '.join(unknown)}: choose from {', '.join(linear)}")
    module.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets or linear)
    # peft moves what it makes to another device, which tensors without data (FLOPs are counted on them) do not stand
    with unset_fake_temporarily():
        inject_adapter_in_model(config, module, low_cpu_mem_usage=True)  # on meta
    for name, layer in module.named_modules():
        if name.endswith((".lora_A.default", ".lora_B.default")):
            weight = torch.empty(layer.weight.shape)
            nn.init.zeros_(weight) if ".lora_B." in name else nn.init.kaiming_uniform_(weight, a=5**0.5)
            layer.weight = nn.Parameter(weight)
    module.register_state_dict_post_hook(_shorten)
    module.register_load_state_dict_pre_hook(_lengthen)


def _shorten(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    for name in [name for name in state if name.startswith(prefix) and INSIDE in name]:
        state[name.replace(INSIDE, ".")] = state.pop(name)


def _lengthen(module: nn.Module, state: dict[str, Tensor], prefix: str, *_) -> None:
    for name, _ in module.named_parameters():
        short = prefix + name.replace(INSIDE, ".")
        if INSIDE in name and short in state:
            state[prefix + name] = state.pop(short)


def merge_lora(config: ARConfig, tensors: Mapping[str, Tensor]) -> tuple[ARConfig, dict[str, Tensor]]:
    """A model's config and state dict without adapters, which are added to the weights. Needs no peft.

    A model that has none stays as it is.

    Raises:
        UserError: the adapters do not fit the weights.
    """
    given = config.backbone_options
    rank, alpha = given.get("lora_rank"), given.get("lora_alpha")
    if config.backbone != "transformers" or type(rank) is not int or rank < 1:
        return config, dict(tensors)
    options = {name: value for name, value in given.items() if not name.startswith("lora_")}
    merged = {name: tensor for name, tensor in tensors.items() if not name.endswith((A, B))}
    for name in tensors:
        if name.endswith(A):
            layer = name.removesuffix(A)
            with naming(f"adapters of {layer} do not fit it", KeyError, RuntimeError, TypeError):
                factor = (rank if alpha is None else alpha) / rank
                weight = merged[f"{layer}.weight"]
                added = factor * tensors[f"{layer}{B}"].float() @ tensors[name].float()
                merged[f"{layer}.weight"] = (weight.float() + added.view_as(weight)).to(weight.dtype)
    return dataclasses.replace(config, backbone_options=options), merged
