"""KID, precision and recall, and the Inception Score, all computed by torch-fidelity."""

import torch
from torch import Tensor, nn

from dar_lightning.errors import UserError
from dar_lightning.metrics.features import InceptionFeatures

SUBSETS, SUBSET_SIZE, NEIGHBORS, SPLITS, SEED = 100, 1000, 3, 10, 2020  # torch-fidelity's defaults


def distribution_metrics(
    samples: Tensor, reference: Tensor, name: str, network: nn.Module, device: torch.device
) -> tuple[dict[str, float], dict[str, str]]:
    """KID, precision, recall, and for Inception its score.

    Args:
        samples: features (n, D).
        reference: features (m, D).
        name: of the feature network. Metrics of any but Inception carry it: KD-<name>, precision-<name>.
        network: whose features they are.
        device: where distances between all pairs are computed, 1,000 rows at a time.

    Returns:
        {metric: value} and {method: what it depends on}.
    """
    try:
        from torch_fidelity.metric_isc import isc_features_to_metric
        from torch_fidelity.metric_kid import kid_features_to_metric
        from torch_fidelity.metric_prc import prc_features_to_metric
    except ModuleNotFoundError as error:
        raise UserError("--full needs the package torch-fidelity, 0.4 or newer (pip install torch-fidelity)") from error
    fewest = min(len(samples), len(reference))
    if fewest <= NEIGHBORS:
        raise UserError(f"--full: {fewest} images on a side; {NEIGHBORS} neighbours need {NEIGHBORS + 1} or more")
    options = {"kid_subsets": SUBSETS, "kid_subset_size": (size := min(SUBSET_SIZE, fewest)), "rng_seed": SEED}
    kid = kid_features_to_metric(samples.double(), reference.double(), **options, verbose=False)
    options = {"prc_neighborhood": NEIGHBORS, "prc_batch_size": 1000, "save_cpu_ram": True, "verbose": False}
    prc = prc_features_to_metric(samples.to(device), reference.to(device), **options)
    kernel, suffix = ("KID", "") if name == "inception" else (f"KD-{name}", f"-{name}")
    metrics, spread = {kernel: kid["kernel_inception_distance_mean"]}, ""
    if size < fewest:  # subsets that are all of a set do not spread as draws from it would
        metrics[f"{kernel}_std"], spread = kid["kernel_inception_distance_std"], " and std"
    metrics |= {f"precision{suffix}": prc["precision"], f"recall{suffix}": prc["recall"]}
    protocol = {
        "kernel_distance": f"cubic kernel, unbiased, mean{spread} over {SUBSETS} subsets of {size}, seed {SEED}",
        "precision_recall": f"Kynkaanniemi et al., {NEIGHBORS} nearest neighbours, all images on both sides",
    }
    if isinstance(network, InceptionFeatures):
        logits = torch.cat([network.logits(part.to(device)).cpu() for part in samples.split(1000)])
        score = isc_features_to_metric(logits, SPLITS, shuffle=True, rng_seed=SEED)
        metrics |= {"IS": score["inception_score_mean"], "IS_std": score["inception_score_std"]}
        protocol["IS"] = f"mean and std over {SPLITS} splits, shuffled with seed {SEED}"
    return metrics, protocol
