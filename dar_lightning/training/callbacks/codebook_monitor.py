"""Monitor of codebook usage and perplexity."""

from lightning.pytorch import Callback

from dar_lightning.metrics.codebook import CodebookUse
from dar_lightning.training.log_step import is_log_step


class CodebookMonitor(Callback):
    """Logs how the training tokens of all devices spread over the codebook, every `trainer.log_every_n_steps` steps.

    - `codebook/use`: share of codes that a token chose, 0 to 1.
    - `codebook/dead`: number of codes that none chose.
    - `codebook/perplexity`: 1 where all tokens are the same code, the codebook's size where all codes are as frequent.

    All are of the tokens since they were last logged. With fewer tokens than some ten times the codebook's size, codes
    go unused by chance.
    """

    def setup(self, trainer, pl_module, stage) -> None:
        self._use = CodebookUse(pl_module.tokenizer.config.codebook_size)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._use.to(pl_module.device).update(outputs["codes"])
        if not is_log_step(trainer):
            return
        use, perplexity = self._use.compute()
        dead = (1 - use) * len(self._use.counts)
        pl_module.log_dict({"codebook/use": use, "codebook/dead": dead, "codebook/perplexity": perplexity})
        self._use.reset()
