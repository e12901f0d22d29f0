"""Starting a training run from another model's weights."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from dar_lightning.errors import UserError


def init_from_pretrained(module: nn.Module, path_or_repo: str) -> Any:
    """Copy a saved model's weights into one of its class where name and shape agree, and list the others.

    `path_or_repo` is a folder of save_pretrained or a Hub repository. Returns the saved model's config.
    """
    saved = type(module).from_pretrained(path_or_repo)
    source, target = saved.state_dict(), module.state_dict()
    fitting = {name: source[name] for name in target if name in source and source[name].shape == target[name].shape}
    if not fitting:
        raise UserError(f"init_from {path_or_repo}: no tensor there fits this config")
    module.load_state_dict(fitting, strict=False)
    fresh = [name for name in target if name not in fitting]
    unused = [name for name in source if name not in fitting]
    rank_zero_info(f"init_from {path_or_repo}: loaded {len(fitting)} of {len(target)} tensors")
    for title, names in (("start fresh", fresh), ("were not used", unused)):
        if names:
            rank_zero_info(f"init_from {path_or_repo}: {len(names)} {title}: {', '.join(names)}")
    return saved.config
