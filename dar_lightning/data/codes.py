"""CodesDataModule: batches of cached tokens to train the AR model on."""

from typing import Any

from dar_lightning.data.loader import StreamDataModule
from dar_lightning.data.token_dataset import CodesDataset, CodesIndex
from dar_lightning.errors import UserError


class CodesDataModule(StreamDataModule):
    """Tokens and labels out of the folders that `dar extract` writes.

    Batches are dictionaries: `codes` (B, N) int64, `label` (B,) int64, `crop` (B,) int64 (the crop's number; the
    index has the names), `key` (list of B strings), `index` (B,) int64 and `valid` (B,) bool, False where validation
    only fills up. All images are shuffled together in every epoch, and one crop of each is drawn; validation takes the
    first crop. As with images, batches do not depend on workers, and a resumed run sees those of the unbroken one.

    Args:
        train: Folder of token shards for training.
        val: Folder of token shards for validation.
        batch_size: Samples per batch and device.
        num_workers: Worker processes; reading tokens is cheap, so 0 often suffices.
        seed: Order and choice of crops.
        tokenizer: Folder of the tokenizer that the AR model is meant for: tokens of another one are refused. Left out,
            training and validation tokens must still be of one tokenizer.
    """

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
        """Check that all tokens are of one tokenizer, and of the one that was named."""
        super().setup(stage)
        if self.train is None and self.val is None:
            raise UserError("data.train and data.val: neither is set; give folders that `dar extract` wrote")
        prints = {f"data.{split}": self.index(split).tokenizer for split in ("train", "val") if getattr(self, split)}
        if self.tokenizer is not None:
            from dar_lightning.formats.model_sha256 import model_sha256
            from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer

            tokenizer = SequentialDiffusionTokenizer.from_pretrained(self.tokenizer)
            prints = {"data.tokenizer": model_sha256(tokenizer)} | prints
        first, *others = prints.items()
        for name, value in others:
            if value != first[1]:
                raise UserError(
                    f"{name} holds tokens of tokenizer {value[:12]}, {first[0]} is of {first[1][:12]}; "
                    "run `dar extract` with the one that you mean"
                )

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, and whose tokens they are."""
        return super().state_dict() | {"tokenizer": self._any_index.tokenizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: It was trained on tokens of another tokenizer.
        """
        mine = self._any_index.tokenizer
        if (theirs := state_dict.get("tokenizer", mine)) != mine:
            raise UserError(
                f"cannot resume: the checkpoint saw tokens of tokenizer {theirs[:12]}, these are of {mine[:12]}; "
                "use the same, or start a new run from its weights"
            )
        super().load_state_dict(state_dict)

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
