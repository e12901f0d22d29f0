"""Our weight format: a folder with config.json and model.safetensors, written atomically and read strictly.

Also the Hugging Face Hub: `from_pretrained` takes a repository name, `push_to_hub` uploads. A local folder never needs
the network.
"""

import json
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dar_lightning.errors import UserError, naming, one_line, require
from dar_lightning.files import SHIPPED, atomic_path, find_shipped, read_json, write_text

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
FORMAT_VERSION = 1
SHIPPED_NAMES = ("fruit64",)

MODEL_CARD = """---
{{ card_data }}
---

One part of a D-AR model (Diffusion via Autoregressive Models): weights in `model.safetensors`, hyperparameters in
`config.json`. Load the folder with the class that `config.json` names, from the package `dar_lightning`:
`SequentialDiffusionTokenizer.from_pretrained(path_or_repo)` or `ARModel.from_pretrained(path_or_repo)`.
"""


class PretrainedMixin(
    ModelHubMixin,
    library_name="dar-lightning",
    license="apache-2.0",
    paper_url="https://arxiv.org/abs/2505.23660",
    tags=["d-ar", "image-generation"],
    model_card_template=MODEL_CARD,
):
    """save_pretrained, from_pretrained and push_to_hub for a module that is built from one plain config dataclass.

    A subclass names that dataclass in `config_class` and keeps it in `self.config`, and names its folder within a
    pipeline's in `pipeline_part`. `averaged`, saved with the weights, says whether they are an average over training
    steps (EMA); None if nobody has noted it.
    """

    config_class: type
    pipeline_part: str
    averaged: bool | None = None

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write config.json, model.safetensors and a short README.md into a folder, which is made if missing.

        Older weights in it are replaced. `kwargs` are those of huggingface_hub.ModelHubMixin (push_to_hub, ...).
        UserError if the folder cannot be written.
        """
        with naming(f"cannot write weights to {save_directory}", OSError):
            return super().save_pretrained(save_directory, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        # The mixin has removed config.json. It comes back last, so an interrupted save leaves a folder that is refused
        # instead of new weights beside an old config.
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with atomic_path(save_directory / WEIGHTS_NAME) as part:
            save_file(tensors, part, metadata={"format": "pt"})
        header = {"model_type": type(self).__name__, "format_version": FORMAT_VERSION}
        header |= {} if self.averaged is None else {"ema": self.averaged}
        write_text(save_directory / CONFIG_NAME, json.dumps(header | self.config.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub_options: Any):
        """Load the model from a folder that save_pretrained wrote, or from a Hugging Face Hub repository.

        Args:
            pretrained_model_name_or_path: a local folder, of the model or of a pipeline; "fruit64" for the weights that
                come with the package; or a repository name such as "someone/dar-l".
            hub_options: of huggingface_hub.snapshot_download (revision, cache_dir, local_files_only, token, ...).

        Returns:
            The model on the CPU, in evaluation mode, float32 unless all its weights are stored in one other dtype.

        Raises:
            UserError: if the folder, its config or its weights are missing, broken, or of another model.
        """
        folder = resolve_folder(pretrained_model_name_or_path, [CONFIG_NAME, WEIGHTS_NAME], **hub_options)
        if not (folder / WEIGHTS_NAME).exists() and (folder / cls.pipeline_part).is_dir():  # a pipeline's
            folder = folder / cls.pipeline_part
        origin = folder / CONFIG_NAME
        values = read_json(origin)
        for name, needed in (("model_type", cls.__name__), ("format_version", FORMAT_VERSION)):
            found = values.pop(name, None)
            require(found == needed, f"{origin}: {name} is {found!r}, need {needed!r}")
        averaged = values.pop("ema", None)
        require(isinstance(averaged, bool | None), f"{origin}: ema is {averaged!r}, need true or false")
        config = build_config(cls.config_class, values, origin)
        model = build_model(cls, config, read_safetensors(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME)
        model.averaged = averaged
        return model.eval()


def resolve_folder(path_or_repo: str | Path, allow_patterns: list[str] | None = None, **hub_options: Any) -> Path:
    """A local folder, a pipeline that comes with the package ("fruit64"), or files from the Hugging Face Hub.

    UserError if there is neither such a folder nor such a repository.
    """
    path = Path(find_shipped(str(path_or_repo)))
    if path.is_dir():
        return path
    if str(path_or_repo) in SHIPPED_NAMES:
        return SHIPPED / str(path_or_repo)
    require(not path.exists(), f"{path_or_repo} is not a folder: need one with {CONFIG_NAME} and {WEIGHTS_NAME}")
    # A repository's name has one slash at most: whatever is a path on this machine, mistyped, asks no network.
    if path.is_absolute() or str(path_or_repo).startswith(".") or (path.parent != Path() and path.parent.is_dir()):
        raise UserError(f"{path_or_repo} is not a folder: no such folder")
    try:
        return Path(snapshot_download(str(path_or_repo), allow_patterns=allow_patterns, **hub_options))
    except (OSError, HFValidationError, ImportError) as error:  # the last of a SOCKS proxy that httpx cannot use
        raise UserError(f"{path_or_repo} is not a folder, nor a repository in reach: {one_line(error)}") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU; UserError if it is missing, truncated, or not safetensors."""
    require(path.is_file(), f"{path} is missing: need a safetensors file")
    with naming(f"cannot read {path}", OSError, SafetensorError):
        return load_file(path)


