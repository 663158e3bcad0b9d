"""Strategies that can't do what is asked of them say so before anything is written; tests/parallel runs them."""

import gc
import weakref
from typing import Any

import pytest
from lightning import Callback

from lctrain import config
from lctrain.errors import InputError
from lctrain.training.strategy import DDP, SingleDevice, automatic


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["strategy=single", "trainer.devices=2"], "strategy=single is for one device, trainer.devices gives 2"),
        (["strategy=single", "trainer.num_nodes=2"], "strategy=single is for one process, trainer.num_nodes=2"),
        (["strategy=zero2", "strategy.offload_parameters=true"], "strategy.offload_parameters needs stage 3"),
        (["strategy=zero1", "strategy.stage=4"], "strategy.stage=4 is none of 1, 2, 3"),
        (["strategy=zero1", "trainer.precision=bf16-mixed"], "use model.dtype=bfloat16 instead of trainer.precision"),
        (["strategy=zero4"], r"no strategy 'zero4'; did you mean 'zero\d'"),
    ],
)
def test_what_cannot_work_is_refused(run, tmp_path, overrides, line):
    with pytest.raises(Exception, match=line) as caught:
        run(*overrides)
    assert isinstance(config.explain(caught.value, "train", overrides), InputError)
    assert not (tmp_path / "run").exists()


class Farewell(Callback):
    """Looks, when a validation follows the fit, whether the fit's optimizer is still there."""

    optimizer: Any = None
    is_gone: bool | None = None

    def on_train_end(self, trainer, pl_module):
        type(self).optimizer = weakref.ref(trainer.optimizers[0])

    def on_validation_end(self, trainer, pl_module):
        if self.optimizer:
            gc.collect()
            type(self).is_gone = self.optimizer() is None


def test_optimizers_are_gone_behind_a_fit(run):
    """Lightning would move their states to the host, where inputs may be pinned still."""
    run("trainer.max_steps=1", f"+callbacks.farewell._target_={__name__}.Farewell")
    assert Farewell.is_gone


@pytest.mark.parametrize(
    ("devices", "num_nodes", "kind"),
    [(1, 1, SingleDevice), ("1", 1, SingleDevice), ([0], 1, SingleDevice), (2, 1, DDP), ("0,1", 1, DDP), (1, 2, DDP)],
)
def test_auto_takes_ddp_for_several_processes(devices, num_nodes, kind):
    assert type(automatic(devices=devices, num_nodes=num_nodes, timeout_minutes=30)) is kind
