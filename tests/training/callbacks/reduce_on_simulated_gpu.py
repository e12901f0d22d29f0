"""Whatever exchanges tensors between ranks, on the simulated GPU: writes what each run logged, or its error."""

import json
import sys
import traceback

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from simulated_gpu import WAITS, make_trainer
from tiny_training import ar_module, image_data, token_data, tokenizer_module

from dar_lightning.data.bad_samples import Bad, Skipped
from dar_lightning.training import AblationModule, ARModule, callbacks

images, val_images, tokens, val_tokens, tokenizer, out = sys.argv[1:]


def trainer(name: str, *found: callbacks.StopOnSignal, **changes) -> Trainer:
    folder = f"{out}/{name}"
    options = dict(max_steps=2, val_check_interval=2, check_val_every_n_epoch=None, log_every_n_steps=1)
    # Wrapped tensors and inference mode do not go together.
    options |= dict(inference_mode=False, enable_progress_bar=False, enable_model_summary=False)
    saver = callbacks.LastStepCheckpoint(dirpath=folder)
    logger = TensorBoardLogger(folder)
    return make_trainer(callbacks=[*found, saver], default_root_dir=folder, logger=logger, **options | changes)


def watched(name: str, *found, **changes) -> Trainer:
    """With what both kinds of training have; FLOPs are counted on fake tensors, which know no such device."""
    names = ("SkipBadSteps", "StopOnSignal", "EMA", "Memory", "OptimizerMonitor")
    found += (*(getattr(callbacks, name)() for name in names), callbacks.Throughput(flops=False))
    return trainer(name, *found, **changes)


def tokenizer_run() -> dict:
    return {"model": tokenizer_module(), "datamodule": image_data((images, val_images), 3)}


def ar_run(kind: type[ARModule] = ARModule, **changes) -> dict:
    return {"model": ar_module(changes, kind), "datamodule": token_data((tokens, val_tokens))}


def fit(found: Trainer, run: dict) -> dict:
    found.fit(**run)
    return found.callback_metrics


def reconstruction_fid() -> dict:
    found = trainer("reconstruction_fid", callbacks.ReconstructionFID(6, "color_edges"))
    return found.validate(**tokenizer_run(), verbose=False)[0]


def generation_fid() -> dict:
    fid = callbacks.GenerationFID(tokenizer, val_images, 9, "color_edges", batch_size=2)
    return trainer("generation_fid", fid).validate(**ar_run(), verbose=False)[0]


def tokenizer_training() -> dict:
    warmup = callbacks.CodebookWarmup(1, collect_steps=1, revive_every=1, revive_until=9)
    monitors = callbacks.CodebookMonitor(), callbacks.GroupLoss(), callbacks.Reconstructions(2, 1)
    return fit(watched("tokenizer", warmup, *monitors), tokenizer_run())


def ar_training() -> dict:
    return fit(watched("ar", callbacks.PositionLoss(4), callbacks.Samples(tokenizer, per_class=1)), ar_run())


def ablation_training() -> dict:
    return fit(watched("ablation"), ar_run(AblationModule, order="random"))


def waits(run: dict, *found) -> list:
    """Those of the third and fourth of six steps, none of which logs."""
    changes = dict(max_steps=6, log_every_n_steps=50, limit_val_batches=0, accumulate_grad_batches=2)
    fit = watched("waits", *found, **changes)
    WAITS.clock, WAITS.found = lambda: fit.global_step, []
    fit.fit(**run)
    return [[step, born, place] for step, born, place in WAITS.found if step in (2, 3)]


def bad_samples() -> dict:
    skipped = Skipped("data.train", 100, 0.5)
    skipped.add([Bad("0.tar/1", "empty")])
    skipped.check(everywhere=True)
    return {"known": len(skipped.reasons)}


results = {}
for run in (reconstruction_fid, generation_fid, tokenizer_training, ar_training, ablation_training, bad_samples):
    try:
        results[run.__name__] = {name: float(value) for name, value in run().items()}
    except Exception as error:
        traceback.print_exc()
        results[run.__name__] = str(error).splitlines()[0]
monitors = callbacks.CodebookMonitor(), callbacks.GroupLoss()
results["waits"] = {"tokenizer": waits(tokenizer_run(), *monitors), "ar": waits(ar_run(), callbacks.PositionLoss(4))}
with open(f"{out}/results.json", "w") as file:
    json.dump(results, file)
