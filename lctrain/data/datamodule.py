"""From a corpus to the batches of every step, for Lightning."""

import logging
from collections.abc import Iterator
from functools import cached_property

import lightning
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from lctrain.data.batch import IGNORED, Batch, fill
from lctrain.data.corpus import Corpus
from lctrain.data.curriculum import Curriculum
from lctrain.data.packing import PACKINGS, Ints, Packing, cut
from lctrain.data.table import TokenTable
from lctrain.data.tokenize import tokenize
from lctrain.errors import InputError
from lctrain.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


class LongContextData(lightning.LightningDataModule):
    """Endless training batches whose rows grow with the curriculum, and a fixed set of held-out ones.

    corpus, tokenizer: tokenized once into `cache_dir`.
    sequence_length, micro_batch_size: the target; a micro-batch has their product of tokens at every length.
    packing: `stream` (documents cut where a row ends) or `whole` (documents never cut; for conversations).
    heldout_fraction: share of the documents, chosen by name, that is never trained on.
    num_heldout_tokens: how many of their tokens validation reads.
    sequence_parallel_size: how many neighbouring ranks share each row, a part each.
    """

    def __init__(
        self,
        *,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        curriculum: Curriculum,
        sequence_length: int,
        micro_batch_size: int,
        packing: str,
        heldout_fraction: float,
        num_heldout_tokens: int,
        cache_dir: str,
        seed: int,
        sequence_parallel_size: int = 1,
    ) -> None:
        super().__init__()
        if packing not in PACKINGS:
            raise InputError(f"no packing {packing!r}; choose one of {', '.join(PACKINGS)}")
        if not 0 < heldout_fraction < 1:
            raise InputError(f"datamodule.heldout_fraction={heldout_fraction} must be between 0 and 1")
        if micro_batch_size < 1 or num_heldout_tokens < 2:
            raise InputError("datamodule.micro_batch_size must be at least 1 and num_heldout_tokens at least 2")
        if curriculum.lengths()[-1] > sequence_length:
            raise InputError(f"the curriculum goes to {curriculum.lengths()[-1]}, past {sequence_length=}")
        self.corpus, self.tokenizer, self.curriculum = corpus, tokenizer, curriculum
        self.sequence_length, self.micro_batch_size, self.packing = sequence_length, micro_batch_size, packing
        self.heldout_fraction, self.num_heldout_tokens = heldout_fraction, num_heldout_tokens
        if uneven := [length for length in curriculum.lengths() if length % sequence_parallel_size]:
            raise InputError(
                f"rows of {uneven[0]} tokens can't be shared evenly by sequence_parallel_size={sequence_parallel_size}"
            )
        self.cache_dir, self.seed, self.sequence_parallel_size = cache_dir, seed, sequence_parallel_size

    def prepare_data(self) -> None:
        """Tokenizes, where the cache does not hold it yet."""
        tokenize(self.corpus, self.tokenizer, self.cache_dir)

    def setup(self, stage: str) -> None:
        """Maps the cache and refuses a corpus that leaves nothing to train on or nothing held out."""
        train, heldout = self.train_documents, self.unseen_documents
        if not len(heldout) or not len(train):
            raise InputError(
                f"of {len(self.table.lengths)} documents {len(train)} left to train on, {len(heldout)} held out; "
                f"give more documents or change datamodule.heldout_fraction={self.heldout_fraction}"
            )
        if stage == "fit":
            self.packer.length_at(0)  # refuses now what it cannot pack

    def train_dataloader(self) -> "TrainingBatches":
        """Endless; starts wherever the trainer stands."""
        return TrainingBatches(self)

    def val_dataloader(self) -> "HeldoutBatches":
        """Held-out rows of the target length. Each rank gets as many batches as the others."""
        documents, lengths = self.unseen_documents, self.table.lengths
        ends = np.cumsum(lengths[documents])
        num_tokens, size = min(self.num_heldout_tokens, int(ends[-1])), self.sequence_length
        rows = [cut(documents, ends, at, min(at + size, num_tokens)) for at in range(0, num_tokens, size)]
        batches = [rows[i : i + self.micro_batch_size] for i in range(0, len(rows), self.micro_batch_size)]
        world, rank = self.mesh.data_parallel_size, self.mesh.data_parallel_rank
        mine = [batches[(i + rank) % len(batches)] for i in range(0, max(len(batches) // world, 1) * world, world)]
        return HeldoutBatches([self._mine([fill(batch, size, self.table, self.pad_token_id)])[0] for batch in mine])

    def state_dict(self) -> dict[str, int]:
        """The data's position is the step, as long as steps stay as large."""
        return {"tokens_per_step": self.tokens_per_step}

    def heldout_documents(self) -> list[npt.NDArray[np.int32]]:
        """Every held-out source's tokens, in an order that is the same on every machine."""
        return [self.table.tokens(document) for document in self.unseen_documents]

    def documents(self) -> list[npt.NDArray[np.int32]]:
        """Every source's tokens, trained on or not, in the same order."""
        return [self.table.tokens(document) for document in np.unique(self.table.source_hash, return_index=True)[1]]

    def step_batches(self, step: int) -> list[Batch]:
        """This rank's part of its micro-batches of an optimizer step."""
        length = self.packer.length_at(step)
        indices = range(self.mesh.data_parallel_rank, self.packer.num_micro_batches, self.mesh.data_parallel_size)
        rows = (self.packer.rows(step, index) for index in indices)
        return self._mine([fill(batch, length, self.table, self.pad_token_id) for batch in rows])

    def _mine(self, batches: list[Batch]) -> list[Batch]:
        """This rank's part of each row, with the step's valid tokens in it. A row's tokens are counted on one rank."""
        part = self.mesh.part(batches[0]["input_ids"].shape[1])
        first = self.mesh.sequence_parallel_rank == 0
        mine = [
            {
                **{name: value[:, part] for name, value in batch.items() if name != "num_tokens"},
                "num_tokens": batch["num_tokens"] if first else 0,
                "sequence_length": batch["input_ids"].shape[1],
            }
            for batch in batches
        ]
        num_valid_tokens = sum(int((batch["labels"] != IGNORED).sum()) for batch in mine)
        return [{**batch, "num_valid_tokens": num_valid_tokens} for batch in mine]

    @cached_property
    def mesh(self) -> Mesh:
        """Which rows are this rank's, and which part of them."""
        return Mesh(
            rank=self.attached.global_rank,
            world_size=self.attached.world_size,
            sequence_parallel_size=self.sequence_parallel_size,
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, over all ranks, padding included."""
        per_micro_batch = self.micro_batch_size * self.sequence_length
        return per_micro_batch * self.attached.accumulate_grad_batches * self.mesh.data_parallel_size

    @cached_property
    def table(self) -> TokenTable:
        """The tokenized corpus."""
        return tokenize(self.corpus, self.tokenizer, self.cache_dir)

    @cached_property
    def train_documents(self) -> Ints:
        """Numbers of the documents that are trained on."""
        return np.flatnonzero(self.table.source_hash >= self.heldout_fraction)

    @cached_property
    def unseen_documents(self) -> Ints:
        """Numbers of the held-out documents, one a source (repeats and variants would count a text twice)."""
        hashes, first = np.unique(self.table.source_hash, return_index=True)
        return first[hashes < self.heldout_fraction]

    @property
    def attached(self) -> lightning.Trainer:
        """The trainer, which knows the step, the ranks and how many batches make a step."""
        if self.trainer is None:
            raise RuntimeError("batches need a trainer: trainer.fit(module, datamodule=...) attaches it")
        return self.trainer

    @property
    def pad_token_id(self) -> int:
        """What stands behind the last document of a row; nothing attends to it and it predicts nothing."""
        return self.tokenizer.eos_token_id or 0

    @cached_property
    def packer(self) -> Packing:
        """Says which tokens each micro-batch is made of."""
        for documents, use in ((self.train_documents, "to train on"), (self.unseen_documents, "held out")):
            logger.info("%d documents, %d tokens %s", len(documents), self.table.lengths[documents].sum(), use)
        return PACKINGS[self.packing](
            documents=self.train_documents,
            lengths=self.table.lengths,
            curriculum=self.curriculum,
            micro_batch_tokens=self.micro_batch_size * self.sequence_length,
            num_micro_batches=self.attached.accumulate_grad_batches * self.mesh.data_parallel_size,
            seed=self.seed,
        )


class TrainingBatches:
    """Iterating starts at the trainer's step, so a resumed run goes on where it stopped."""

    def __init__(self, data: LongContextData) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        step = self.data.attached.global_step
        while True:
            yield from self.data.step_batches(step)
            step += 1


class HeldoutBatches:
    """A plain list, in a class of its own: Lightning takes a list for several loaders."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
