"""Map ranks to rows and to parts of rows."""

from dataclasses import dataclass

import torch.distributed as dist

from lctrain.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """A division of `world_size` ranks into sets of `sequence_parallel_size` ranks, each of which shares one row.

    The ranks of a set are consecutive, so that they are on one node wherever the size divides the node's devices.
    Raises InputError if the size does not divide `world_size`.
    """

    rank: int
    world_size: int
    sequence_parallel_size: int

    def __post_init__(self) -> None:
        if self.sequence_parallel_size < 1 or self.world_size % self.sequence_parallel_size:
            raise InputError(
                f"sequence_parallel_size={self.sequence_parallel_size} does not divide the {self.world_size} processes "
                "of this run; change it, trainer.devices or trainer.num_nodes"
            )

    @property
    def data_parallel_size(self) -> int:
        """Return the number of rows that are read at a time."""
        return self.world_size // self.sequence_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        """Return which of these rows this rank reads."""
        return self.rank // self.sequence_parallel_size

    @property
    def sequence_parallel_rank(self) -> int:
        """Return which part of its row this rank holds."""
        return self.rank % self.sequence_parallel_size

    def part(self, length: int) -> slice:
        """Return the slice of this rank's tokens in a row of `length` tokens."""
        size = length // self.sequence_parallel_size
        return slice(self.sequence_parallel_rank * size, (self.sequence_parallel_rank + 1) * size)

    def sequence_group(self) -> dist.ProcessGroup | None:
        """Return the process group of the ranks that share this rank's row; None if it is alone. Collective."""
        if self.sequence_parallel_size == 1:
            return None
        group: dist.ProcessGroup = dist.new_subgroups(self.sequence_parallel_size)[0]
        return group
