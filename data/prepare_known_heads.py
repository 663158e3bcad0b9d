"""Build a Llama whose heads are known: some copy what once followed the current word from anywhere, others look near.

No weight is trained. Words are one-hot in the residual stream. Keys and queries live in two halves of a head: its fast
rotary frequencies tell distances (of a constant vector), its slow ones hardly turn and compare words. So a head is
  at(n)      the word n tokens back: a constant query, turned by n
  sink       the document's first token: a constant query for the word <bos>
  retrieve   the words that followed the current word: its query is the current word, its keys the words before theirs
The words before are what layer 0 writes for all others. head_pattern.json in the folder names the heads that retrieve.

usage: python data/prepare_known_heads.py FOLDER
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lctrain.data.multi_passkey import WORDS
from lctrain.heads import JSON, HeadPattern, architecture

VOCABULARY = ["<unk>", "<bos>", "<eos>", *WORDS, "the", "passkey", "is"]
V = len(VOCABULARY)  # 32, the order of a Hadamard matrix: words are orthogonal in a head's slow half
WORD, BEFORE, COPIED, SEEN = (slice(V * i, V * (i + 1)) for i in range(4))  # parts of the residual stream
ONE = V * 4  # a component that is 1 for every token
HEAD_DIM = 2 * V
FAST, SLOW = ([*range(start, start + V // 2), *range(V + start, V + start + V // 2)] for start in (0, V // 2))

HEADS = (  # layers of key-value heads; numbers look so far back
    (1, 2, "sink", 3),
    (0, "sink", "retrieve", 5),
    ("retrieve", 4, 2, "retrieve"),
    ("sink", "retrieve", 6, 1),
)
CONFIG = LlamaConfig(
    vocab_size=V, hidden_size=V * 5, intermediate_size=V, num_hidden_layers=len(HEADS), num_attention_heads=8,
    num_key_value_heads=4, head_dim=HEAD_DIM, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2,
    rope_parameters={"rope_type": "default", "rope_theta": 1e8}, tie_word_embeddings=False,
)  # fmt: skip
SHARPNESS = 50.0  # of attention, between what a head looks for and the rest, in logits


def hadamard() -> Tensor:
    """32 orthogonal rows of ±1."""
    matrix = torch.ones(1, 1)
    while len(matrix) < V:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def turned(distance: float) -> Tensor:
    """The constant vector of a head's fast half, as seen so many tokens back: equal to a key's at that distance."""
    frequencies = 1e8 ** (-torch.arange(V // 2) / V)
    return torch.cat([torch.cos(frequencies * distance), -torch.sin(frequencies * distance)])


def head(kind: int | str) -> tuple[Tensor, Tensor, Tensor]:
    """Projections to one head's queries, keys [hidden, HEAD_DIM] and, behind it, from values to the stream."""
    query, key = torch.zeros(V * 5, HEAD_DIM), torch.zeros(V * 5, HEAD_DIM)
    if kind == "retrieve":
        query[WORD, SLOW] = key[BEFORE, SLOW] = hadamard()
    elif kind == "sink":
        query[ONE, SLOW], key[WORD, SLOW] = hadamard()[VOCABULARY.index("<bos>")], hadamard()
    else:
        query[ONE, FAST], key[ONE, FAST] = turned(float(kind)) * 8, turned(0.0)
    target = {"retrieve": COPIED, 1: BEFORE}.get(kind, SEEN)
    out = torch.zeros(HEAD_DIM, V * 5)
    out[:V, target] = torch.eye(V) * (1.0 if kind == 1 else 0.5)
    return query, key, out


@torch.no_grad()
def build() -> LlamaForCausalLM:
    """The model in fp32."""
    model = LlamaForCausalLM(CONFIG)
    for parameter in model.parameters():
        parameter.zero_()
    model.model.embed_tokens.weight[:, WORD] = torch.eye(V)
    model.model.embed_tokens.weight[:, ONE] = 1.0
    value = torch.zeros(V * 5, HEAD_DIM)
    value[WORD, :V] = torch.eye(V)
    for layer, kinds in zip(model.model.layers, HEADS, strict=True):
        layer.input_layernorm.weight.fill_((2 / (V * 5)) ** 0.5)  # of a word and a one, back to about themselves
        layer.post_attention_layernorm.weight.fill_(1.0)
        projections = [head(kind) for kind in kinds]
        scale = (SHARPNESS * HEAD_DIM**0.5 / V) ** 0.5
        twice = [q * scale for q, _, _ in projections for _ in range(2)]  # two query heads share a key-value head
        layer.self_attn.q_proj.weight.copy_(torch.cat(twice, 1).T)
        layer.self_attn.k_proj.weight.copy_(torch.cat([k * scale for _, k, _ in projections], 1).T)
        layer.self_attn.v_proj.weight.copy_(torch.cat([value] * 4, 1).T)
        layer.self_attn.o_proj.weight.copy_(torch.cat([out / 2 for _, _, out in projections for _ in range(2)]).T)
    model.model.norm.weight.fill_(4.0)
    model.lm_head.weight[:, COPIED] = torch.eye(V) * 4
    return model


def main(folder: str) -> None:
    model, tokenizer = build(), Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", model_max_length=4096
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    gates = [[float(kind == "retrieve") for kind in kinds] for kinds in HEADS]
    truth = HeadPattern.from_gates(gates, threshold=0.5, provenance={"architecture": architecture(CONFIG)})
    truth.write_json(Path(folder) / JSON)


if __name__ == "__main__":
    main(*sys.argv[1:])
