"""Time lctrain against plain alternatives, on this machine.

  overhead   tokens/s of `lctrain train` against a plain PyTorch loop on the same model, batch and attention
  kernels    every attention pattern against full causal attention, by the pairs of tokens it needs (CUDA)
  step       whole training steps by length, attention and tuning, on random weights, compared with peers=[trl,assembly]
  length     peak memory by length with each saving alone, up to the first that does not fit
  devices    whole steps on several devices, sharded and sharing rows, against one, up to the longest that fits
  gates      training DuoAttention's gates against two passes with dense masks and against one of both rows together
  serve      a full cache against DuoAttention's: memory, prefill, decoding, the longest row that fits
  retrieval  recall and perplexity by the share of streaming heads, chosen by a learned head pattern or at random
  trace      a profile of one step: the device's busy share, the longest kernels, waits and compilations

Prints a table and writes overhead.json, step.jsonl … into run_dir. Accepts every group and option of `lctrain train`.

examples:
  lctrain benchmark overhead
  lctrain benchmark overhead run_dir=runs/overhead num_steps=50 num_repeats=5 sequence_length=2048
  lctrain benchmark overhead model.path=<folder or hub id>
  lctrain benchmark step model=llama3_8b model.dtype=bfloat16 tuning=lora trainer.accelerator=gpu peers=[trl]
  lctrain benchmark length model=llama3_8b model.dtype=bfloat16 tuning=lora trainer.accelerator=auto
  lctrain benchmark devices model=llama3_8b model.dtype=bfloat16 memory=auto trainer.accelerator=gpu minutes=8
  lctrain benchmark gates experiment=duo model=llama3_8b model.dtype=bfloat16 lengths=[32768] trainer.accelerator=auto
  lctrain benchmark serve model=llama3_8b trainer.accelerator=auto model.dtype=bfloat16
  lctrain benchmark retrieval model.path=<folder> retrieval.pattern=<folder> evaluation=default sequence_length=8192
  lctrain benchmark kernels kernels.lengths=[16384,131072] kernels.backends=[flash,cudnn,varlen,flex]
"""

from omegaconf import DictConfig

FIRST = "what"  # the option that a bare first word sets


def run(cfg: DictConfig) -> None:
    from lctrain.benchmark.run import main

    main(cfg)
