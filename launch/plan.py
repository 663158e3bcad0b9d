"""Say what a training run will cost, before it starts.

Prints all and trainable parameters, tokens, FLOPs by row length, the memory of a device by part (weights, gradients,
optimizer, activations, attention, loss, backward), and whether it fits. Uses no GPU, loads no weights, and needs no
network if model.architecture describes the shape. Accepts every group and option of `lctrain train`.

examples:
  lctrain plan experiment=demo
  lctrain plan experiment=longlora_7b_100k device_memory=80
  lctrain plan experiment=demo sequence_length=65536 attention=shifted_sparse device_memory=80 num_devices=8
"""

from omegaconf import DictConfig


def run(cfg: DictConfig) -> None:
    from lctrain.plan.run import main

    main(cfg)
