"""Linear probe: the accuracy of a linear classifier, trained on real photographs, on other images' features."""

import torch
from torch import Tensor
from torch.nn import functional as F

L2 = 0.01  # weight of the penalty; suits standardised features of some hundred dimensions and a thousand images
CLASSIFIER = f"logistic regression on standardised features, l2 {L2:g}"


class LinearProbe:
    """Multinomial logistic regression on standardised features (n, D) with labels 0, 1, ... (n,) int64.

    Minimises the mean cross-entropy + l2 / 2 * |W|^2, a convex problem, with L-BFGS in float64 from zero: no seed.
    """

    @torch.enable_grad()
    def __init__(self, features: Tensor, labels: Tensor, l2: float = L2) -> None:
        features = features.double()
        self.mean, std = features.mean(dim=0), features.std(dim=0)
        self.scale = torch.where(std > 1e-6 * std.max(), std, 1.0)  # a constant feature is centred, not blown up
        self.num_classes = int(labels.max()) + 1
        self.weight = torch.zeros(self.num_classes, features.shape[1] + 1).double().requires_grad_()  # the bias is last
        options = {"max_iter": 200, "tolerance_grad": 1e-6, "tolerance_change": 1e-10}
        optimizer = torch.optim.LBFGS([self.weight], **options, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(self(features), labels) + l2 / 2 * self.weight[:, :-1].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        self.weight.requires_grad_(False)

    def __call__(self, features: Tensor) -> Tensor:
        """(n, D) features -> (n, num_classes) logits."""
        return F.linear((features.double() - self.mean) / self.scale, self.weight[:, :-1], self.weight[:, -1])

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of the features (n, D) whose most likely class is their label (n,)."""
        return (self(features).argmax(dim=1) == labels).double().mean().item()
