"""ImageNetDataModule: labelled WebDataset shards, ImageNet's or any others, as uint8 batches."""

from typing import Literal

from PIL import Image
from torch.utils.data import Dataset

from dar_lightning.data import transforms
from dar_lightning.data.decode import BadSample, decode_rgb
from dar_lightning.data.shards import ShardIndex, ShardReader, image_member
from dar_lightning.data.stream import Loader, StreamDataModule, Ticket, sample_generator, shuffled
from dar_lightning.errors import UserError

SHUFFLE_SHARDS = 16  # shards whose samples are mixed; some 20,000 images of ImageNet

Crop = Literal["adm", "ten_crop", "center"]


class ShardDataset(Dataset):
    """Decoded and cropped samples; an item is a function of its ticket alone."""

    def __init__(
        self, index: ShardIndex, image_size: int, crop: Crop, flip: bool, seed: int, num_classes: int | None
    ) -> None:
        self.reader = ShardReader(index)
        self.image_size, self.crop, self.flip, self.seed, self.num_classes = image_size, crop, flip, seed, num_classes

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, ticket: Ticket | int) -> dict:
        ticket = Ticket(ticket) if isinstance(ticket, int) else ticket
        shard, key, members = self.reader[ticket.index]
        return {
            "image": transforms.to_tensor(self.cropped(decode(members, shard, key), ticket)),  # (3, S, S) uint8
            "label": read_label(members, shard, key, self.num_classes),
            "key": key,
            "index": ticket.index,
            "valid": ticket.valid,
        }

    def cropped(self, image: Image.Image, ticket: Ticket) -> Image.Image:
        generator = sample_generator(self.seed, ticket.epoch, ticket.index)
        if self.crop == "ten_crop":
            return transforms.ten_crop(image, self.image_size, int(generator.integers(10)))
        if self.crop == "adm":
            image = transforms.random_crop(image, self.image_size, generator)
        else:
            image = transforms.center_crop(image, self.image_size)
        return transforms.random_flip(image, generator) if self.flip else image


def decode(members: dict[str, bytes], shard: str, key: str) -> Image.Image:
    """The RGB image of a sample."""
    try:
        return decode_rgb(image_member(members, shard, key))
    except BadSample as error:
        raise UserError(f"{shard}: the image of {key} cannot be decoded ({error})") from error


def read_label(members: dict[str, bytes], shard: str, key: str, num_classes: int | None) -> int:
    """The class number of a sample, from its `.cls` member."""
    if "cls" not in members:
        raise UserError(f"{shard}: {key} has no .cls member, which must hold its class number")
    text = members["cls"].decode(errors="replace").strip()
    right = f"0 to {num_classes - 1}" if num_classes else "0, 1, ..."
    if not (text.isascii() and text.isdigit()) or (num_classes and int(text) >= num_classes):
        raise UserError(f"{shard}: {key}.cls is {text!r}, the classes are {right}")
    return int(text)


class ImageNetDataModule(StreamDataModule):
    """Images and labels out of WebDataset shards (`KEY.jpg|png|webp`, `KEY.cls`).

    Batches are dictionaries: `image` (B, 3, S, S) uint8, `label` (B,) int64, `key` (list of B strings), `index` (B,)
    int64 (the sample's number in the order of the shards) and `valid` (B,) bool, False for the samples that only fill
    up the last batch of a rank in validation. `transforms.to_float` brings images to [-1, 1] on the device.

    The same seed gives the same batches and pixels for any number of workers, and over any number of devices if the
    global batch is kept. Training drops the remainder of an epoch; validation has every sample once.

    Args:
        train: Training shards: a folder, one tar, or a brace pattern such as `shards/{000000..000099}.tar`.
        val: Validation shards, likewise; always seen through the ADM centre crop.
        image_size: Side of the square crops, in pixels.
        batch_size: Samples per batch and device.
        num_workers: Worker processes that decode and crop; 0 does it in the training process.
        crop: Of training images. `adm`: random short side in [S, S / 0.8], random place (tokenizer); `ten_crop`: one
            of ten, at 1.1 S (AR); `center`.
        flip: Mirror half of the training images (`ten_crop` does so in any case).
        seed: Order, crops and flips.
        num_classes: Labels are 0 to num_classes - 1. Left out, it is the number of class names in the shards' index.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        image_size: int = 256,
        batch_size: int = 32,
        num_workers: int = 0,
        crop: Crop = "adm",
        flip: bool = True,
        seed: int = 0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.train, self.val, self.image_size, self.crop, self.flip = train, val, image_size, crop, flip
        self._num_classes = num_classes
        self._index: dict[str, ShardIndex] = {}

    def index(self, split: Literal["train", "val"]) -> ShardIndex:
        """The shards of a split, read at first use.

        Raises:
            UserError: The split has no shards, or they are not as they should be.
        """
        if split not in self._index:
            source = getattr(self, split)
            if source is None:
                raise UserError(f"data.{split}: not set; give a folder of shards or a pattern of them")
            self._index[split] = ShardIndex.load(source, f"data.{split}")
        return self._index[split]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels; empty if the shards have no index."""
        return self.index("val" if self.train is None else "train").classes

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        if self._num_classes is not None:
            return self._num_classes
        if not self.classes:
            raise UserError("data.num_classes: the shards have no index.json with class names, so give the number")
        return len(self.classes)

    def train_dataloader(self) -> Loader:
        """Shuffled batches, endless in principle; see `stream.TrainLoader`."""
        index = self.index("train")
        sizes = [shard.samples for shard in index.shards]
        dataset = ShardDataset(index, self.image_size, self.crop, self.flip, self.seed, self.num_classes)
        return self._train_loader(dataset, lambda epoch: shuffled(sizes, self.seed, epoch, SHUFFLE_SHARDS))

    def val_dataloader(self) -> Loader:
        """Every validation sample once; empty without validation shards."""
        if self.val is None:
            return []
        index = self.index("val")
        return self._eval_loader(ShardDataset(index, self.image_size, "center", False, self.seed, self.num_classes))

    test_dataloader = predict_dataloader = val_dataloader
