"""Compute linear attention with decay and softmax attention over a window, chunk by chunk, as sums without a division.

Values end with a 1, so that the last sum is that of the weights, by which the others are divided.

Shape legend: B batch, K key-value heads, G query heads of a key-value head, L queries, S keys, N chunks of a row,
M chunks of all rows, C tokens of a chunk, W keys that a chunk's windows hold, D head dim, E = D + 1, F features,
V = F · E.
"""

from math import inf
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STATES_AT_ONCE = 32  # chunks whose states are computed from all pairs


class State(NamedTuple):
    """What linear attention keeps of the tokens that it has read."""

    sums_BKFE: Tensor  # the sum of decay · φ(k) vᵀ over the tokens of one document
    documents_B: Tensor  # that document's number

    def then(self, log_decay_BK: Tensor, added: "State") -> "State":
        """Return the state after further tokens, of which `added` is the sum; it begins anew with a document."""
        others_B = self.documents_B != added.documents_B
        kept_BK = log_decay_BK.masked_fill(others_B[:, None], -inf).exp()
        return State(kept_BK[..., None, None] * self.sums_BKFE + added.sums_BKFE, added.documents_B)

    def read(self, q_BKGLF: Tensor, documents_BL: Tensor, log_decay_BKL: Tensor) -> Tensor:
        """Return decay · φ(q)ᵀ S, [B, K, G, L, E], where the state is of the query's document, else 0."""
        others_BL = documents_BL != self.documents_B[:, None]
        kept_BKL = log_decay_BKL.masked_fill(others_BL[:, None], -inf).exp()
        return torch.einsum("bkglf,bkl,bkfe->bkgle", q_BKGLF, kept_BKL, self.sums_BKFE)


class Entries(NamedTuple):
    """Tokens in the order in which they enter the state."""

    k_BKLF: Tensor  # φ(k)
    v_BKLE: Tensor
    log_decay_BKL: Tensor  # by which the state decays before the token is added
    documents_BL: Tensor  # -1 where there is no token

    def part(self, tokens: slice) -> "Entries":
        """Return some of the tokens."""
        k, v, log_decay, documents = self
        return Entries(k[:, :, tokens], v[:, :, tokens], log_decay[:, :, tokens], documents[:, tokens])

    def state(self) -> State:
        """Return the state after these tokens and none before."""
        others_BL = self.documents_BL != self.documents_BL[:, -1:]
        until_BKL = self.log_decay_BKL.cumsum(-1)
        kept_BKL = (until_BKL[..., -1:] - until_BKL).masked_fill(others_BL[:, None], -inf).exp()
        return State((self.k_BKLF * kept_BKL[..., None]).mT @ self.v_BKLE, self.documents_BL[:, -1])

    def read(self, q_BKGLF: Tensor, documents_BL: Tensor) -> Tensor:
        """Return the sums [B, K, G, L, E] over the first i of these tokens for query i, by all pairs."""
        seen_BLL = (documents_BL[..., None] == self.documents_BL[:, None]).tril()
        until_BKL = self.log_decay_BKL.cumsum(-1)
        decay_BKLL = (until_BKL[..., None] - until_BKL[..., None, :]).masked_fill(~seen_BLL[:, None], -inf).exp()
        weights_BKGLL = torch.einsum("bkglf,bksf->bkgls", q_BKGLF, self.k_BKLF) * decay_BKLL[:, :, None]
        return torch.einsum("bkgls,bkse->bkgle", weights_BKGLL, self.v_BKLE)


def linear(q_BKGLF: Tensor, documents_BL: Tensor, entries: Entries, chunk_size: int) -> Tensor:
    """Return the sums [B, K, G, L, E] of linear attention. The last L entries come with the queries, others before."""
    length = documents_BL.shape[1]
    before = entries.documents_BL.shape[1] - length
    given = q_BKGLF, documents_BL, entries.part(slice(before, None)), entries.part(slice(before)).state()
    return recurrent(*given) if length == 1 else chunked(*given, chunk_size)


def recurrent(q_BKGLF: Tensor, documents_BL: Tensor, entries: Entries, state: State) -> Tensor:
    """Return the sums [B, K, G, L, E] of linear attention, token by token.

    S_t = α_t S_{t-1} + φ(k_t) v_tᵀ, which begins anew with each document, is read by φ(q_t).
    """
    out = []
    for t in range(q_BKGLF.shape[3]):
        now = slice(t, t + 1)
        entry = entries.part(now)
        state = state.then(entry.log_decay_BKL[..., 0], entry.state())
        out.append(state.read(q_BKGLF[:, :, :, now], documents_BL[:, now], torch.zeros_like(entry.log_decay_BKL)))
    return torch.cat(out, dim=3)


