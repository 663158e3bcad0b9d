"""Train the tiny base model's tokenizer: byte-level BPE on the standard library, held-out files left out.

usage: python data/prepare_tokenizer.py FOLDER
"""

import sys
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lctrain.data.split import unit_hash
from lctrain.data.stdlib import StdlibCorpus

VOCAB_SIZE = 4096
HELDOUT_FRACTION = 0.05


def texts() -> Iterator[str]:
    """Documents that training may see."""
    for document in StdlibCorpus(include_tests=False).documents():
        if unit_hash(document.source) >= HELDOUT_FRACTION:
            yield document.text


def main(folder: str) -> None:
    tokenizer = Tokenizer(models.BPE())
    # Digits stand alone, so that a number is copied digit by digit instead of by the luck of its merges.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|bos|>", "<|eos|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>", model_max_length=512
    )
    fast.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
