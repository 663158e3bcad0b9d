"""Implement `lctrain benchmark`: run the comparison named by `cfg.what`."""

from omegaconf import DictConfig

from lctrain.benchmark.devices import devices
from lctrain.benchmark.gates import gates
from lctrain.benchmark.kernels import kernels
from lctrain.benchmark.length import length
from lctrain.benchmark.overhead import overhead
from lctrain.benchmark.retrieval import retrieval
from lctrain.benchmark.serve import serve
from lctrain.benchmark.step import step
from lctrain.benchmark.trace import trace
from lctrain.config import nearest
from lctrain.errors import InputError

COMPARISONS = {
    "overhead": overhead,
    "kernels": kernels,
    "step": step,
    "length": length,
    "devices": devices,
    "gates": gates,
    "serve": serve,
    "retrieval": retrieval,
    "trace": trace,
}


def main(cfg: DictConfig) -> None:
    """Run the comparison `cfg.what`, which prints a table and writes JSON into run_dir."""
    if cfg.what not in COMPARISONS:
        raise InputError(nearest(f"no benchmark '{cfg.what}'", cfg.what, list(COMPARISONS), show_all=True))
    COMPARISONS[cfg.what](cfg)
