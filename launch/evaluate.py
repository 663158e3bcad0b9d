"""Measure a model: perplexity at several lengths and by position, recall of needles by length and depth.

Accepts a folder that `lctrain train` exported, or any Hugging Face model. With attention=full, the default, the model
runs as plain transformers runs it; another choice evaluates it under that pattern.

run_dir receives report.json, pictures, and each cell as soon as it is measured: SIGTERM ends the run with exit code 75,
and the same command with resume=auto continues. prefill_chunk_size=… sets how many tokens of a prompt are read at once,
cache=… which keys and values are kept.

examples:
  lctrain evaluate model.path=runs/demo/exported run_dir=runs/demo-evaluated
  lctrain evaluate model.path=<folder or hub id> evaluation=perplexity sequence_length=8192 data=text data.path=<folder>
  lctrain evaluate model.path=runs/demo/exported evaluation=needle run_dir=runs/needle
  lctrain evaluate model.path=<folder with a head pattern> evaluation=needle cache=duo prefill_chunk_size=4096
  lctrain evaluate model.path=runs/demo/exported attention=sliding_window run_dir=runs/demo-window
"""

from omegaconf import DictConfig

from lctrain.errors import InputError


def run(cfg: DictConfig) -> None:
    if "path" not in cfg.model:
        raise InputError("evaluate measures weights: give model.path=<folder or hub id> (with model=pretrained)")
    from lctrain.evaluation.run import main

    main(cfg)
