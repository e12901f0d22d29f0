"""torch.compile, block by block."""

from torch import nn


def compile_blocks(*parts: nn.Module, mode: str | None = None) -> None:
    """Compile the transformer blocks of models, in place; parameters keep their names.

    All blocks of a part share their code, so compiling takes the time of one, and everything around them (masks,
    patches, losses) stays as it is.

    Args:
        *parts: modules with a list `blocks`.
        mode: torch.compile's; "reduce-overhead" uses CUDA graphs.
    """
    for part in parts:
        for block in part.blocks:
            block.compile(mode=mode)
