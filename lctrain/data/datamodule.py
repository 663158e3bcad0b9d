"""The Lightning data module that makes the batches of every step from a corpus."""

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
    """A data module with endless training batches, whose rows grow with the curriculum, and fixed held-out batches.

    corpus, tokenizer: the corpus is tokenized once into `cache_dir`.
    sequence_length, micro_batch_size: the target row length, and the rows of that length in a micro-batch, which has
    the product of both in tokens at every length.
    packing: `stream` (documents cut where a row ends) or `whole` (documents never cut; for conversations).
    heldout_fraction: share of the documents, chosen by name, that is never trained on.
    num_heldout_tokens: number of held-out tokens that validation reads.
    sequence_parallel_size: number of neighbouring ranks that share each row, one part each.
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
        """Tokenize the corpus if the cache does not hold its tokens yet."""
        tokenize(self.corpus, self.tokenizer, self.cache_dir)

    def setup(self, stage: str) -> None:
        """Map the cache into memory, and refuse a corpus that leaves nothing to train on or nothing held out."""
        train, heldout = self.train_documents, self.unseen_documents
        if not len(heldout) or not len(train):
            raise InputError(
                f"of {len(self.table.lengths)} documents {len(train)} left to train on, {len(heldout)} held out; "
                f"give more documents or change datamodule.heldout_fraction={self.heldout_fraction}"
            )
        if stage == "fit":
            self.packer.length_at(0)  # building the packer refuses documents that it cannot pack

    def train_dataloader(self) -> "TrainingBatches":
        """Return the endless training batches, which start at the trainer's step."""
        return TrainingBatches(self)

    def val_dataloader(self) -> "HeldoutBatches":
        """Return held-out rows of the target length, with equally many batches on each rank."""
        documents, lengths = self.unseen_documents, self.table.lengths
        ends = np.cumsum(lengths[documents])
        num_tokens, size = min(self.num_heldout_tokens, int(ends[-1])), self.sequence_length
        rows = [cut(documents, ends, at, min(at + size, num_tokens)) for at in range(0, num_tokens, size)]
        batches = [rows[i : i + self.micro_batch_size] for i in range(0, len(rows), self.micro_batch_size)]
        world, rank = self.mesh.data_parallel_size, self.mesh.data_parallel_rank
        mine = [batches[(i + rank) % len(batches)] for i in range(0, max(len(batches) // world, 1) * world, world)]
        return HeldoutBatches([self._mine([fill(batch, size, self.table, self.pad_token_id)])[0] for batch in mine])

    def state_dict(self) -> dict[str, int]:
        """Return the tokens per step: as long as this number stays the same, the step alone determines the batches."""
        return {"tokens_per_step": self.tokens_per_step}

    def heldout_documents(self) -> list[npt.NDArray[np.int32]]:
        """Return every held-out source's tokens, in an order that is the same on every machine."""
        return [self.table.tokens(document) for document in self.unseen_documents]

    def documents(self) -> list[npt.NDArray[np.int32]]:
        """Return every source's tokens, whether held out or not, in the same order on every machine."""
        return [self.table.tokens(document) for document in np.unique(self.table.source_hash, return_index=True)[1]]

    def step_batches(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of an optimizer step, with this rank's part of each row."""
        length = self.packer.length_at(step)
        indices = range(self.mesh.data_parallel_rank, self.packer.num_micro_batches, self.mesh.data_parallel_size)
        rows = (self.packer.rows(step, index) for index in indices)
        return self._mine([fill(batch, length, self.table, self.pad_token_id) for batch in rows])

    def _mine(self, batches: list[Batch]) -> list[Batch]:
        """Return this rank's part of each row, and the number of the step's valid tokens in these parts.

        `num_tokens` is set on the first of the ranks that share a row and 0 on the others, so that it counts once.
        """
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
        """The mesh of ranks, which tells which rows this rank reads and which part of each."""
        return Mesh(
            rank=self.attached.global_rank,
            world_size=self.attached.world_size,
            sequence_parallel_size=self.sequence_parallel_size,
        )

    @property
    def tokens_per_step(self) -> int:
        """Return the number of tokens in an optimizer step, over all ranks and with padding."""
        per_micro_batch = self.micro_batch_size * self.sequence_length
        return per_micro_batch * self.attached.accumulate_grad_batches * self.mesh.data_parallel_size

    @cached_property
    def table(self) -> TokenTable:
        """The tokenized corpus."""
        return tokenize(self.corpus, self.tokenizer, self.cache_dir)

    @cached_property
    def train_documents(self) -> Ints:
        """The numbers of the documents that are trained on."""
        return np.flatnonzero(self.table.source_hash >= self.heldout_fraction)

    @cached_property
    def unseen_documents(self) -> Ints:
        """The numbers of the held-out documents, one per source (repeats and variants would count a text twice)."""
        hashes, first = np.unique(self.table.source_hash, return_index=True)
        return first[hashes < self.heldout_fraction]

    @property
    def attached(self) -> lightning.Trainer:
        """Return the trainer, which knows the step, the ranks and the number of micro-batches in a step."""
        if self.trainer is None:
            raise RuntimeError("batches need a trainer: trainer.fit(module, datamodule=...) attaches it")
        return self.trainer

    @property
    def pad_token_id(self) -> int:
        """Return the id that fills a row after its last document; no document attends to it and it has no label."""
        return self.tokenizer.eos_token_id or 0

    @cached_property
    def packer(self) -> Packing:
        """The packing, which determines the tokens of each micro-batch."""
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
    """An endless iterable of batches from the trainer's step on, so that a resumed run goes on where it stopped."""

    def __init__(self, data: LongContextData) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        step = self.data.attached.global_step
        while True:
            yield from self.data.step_batches(step)
            step += 1


class HeldoutBatches:
    """A list of batches that is not a `list`, which Lightning would treat as several loaders."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
