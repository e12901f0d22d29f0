"""`dar extract`: tokenize image shards once and cache the tokens as shards."""

from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import lightning as L
import torch

from dar_lightning.ar.conditions import FILE
from dar_lightning.ar.conditions.caption_tokens import CaptionTokens, train_vocabulary
from dar_lightning.data.bad_samples import Bad, Skipped
from dar_lightning.data.extraction import Extractor, TokenCache, predict_until_all_are_done
from dar_lightning.data.remote import MOST_PATIENCE, PATIENCE
from dar_lightning.data.shards import INDEX, ShardIndex
from dar_lightning.data.token_dataset import CodesIndex
from dar_lightning.data.views import Crops, Views
from dar_lightning.data.workers import MOST
from dar_lightning.devices import check_srun, check_started_processes, dtype_name
from dar_lightning.errors import MOST_PIXELS, UserError, check_range, naming
from dar_lightning.files import locked, read_json, write_json
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.formats.text_encoder import TextEncoder
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer


def extract(
    tokenizer: str,
    shards: str,
    output: str,
    crops: Crops = "ten_crop",
    random_crops: int = 10,
    image_size: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    cache_dir: str | None = None,
    patience: float = PATIENCE,
    max_bad_share: float = 0.01,
    accelerator: str = "auto",
    devices: int | str = "auto",
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    vocabulary: int | None = None,
    encoder: str | None = None,
    caption_length: int = 16,
) -> None:
    """Tokenize image shards into token shards for CodesDataModule.

    Captions of the images go along. With vocabulary or encoder each image needs one; condition.json in `output` then
    holds the options of an AR model's condition, caption_tokens or features.

    One file is written per image shard, whole or not at all, and the index last: a run that was interrupted goes on
    with the shards that are missing, and a finished one is left alone. With several devices, each takes a part of the
    shards, and the files are the same. Only `provenance.json`, which lists what made them, differs. A sample that
    cannot be used is left out, and named in the header of the token shard and in the index.

    Args:
        tokenizer: Folder of a tokenizer (config.json, model.safetensors) or its Hugging Face repository.
        shards: Image shards: a folder, one tar, or a brace pattern; or the URL of a folder with an index, or of a
            pattern.
        output: Folder for the token shards.
        crops: Views of each image: `center` (1), `center_flip` (2: as it is and mirrored), `ten_crop` (10: LlamaGen's,
            from 1.1 times the size), `random` (ADM random crops and flips).
        random_crops: Number of views for `random`.
        image_size: Side of the crops in pixels; the tokenizer's own when left out.
        batch_size: Crops per forward pass and device.
        num_workers: Worker processes that decode and crop.
        seed: Of the random crops.
        cache_dir: Folder for copies of remote shards.
        patience: Seconds for which their server may be away or broken before extraction stops; a shard is tried for
            again, at last every 30 s.
        max_bad_share: Largest share of the samples that may be bad.
        accelerator: Lightning's: `auto`, `cpu`, `gpu`, ...
        devices: Lightning's: number of devices, or `auto`.
        precision: Lightning's, for weights in float32, however they are stored; the search for the nearest code is
            always in float32. Lower precision changes a few tokens.
        vocabulary: Pieces of a vocabulary that is trained on the captions, for condition caption_tokens. Needs
            `tokenizers`: pip install 'dar-lightning[text]'.
        encoder: A frozen text encoder, a folder or Hugging Face repository of transformers (safetensors), whose
            features of each caption are stored, for condition features. Needs transformers, of the same extra.
        caption_length: Tokens of a caption that the AR model will read, at most.

    Raises:
        UserError: The tokenizer or the shards cannot be read, too many samples are bad, or `output` holds something
            else.
    """
    check_range(1, 10**4, random_crops=random_crops)
    check_range(1, MOST_PIXELS, image_size=image_size)
    check_range(1, batch_size=batch_size)
    check_range(1, 2**16, caption_length=caption_length, vocabulary=vocabulary)
    if vocabulary is not None and encoder is not None:
        raise UserError("vocabulary and encoder are both set: a model reads captions in one of the two ways")
    check_range(0, MOST, num_workers=num_workers)
    check_range(0, 1, max_bad_share=max_bad_share)
    check_range(0, MOST_PATIENCE, patience=patience)
    index = ShardIndex.load(shards, "shards", cache_dir, patience)
    model = SequentialDiffusionTokenizer.from_pretrained(tokenizer)
    # Versions that did not note the dtype computed in that of the weights.
    unsaid = {"dtype": dtype_name(model.dtype), "float32_matmul_precision": "highest"}
    model.float()
    views = Views(crops, random_crops, image_size or model.config.image_size, seed)
    made_by = {
        "tokenizer": model_sha256(model),
        "crops": crops,
        "num_crops": len(views),
        "crop_names": views.names,
        "image_size": views.size,
        "seed": seed if crops == "random" else None,
        "precision": precision,
        "dtype": "float32",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    network = None if encoder is None else TextEncoder(encoder, caption_length)
    if network is not None:
        facts = {"sha256": network.sha256, "channels": network.dim, "length": caption_length}
        made_by |= {"captioned": True, "encoder": facts}
    elif vocabulary is not None:
        made_by["captioned"] = True
    root = Path(output)
    cache = TokenCache(root, index, model.config, made_by, unsaid)
    done = cache.done()
    missing = [number for number in range(len(index.shards)) if number not in done]
    if not missing and (root / INDEX).exists():
        found = CodesIndex.load(root, "output")
        print(f"{output} is complete: {found.num_samples} images x {len(views)} crops x {found.num_tokens} tokens")
        write_condition(cache, vocabulary, network, caption_length)
        return
    skipped = Skipped("shards", index.num_samples, max_bad_share)
    skipped.add(index.lost)
    skipped.add(Bad(*line.partition(": ")[::2]) for lines in done.values() for line in lines)
    skipped.check()
    check_srun()
    with naming(f"accelerator {accelerator}, devices {devices}"):
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=devices,
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,  # each rank reads whole shards of its own
        )
    check_started_processes(trainer.num_nodes * trainer.num_devices, "devices")
    with locked(root, "output") if trainer.is_global_zero else nullcontext():
        if missing:
            module = Extractor(model, cache, missing, views, skipped, batch_size, num_workers, network)
            predict_until_all_are_done(trainer, module)
        if trainer.is_global_zero:
            codes = cache.finish(max_bad_share, encoder)
            write_condition(cache, vocabulary, network, caption_length)
            size = sum(shard.bytes for shard in codes.shards) / 1e6
            print(f"{codes.num_samples} images x {len(views)} crops x {codes.num_tokens} tokens, {size:.1f} MB: {root}")
            if codes.skipped:
                print(f"{len(codes.skipped)} of {index.num_samples} samples were skipped, {root / INDEX} names them")


