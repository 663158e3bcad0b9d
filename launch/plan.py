"""Say what a training run will cost, before it costs anything.

Prints parameters, trainable ones, tokens, memory by part (weights, gradients, optimizer, activations, logits,
attention) per device, and FLOPs, and whether it fits. Touches no GPU and loads no weights. Takes every group and
option of `lctrain train`.

examples:
  lctrain plan experiment=demo
  lctrain plan experiment=demo sequence_length=65536 attention=shifted_sparse device_memory=80 num_devices=8
"""

from omegaconf import DictConfig


def run(cfg: DictConfig) -> None:
    from lctrain.plan import main

    main(cfg)
