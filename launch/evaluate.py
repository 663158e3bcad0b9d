"""Measure a model: perplexity at several lengths and by position, passkey retrieval by length and depth.

Takes a folder that `lctrain train` exported, or any Hugging Face model. With attention=full, the default, the model
runs as plain transformers runs it; another choice evaluates it under that pattern.

run_dir receives report.json and pictures.

examples:
  lctrain evaluate model.path=runs/demo/exported run_dir=runs/demo-evaluated
  lctrain evaluate model.path=<folder or hub id> evaluation=perplexity sequence_length=8192 data=text data.path=<folder>
  lctrain evaluate model.path=runs/demo/exported attention=sliding_window run_dir=runs/demo-window
"""

from omegaconf import DictConfig

from lctrain.errors import InputError


def run(cfg: DictConfig) -> None:
    if "path" not in cfg.model:
        raise InputError("evaluate measures weights: give model.path=<folder or hub id> (with model=pretrained)")
    from lctrain.evaluation.run import main

    main(cfg)
