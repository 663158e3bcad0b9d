"""Turn a checkpoint into a plain Hugging Face folder that transformers loads without lctrain.

Merges LoRA and writes the weights, the config with its rope and window, the tokenizer, and a README with the recipe.
The gates of a run with attention=duo become full_attention_heads.tsv and head_pattern.json beside the weights.

examples:
  lctrain export run_dir=runs/demo
  lctrain export run_dir=runs/demo checkpoint=runs/demo/checkpoints/<name> output=models/demo
  lctrain export run_dir=runs/gates heads.streaming_share=0.5
"""

from omegaconf import DictConfig


def run(cfg: DictConfig) -> None:
    from lctrain.export import main

    main(cfg)