def build_config(config_class: type, values: Mapping[str, Any], origin: Any):
    """A config dataclass from plain values; a value that is absent keeps its default, so that old files stay readable.

    Names that the dataclass lists as REMOVED are left out. UserError for a name that it does not have, a value of
    another type, or an impossible one.
    """
    hints = typing.get_type_hints(config_class)
    hints = {name: hints[name] for name in config_class.__dataclass_fields__}
    values = {name: value for name, value in values.items() if name not in getattr(config_class, "REMOVED", ())}
    if unknown := sorted(str(name) for name in values if name not in hints):
        raise UserError(f"{origin}: {config_class.__name__} has no {', '.join(unknown)}")
    for name, value in values.items():
        if not _is_of(value, hints[name]):
            raise UserError(f"{origin}: {name} is {value!r}, need {getattr(hints[name], '__name__', hints[name])}")
    try:
        # 2 and 2.0 are one value: kept as one, since the config is part of a model's SHA-256.
        return config_class(**{n: float(value) if hints[n] is float else value for n, value in values.items()})
    except (UserError, OverflowError) as error:
        raise UserError(f"{origin}: {error}") from error


def _is_of(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    kinds = typing.get_args(hint) or (hint,)  # those of a union
    return type(value) in kinds or (hint is float and type(value) is int)


def build_model(
    model_class: type, config: Any, tensors: Mapping[str, Tensor], origin: Any, names: Callable[[str], str] = str
) -> nn.Module:
    """A model with every one of these weights: on the CPU, or on the meta device if the tensors are.

    It is built on the meta device: sizes that a config claims cost no memory before they are compared with the weights,
    and no random numbers are drawn. If all weights share one floating dtype, the model takes it. UserErrors start with
    `origin`, and `names` gives the file's name for a tensor of the model.
    """
    model = build_on_meta(model_class, config, len(tensors), origin)
    wanted = {names(name): tensor for name, tensor in model.state_dict().items()}
    compare_tensors(wanted, tensors, origin, model_class.__name__)
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    if not any(tensor.is_meta for tensor in tensors.values()):
        model.to_empty(device="cpu").load_state_dict({name: tensors[names(name)] for name in model.state_dict()})
    return model


def build_on_meta(model_class: type, config: Any, num_tensors: int, origin: Any) -> nn.Module:
    """A model without memory for its weights, on the meta device; `num_tensors` is how many the file holds.

    UserError, which starts with `origin`, for a depth beyond that number, or sizes that no model has.
    """
    for name, value in config.to_dict().items():
        if name.endswith("depth") and value > num_tensors:
            raise UserError(f"{origin}: {name} is {value}, the weights are only {num_tensors} tensors")
    try:
        with torch.device("meta"):
            return model_class(config)
    except UserError as error:  # of the config, or of a package that it needs
        raise UserError(f"{origin}: {error}") from error
    except (RuntimeError, OverflowError, TypeError) as error:
        raise UserError(f"{origin}: no {model_class.__name__} has these sizes: {one_line(error)}") from error


def compare_tensors(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], origin: Any, model: str) -> None:
    """Refuse weights whose names or shapes are not those of `wanted`, of a `model`, or that hold NaN or infinity."""
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in wanted]
    kinds = {name: (_kind(tensors[name]), _kind(tensor)) for name, tensor in wanted.items() if name in tensors}
    problems += [f"{name} is {found}, need {needed}" for name, (found, needed) in kinds.items() if found != needed]
    # Values come after shapes: a file may claim a shape that no machine can hold.
    if not problems:
        values = [name for name in wanted if not tensors[name].is_meta and not tensors[name].isfinite().all()]
        problems = [f"{name} holds NaN or infinity" for name in values]
    if problems:
        more = f"; and {len(problems) - 4} more problems" if len(problems) > 4 else ""
        raise UserError(f"{origin} does not fit {model}: {'; '.join(problems[:4])}{more}")


def _kind(tensor: Any) -> str:
    """What must agree: the shape, and whether it holds floating-point numbers and is dense."""
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    kind = "" if tensor.is_floating_point() else " of whole numbers"
    return f"{tuple(tensor.shape)}{kind}{'' if tensor.layout == torch.strided else f' {tensor.layout}'}"
