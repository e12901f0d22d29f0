"""Linear probe: can a linear classifier, trained on real photographs, name the class of these images?"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearProbe(nn.Module):
    """Multinomial logistic regression on standardised features; what it returns does not depend on any seed.

    Fits W, b by minimising the mean cross-entropy + l2 / 2 * |W|^2, a convex problem, with L-BFGS in float64 from zero.

    Args:
        features: training features, (n, D).
        labels: classes 0 to num_classes - 1, (n,) int64.
        l2: weight of the penalty. With standardised features 0.01 suits some hundred dimensions and a thousand images.
    """

    def __init__(self, features: Tensor, labels: Tensor, l2: float = 0.01) -> None:
        super().__init__()
        features = features.double()
        self.mean = features.mean(dim=0)
        # A feature that is constant in training says nothing: it is centred but not blown up.
        std = features.std(dim=0)
        self.scale = torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std))
        num_classes = int(labels.max()) + 1
        self.weight = nn.Parameter(torch.zeros(num_classes, features.shape[1], dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(num_classes, dtype=torch.float64))

        optimizer = torch.optim.LBFGS(
            self.parameters(), max_iter=200, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(self(features), labels) + l2 / 2 * self.weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        self.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        """(n, D) features -> (n, num_classes) logits."""
        return F.linear((features.double() - self.mean) / self.scale, self.weight, self.bias)

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of the features (n, D) whose most likely class is their label (n,)."""
        return (self(features).argmax(dim=1) == labels).double().mean().item()
