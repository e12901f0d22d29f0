"""Merging a model's two tables of token places into one, for a model that writes in one order."""

from dataclasses import replace

import torch

from dar_lightning.ar.model import ARModel


def merge_place_tables(ar: ARModel) -> None:
    """Add the table of read tokens' places to that of their successors', in place; logits in the model's order stay.

    In one order o, what is read before the token at place o(p) is always the token at place o(p - 1), so one vector
    stands for both (RAR, arXiv 2411.00776, section 3): U[o(p)] = target[o(p)] + own[o(p - 1)]. Other orders can be
    written no more. Nothing is done where there are no two tables, or no one order (config.order "random_per_sample").
    """
    if ar.own_place_embedding is None or "order" not in ar.tables():
        return
    with torch.no_grad():
        ar.place_embedding.weight[ar.order[1:]] += ar.own_place_embedding.weight[ar.order[:-1]]
    ar.own_place_embedding = None
    ar.config = replace(ar.config, place_tables="target")