def write_condition(cache: TokenCache, vocabulary: int | None, network: TextEncoder | None, length: int) -> None:
    """Write the options of an AR model's condition for these token shards (`ar.conditions.read_options`).

    A vocabulary that is there stays: trained again, it could be another one, and models know its pieces by number.
    """
    if vocabulary is None and network is None:
        return
    path, encoder = cache.root / FILE, network and network.name
    asked = {"vocabulary": vocabulary, "encoder": encoder, "caption_length": length}
    found = read_json(path) if path.is_file() else {}
    before = found.get("asked", {})
    if before == asked:
        return
    captions = [text for texts in cache.captions() for text in texts]
    if network is None:
        kept = before.get("vocabulary") == vocabulary
        pieces = found["condition_options"]["vocabulary"] if kept else train_vocabulary(captions, vocabulary)
        name, options = "caption_tokens", {"vocabulary": pieces, "length": length}
        counts = [len(tokens) for tokens in map(CaptionTokens(1, **options).tokens, captions)]
        said = f"{len(pieces.split())} pieces {'kept, for' if kept else 'trained on'}"
    else:
        name, options = "features", cache.made_by["encoder"] | {"encoder": encoder}
        counts, said = network.count_tokens(captions) if captions else [], "features of"
    longer = sum(count > length for count in counts)
    cut = f", {longer} of them longer than caption_length {length} tokens, and cut" if longer else ""
    print(f"{said} {len(captions)} captions{cut}")
    content = {"condition": name, "condition_options": options, "asked": asked}
    write_json(path, content, indent=1, ensure_ascii=False)
