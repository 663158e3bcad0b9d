"""MoBA: each query attends to its own block and the earlier blocks whose mean key it matches best."""

from dataclasses import dataclass

from torch import Tensor

from lctrain.attention.selected import SelectedBlocks


@dataclass(frozen=True, kw_only=True)
class MoBA(SelectedBlocks):
    """Mixture of Block Attention (Lu et al., arXiv:2502.13189, §2.2): the score of a block is q · mean(its keys).

    `top_k` counts the query's own block, as the paper does: 3 means its own block and two earlier ones. Nothing is
    learned. Every query head chooses for itself, as in the paper, by the mean keys of its key-value head. Keys are
    averaged as attention reads them, after rotation, and scores are computed in fp32.
    """

    def score(self, q_BGLD: Tensor, keys_BNMD: Tensor) -> Tensor:
        return q_BGLD @ keys_BNMD.mean(2)[:, None].mT
