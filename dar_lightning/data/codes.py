"""CodesDataModule: batches of cached tokens to train the AR model on."""

from typing import Any

from dar_lightning.data.classes import check_same_classes
from dar_lightning.data.loader import StreamDataModule
from dar_lightning.data.token_dataset import CodesDataset, CodesIndex
from dar_lightning.errors import UserError
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer


class CodesDataModule(StreamDataModule):
    """Tokens and labels out of the folders that `dar extract` writes.

    Batches are dictionaries: `codes` (B, N) int64, `label` (B,) int64, `crop` (B,) int64 (the crop's number; the
    index has the names), `key` (list of B strings), `index` (B,) int64 and `valid` (B,) bool, False where validation
    only fills up; `label` is -1 where the images have none. Token shards of images with captions give `caption` (list
    of B strings), and those of `dar extract --encoder` also its `features` (B, length, d) float16. All images are
    shuffled together in every epoch, and one crop and one caption of each are drawn; validation takes the first. As
    with images, batches do not depend on workers, and a resumed run sees those of the unbroken one.

    Args:
        train: Folder of token shards for training.
        val: Folder of token shards for validation.
        batch_size: Samples per batch and device.
        num_workers: Worker processes; reading tokens is cheap, so 0 often suffices.
        seed: Order and choice of crops.
        tokenizer: Folder of the tokenizer that the AR model is meant for: tokens of another one are refused. Left out,
            training and validation tokens must still be of one tokenizer.
    """

    always_fixed = ("tokenizer_sha256",)
    sources = "a folder that `dar extract` wrote"

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(train, val, batch_size, num_workers, seed)
        self.tokenizer = tokenizer

    def _read_index(self, split: str, source: str) -> CodesIndex:
        return CodesIndex.load(source, f"data.{split}")

    def _dataset(self, split: str) -> CodesDataset:
        return CodesDataset(self.index(split), self.seed, random_crop=split == "train")

    def setup(self, stage: str) -> None:
        """Check that all tokens are of one tokenizer, the one that was named, and of the same classes."""
        super().setup(stage)
        hashes = {f"data.{split}": self.index(split).tokenizer for split in self.splits}
        if self.tokenizer is not None:
            tokenizer = SequentialDiffusionTokenizer.from_pretrained(self.tokenizer)
            hashes = {"data.tokenizer": model_sha256(tokenizer)} | hashes
        (first, wanted), *others = hashes.items()
        for name, found in others:
            if found != wanted:
                raise UserError(
                    f"{name} holds tokens of tokenizer {found[:12]}, {first} is of {wanted[:12]}; "
                    "run `dar extract` with the one that you mean"
                )

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"classes": list(self.classes)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint, or score it; a UserError if its labels meant other classes."""
        split = self.splits[0]
        named = {"the checkpoint": state_dict.get("classes", ()), f"data.{split}": self.classes}
        check_same_classes(named, "give data of the classes that it was trained on")
        super().load_state_dict(state_dict)

    @property
    def tokenizer_sha256(self) -> str:
        """SHA-256 of the tokenizer that made the tokens."""
        return self._any_index.tokenizer

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels."""
        return self._any_index.classes

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def num_tokens(self) -> int:
        """Tokens per image, N."""
        return self._any_index.num_tokens

    @property
    def num_groups(self) -> int | None:
        """Groups of the tokenizer that made them, where the folder says it."""
        return self._any_index.tokenizer_config.get("num_groups")

    @property
    def codebook_size(self) -> int:
        """Tokens are below this number."""
        return self._any_index.codebook_size