def chunked(q_BKGLF: Tensor, documents_BL: Tensor, entries: Entries, state: State, chunk_size: int) -> Tensor:
    """Return the sums that `recurrent` returns, from all pairs inside each chunk and the state at its begin."""
    num_rows, length = documents_BL.shape
    if length <= chunk_size:
        within = entries.read(q_BKGLF, documents_BL)
        return within + state.read(q_BKGLF, documents_BL, entries.log_decay_BKL.cumsum(-1))
    q_MKGCF, documents_MC = _chunks(q_BKGLF, 3, chunk_size), _chunks(documents_BL, 1, chunk_size, -1)
    chunks = Entries(
        k_BKLF=_chunks(entries.k_BKLF, 2, chunk_size),
        v_BKLE=_chunks(entries.v_BKLE, 2, chunk_size),
        log_decay_BKL=_chunks(entries.log_decay_BKL, 2, chunk_size),
        documents_BL=_chunks(entries.documents_BL, 1, chunk_size, -1),
    )
    out_MKGCE = chunked(q_MKGCF, documents_MC, chunks, _begins(chunks, state), chunk_size)
    return _joined(out_MKGCE, num_rows)[:, :, :, :length]


def _begins(chunks: Entries, state: State) -> State:
    """Return the state at the begin of every chunk of the rows, of which `state` is that at their begin.

    Each is the decayed sum of what the chunks before it add: linear attention with one entry for each chunk. So
    `chunked` computes all of them, in fewer steps than one chunk after another.
    """
    num_rows = len(state.documents_B)
    sums, ends, log_decays = (
        x.unflatten(0, (num_rows, -1))[:, :-1] for x in (*chunks.state(), chunks.log_decay_BKL.sum(-1))
    )
    v_BKNV = torch.cat((state.sums_BKFE[:, None], sums), dim=1).flatten(-2).transpose(1, 2)
    log_decay_BKN = F.pad(log_decays, (0, 0, 1, 0)).transpose(1, 2)
    documents_BN = torch.cat((state.documents_B[:, None], ends), dim=1)
    one_BKN1 = torch.ones_like(log_decay_BKN)[..., None]
    nothing = State(torch.zeros_like(v_BKNV[:, :, :1]), state.documents_B)
    added = Entries(one_BKN1, v_BKNV, log_decay_BKN, documents_BN)
    begins_BKNV = chunked(one_BKN1[:, :, None], documents_BN, added, nothing, STATES_AT_ONCE).squeeze(2)
    begins_BNKFE = begins_BKNV.transpose(1, 2).unflatten(-1, state.sums_BKFE.shape[2:])
    return State(begins_BNKFE.flatten(0, 1), documents_BN.flatten())


def windowed(
    q_BKGLD: Tensor, k_BKSD: Tensor, v_BKSE: Tensor, documents_BS: Tensor, window: int, chunk_size: int
) -> Tensor:
    """Return the sums [B, K, G, L, E] of softmax attention to the last `window` tokens, whose largest weight is 1.

    Queries are the last tokens, already scaled. A chunk of them meets the keys that any of its windows holds.
    """
    (num_rows, num_keys), length = documents_BS.shape, q_BKGLD.shape[3]
    chunk_size, earlier = min(chunk_size, length), window - 1
    first = max(0, num_keys - length - earlier)  # the first key that any query sees
    missing = earlier - (num_keys - length - first)

    def windows(x: Tensor, axis: int, value: int = 0) -> Tensor:
        x = x.narrow(axis, first, num_keys - first)
        x = F.pad(x, (0, 0) * (x.ndim - 1 - axis) + (missing, -length % chunk_size), value=value)
        return x.unfold(axis, chunk_size + earlier, chunk_size).movedim(axis, 1).flatten(0, 1)

    q_MKGCD = _chunks(q_BKGLD, 3, chunk_size)
    k_MKDW, v_MKEW, documents_MW = windows(k_BKSD, 2), windows(v_BKSE, 2), windows(documents_BS, 1, -1)
    rows, columns = (torch.arange(n, device=q_BKGLD.device) for n in (chunk_size, chunk_size + earlier))
    distance_CW = rows[:, None] + earlier - columns
    seen_MCW = (distance_CW >= 0) & (distance_CW < window) & (documents_MW[:, earlier:, None] == documents_MW[:, None])
    scores_MKGCW = torch.einsum("mkgcd,mkdw->mkgcw", q_MKGCD, k_MKDW).masked_fill(~seen_MCW[:, None, None], -inf)
    weights_MKGCW = (scores_MKGCW - scores_MKGCW.amax(-1, keepdim=True)).exp()
    out_MKGCE = torch.einsum("mkgcw,mkew->mkgce", weights_MKGCW, v_MKEW)
    return _joined(out_MKGCE, num_rows)[:, :, :, :length]


def _chunks(x: Tensor, axis: int, size: int, value: int = 0) -> Tensor:
    """Return the chunks of all rows as rows; the last chunk of a row is filled with `value`."""
    x = F.pad(x, (0, 0) * (x.ndim - 1 - axis) + (0, -x.shape[axis] % size), value=value)
    chunks: Tensor = x.unflatten(axis, (-1, size)).movedim(axis, 1).flatten(0, 1)
    return chunks


def _joined(x_MKGCE: Tensor, num_rows: int) -> Tensor:
    joined: Tensor = x_MKGCE.unflatten(0, (num_rows, -1)).movedim(1, 3).flatten(3, 4)
    return joined
