"""An attention module with rotary positions that computes all heads together or some at a time.

Shape legend: B rows, L tokens, H query heads, D head dim.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from lctrain.losses.linear_part import linear_part
from lctrain.memory.shares import sum_over_shares


class RotaryAttention(nn.Module):
    """An attention module that projects, rotates queries and keys in one function, calls transformers' attention
    interface, and projects back.

    With `kv_heads_at_a_time`, it runs all these steps for that many key-value heads and the query heads that share
    them, then for the next, with the rows of the input projections and columns of the output projection that belong to
    these heads.
    """

    q_proj: Callable[[Tensor], Tensor]
    k_proj: Callable[[Tensor], Tensor]
    v_proj: Callable[[Tensor], Tensor]
    o_proj: Callable[[Tensor], Tensor]

    def __init__(
        self, attention: nn.Module, rope: Callable[..., tuple[Tensor, Tensor]], kv_heads_at_a_time: int = 0
    ) -> None:
        super().__init__()
        for name, child in attention.named_children():
            self.add_module(name, child)
        for name, parameter in attention.named_parameters(recurse=False):  # those that an attention method added
            self.register_parameter(name, parameter)
        self.config: Any = attention.config
        self.layer_idx, self.scaling = attention.layer_idx, attention.scaling
        self.num_key_value_groups: int = attention.num_key_value_groups  # type: ignore[assignment]
        self.head_dim: int = attention.head_dim  # type: ignore[assignment]
        self.rope, self._at_a_time = rope, kv_heads_at_a_time

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return the replaced module's output, [B, L, D]; the parameters keep the names that callers use."""

        def attend(q: Tensor, k: Tensor, v: Tensor, first_head: int = 0) -> Tensor:
            q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
            q, k = self.rope(q, k, *position_embeddings)
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, self.layer_idx)
            run = AttentionInterface()[self.config._attn_implementation]
            out_BLHD, _ = run(self, q, k, v, attention_mask, scaling=self.scaling, first_head=first_head, **kwargs)
            return out_BLHD.flatten(2)  # type: ignore[no-any-return]

        def share(hidden: Tensor, first: int) -> Tensor:
            shared, width = self.num_key_value_groups, self._at_a_time * self.head_dim
            kv = slice(first * self.head_dim, first * self.head_dim + width)
            queries = slice(kv.start * shared, kv.stop * shared)
            q, k, v = (
                linear_part(project, hidden, outputs=rows)
                for project, rows in ((self.q_proj, queries), (self.k_proj, kv), (self.v_proj, kv))
            )
            out = attend(q, k, v, first_head=first * shared)
            return linear_part(self.o_proj, out.flatten(0, 1), inputs=queries)

        if not self._at_a_time or past_key_values is not None:  # a cache needs all heads of a layer at once
            q, k, v = (project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj))
            return self.o_proj(attend(q, k, v)), None
        firsts = range(0, self.config.num_key_value_heads, self._at_a_time)
        return sum_over_shares(share, hidden_states, firsts), None
