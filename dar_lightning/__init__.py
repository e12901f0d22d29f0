"""D-AR in PyTorch Lightning."""
