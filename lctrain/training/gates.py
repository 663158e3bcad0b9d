"""Record DuoAttention's gates during training: two numbers per step, and a heatmap at intervals."""

from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from peft import PeftModel
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from lctrain.attention.base import Attention
from lctrain.attention.duo import GATES, DuoAttention
from lctrain.errors import InputError
from lctrain.evaluation.style import STYLE
from lctrain.model.head import unwrap
from lctrain.model.install import attention_modules
from lctrain.training.strategy import ShardedCheckpoints

PICTURE = "gates.png"


def gates_of(model: PreTrainedModel | PeftModel) -> list[Parameter]:
    """Return each layer's gates, [key-value heads]."""
    return [module.get_parameter(GATES) for module in attention_modules(unwrap(model))]


class Gates(Callback):
    """A callback that records the mean gate and the share of gates above `threshold` at every optimizer step.

    Every `every_num_steps` steps and at the end, the gates are drawn as a heatmap of layers by heads, for W&B if it
    records the run; the last heatmap is gates.png in `folder`. Must come before Metrics, which writes these numbers.
    """

    def __init__(self, *, folder: str, threshold: float, every_num_steps: int) -> None:
        if not 0 <= threshold <= 1 or every_num_steps < 1:
            raise InputError(
                f"callbacks.gates: threshold={threshold} must be within 0 and 1, "
                f"every_num_steps={every_num_steps} at least 1"
            )
        self.folder, self.threshold, self.every_num_steps = Path(folder), threshold, every_num_steps

    def check(self, attention: Attention) -> None:
        """Raise InputError if the attention has no gates to record."""
        if not isinstance(attention, DuoAttention):
            raise InputError("callbacks=gates records the gates of attention=duo; this attention has none")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        module, step = cast(Any, pl_module), trainer.global_step
        strategy = cast(ShardedCheckpoints, trainer.strategy)
        gates_LK = torch.stack([strategy.whole(gate_K) for gate_K in gates_of(module.model)]).cpu()
        module.measures["gates/mean"] = float(gates_LK.mean())
        module.measures["gates/share_above_threshold"] = float((gates_LK > self.threshold).float().mean())
        finished = step == trainer.max_steps
        if not trainer.is_global_zero or not (finished or step % self.every_num_steps == 0):
            return
        figure = gate_heatmap(gates_LK, f"Gates after step {step:,}")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("gates/heatmap", [figure], step=step)
        if finished:
            figure.savefig(self.folder / PICTURE, dpi=150)


def gate_heatmap(gates_LK: Tensor, title: str) -> Figure:
    """Draw the gates (0 to 1), layers downwards and key-value heads to the right, with values if there are few."""
    num_layers, num_heads = gates_LK.shape
    with rc_context(STYLE):
        figure = Figure(figsize=(max(4.6, 2.6 + 0.42 * num_heads), max(3.2, 1.5 + 0.26 * num_layers)))
        axes = figure.subplots()
        image = axes.imshow(gates_LK.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
        if gates_LK.numel() <= 128:
            for layer, row in enumerate(gates_LK.tolist()):
                for head, gate in enumerate(row):
                    colour = "white" if gate > 0.6 else "#222222"
                    axes.text(head, layer, f"{gate:.2f}", ha="center", va="center", color=colour, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
        axes.set(title=title, xlabel="key-value head", ylabel="layer")
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, ticks=[0, 0.25, 0.5, 0.75, 1])
        bar.set_label("gate: 0 streams, 1 retrieves", fontsize=10)
    return figure
