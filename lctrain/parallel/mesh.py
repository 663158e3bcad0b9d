"""Which ranks share a row, and which read other rows."""

from dataclasses import dataclass

import torch.distributed as dist

from lctrain.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """`world_size` ranks as rows of `sequence_parallel_size` neighbours, who share a row of tokens between them.

    Neighbours are consecutive ranks, so that they sit on one node wherever the size divides the node's devices.
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
        """How many different rows are read at a time."""
        return self.world_size // self.sequence_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        """Which of them this rank reads."""
        return self.rank // self.sequence_parallel_size

    @property
    def sequence_parallel_rank(self) -> int:
        """Which part of the row is this rank's."""
        return self.rank % self.sequence_parallel_size

    def part(self, length: int) -> slice:
        """This rank's tokens of a row of `length`."""
        size = length // self.sequence_parallel_size
        return slice(self.sequence_parallel_rank * size, (self.sequence_parallel_rank + 1) * size)

    def sequence_group(self) -> dist.ProcessGroup | None:
        """The process group of those who share this rank's row; None where nobody does. Collective over all ranks."""
        if self.sequence_parallel_size == 1:
            return None
        group: dist.ProcessGroup = dist.new_subgroups(self.sequence_parallel_size)[0]
        return group
