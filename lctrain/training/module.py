"""The LightningModule that trains one model on one objective, with exact means over tokens."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self, cast

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftModel
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from lctrain.checkpoint import VALUE
from lctrain.errors import InputError
from lctrain.model.head import IGNORED, check_head, hidden_states, token_losses
from lctrain.model.recipe import ModelRecipe
from lctrain.parallel.ulysses import Ulysses
from lctrain.training.objective import Objective
from lctrain.training.strategy import ShardedCheckpoints

NUM_POSITION_BUCKETS = 8


class LongContextModule(LightningModule):
    """A module that trains the model that `recipe` builds on `objective`.

    A checkpoint holds the trainable parameters only; the recipe loads the frozen ones again.
    """

    model: PreTrainedModel | PeftModel

    def __init__(
        self,
        *,
        recipe: ModelRecipe,
        objective: Objective,
        optimizer: Callable[[Iterable[Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler],
    ) -> None:
        super().__init__()
        self.recipe, self.objective = recipe, objective
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self._num_valid_tokens = 0  # of this optimizer step, over all ranks
        self.losses: dict[str, Tensor] = {}  # this rank's terms of the loss; their mean over ranks is the step's loss
        self.measures: dict[str, float] = {}  # other numbers that Metrics records with this step
        self._validation: list[Tensor] = []
        self._row_length = 0
        self.validated_step = -1

    def check(self, device: torch.device) -> None:
        """Refuse, before anything is written, settings that the objective, optimizer or scheduler can't take."""
        self.objective.check(device, self.recipe)
        try:
            self.make_scheduler(self.make_optimizer([Parameter(torch.zeros(1))]))
        except ValueError as error:
            raise InputError(f"optimizer or scheduler: {error}") from error

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        group = self.trainer.datamodule.mesh.sequence_group()  # type: ignore[attr-defined]
        strategy = cast(ShardedCheckpoints, self.trainer.strategy)
        self.model = self.recipe.build(strategy.root_device, Ulysses(group) if group else None, strategy.zero3)
        self.model.train()

    def cpu(self) -> Self:
        """Do nothing. Lightning calls this after a fit, when the host may lack room beside its pinned memory."""
        return self

    def forward(self) -> None:
        """Refuse a model whose logits the loss can't reproduce. This is a forward so that ZeRO gathers its shards."""
        with self._autocast():
            check_head(self.model)

    def on_train_start(self) -> None:
        with torch.no_grad():
            self()  # not the strategy's wrapper: on a GPU, DistributedDataParallel takes no forward without inputs
        self.model.train()

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the micro-batch's share of the mean over the valid tokens of the whole optimizer step.

        Lightning divides by the accumulation and data parallelism averages over ranks, so both are multiplied back.
        """
        accumulate, world = self.trainer.accumulate_grad_batches, self.trainer.world_size
        if batch_idx % accumulate == 0:
            local = torch.tensor(batch["num_valid_tokens"], device=self.device, dtype=torch.float64)
            total = cast(Tensor, self.all_gather(local)).sum() if world > 1 else local
            self._num_valid_tokens, self.losses = max(int(total), 1), {}
        with self._autocast():
            terms = self.objective(self.model, batch)
        share = world / self._num_valid_tokens
        for name, term in terms.items():
            self.losses[name] = self.losses.get(name, 0) + term.detach() * share
        return sum(terms.values(), torch.zeros((), device=self.device)) * (accumulate * share)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the optimizer step, then clamp what the method learns to its bounds."""
        super().optimizer_step(*args, **kwargs)
        strategy, method = cast(ShardedCheckpoints, self.trainer.strategy), self.recipe.attention
        for name, parameter in strategy.trained().items():
            if method.owns(name) and (within := method.bounds().get(name.rpartition(".")[2])) is not None:
                strategy.load_parameter(parameter, {VALUE: strategy.whole(parameter).clamp(*within)})

    def on_validation_epoch_start(self) -> None:
        self._validation = []

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Add up the losses and their number in each bucket of positions in the document."""
        with self._autocast():
            hidden = hidden_states(self.model, batch["input_ids"], batch["position_ids"])
            losses_N = token_losses(self.model, hidden, batch["labels"])[1]
        valid, self._row_length = batch["labels"] != IGNORED, batch["sequence_length"]
        buckets_N = batch["position_ids"][valid] * NUM_POSITION_BUCKETS // batch["sequence_length"]
        sums = torch.zeros(2, NUM_POSITION_BUCKETS, dtype=torch.float64, device=losses_N.device)
        sums[0].index_add_(0, buckets_N, losses_N.double())
        sums[1].index_add_(0, buckets_N, torch.ones_like(losses_N, dtype=torch.float64))
        self._validation.append(sums)

    def on_validation_epoch_end(self) -> None:
        """Log perplexity overall and by position in the document; buckets are equal shares of the row length."""
        self.validated_step = self.trainer.global_step
        if not self._validation:
            return
        sums = torch.stack(self._validation).sum(0)
        sums = cast(Tensor, self.all_gather(sums)).sum(0) if self.trainer.world_size > 1 else sums
        metrics = {"validation/perplexity": (sums[0].sum() / sums[1].sum()).exp().item()}
        for bucket in sums[1].nonzero().flatten().tolist():
            mean = sums[0, bucket] / sums[1, bucket]
            metrics[f"validation/perplexity_by_position/{bucket + 1}_of_{NUM_POSITION_BUCKETS}"] = mean.exp().item()
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)

    def _autocast(self) -> AbstractContextManager[Any]:
        """Return a context that computes in bf16 if the recipe or `trainer.precision` says so.

        Cast weights are not cached: each is used once in a forward, and under stage 3 of ZeRO a cache of all of them
        would be the whole model.
        """
        if not self.recipe.autocasts() and self.trainer.precision != "bf16-mixed":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }
