"""The small model for training: what transformers' Qwen3MoeForCausalLM computes, laid out for speed on a CPU.

Tokens are sorted by expert and each expert's rows padded to a multiple of PAD_ROWS, so that grouped matrix products
meet few different shapes (oneDNN prepares a kernel for every new shape, which would take longer than the product).
Weights are kept in float32, products are taken in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

PAD_ROWS = 128


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of the model, under the names of Hugging Face's Qwen3MoeConfig."""

    vocab_size: int = 260
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 2
    head_dim: int = 64
    num_experts: int = 32
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 64
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class Routing:
    """One layer's routing of B x T tokens: probabilities [B, T, E] over all experts, and the k chosen [B, T, k]."""

    probability: Tensor
    chosen: Tensor


class SmallMoe(nn.Module):
    """Byte tokens int64 [B, T] -> logits float32 [B, T, vocabulary] and the routing of every layer."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.embedding = nn.Parameter(0.3 * torch.randn(geometry.vocab_size, geometry.hidden_size))
        self.blocks = nn.ModuleList(Block(geometry) for _ in range(geometry.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(geometry.hidden_size))
        self.head = weight(geometry.vocab_size, geometry.hidden_size, scale=0.5)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Routing]]:
        x = functional.embedding(tokens, self.embedding).bfloat16()
        turn = rotation(tokens.shape[1], self.geometry)
        routings = []
        for block in self.blocks:
            x, routing = block(x, turn)
            routings.append(routing)
        x = normalise(x, self.norm, self.geometry)
        return functional.linear(x, self.head.bfloat16()).float(), routings


class Block(nn.Module):
    """One layer: attention, then experts."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        hidden, width = geometry.hidden_size, geometry.num_attention_heads * geometry.head_dim
        small = (2 * geometry.num_hidden_layers) ** -0.5  # what a layer adds to the stream
        self.attention_norm = nn.Parameter(torch.ones(hidden))
        self.query, self.key, self.value = (weight(width, hidden) for _ in range(3))
        self.query_norm = nn.Parameter(torch.ones(geometry.head_dim))
        self.key_norm = nn.Parameter(torch.ones(geometry.head_dim))
        self.output = weight(hidden, width, scale=small)
        self.expert_norm = nn.Parameter(torch.ones(hidden))
        self.router = weight(geometry.num_experts, hidden, scale=0.5)
        self.gate_and_up = weight(geometry.num_experts, 2 * geometry.moe_intermediate_size, hidden)
        self.down = weight(geometry.num_experts, hidden, geometry.moe_intermediate_size, scale=small)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Routing]:
        x = x + self._attend(normalise(x, self.attention_norm, self.geometry), turn)
        y, routing = self._experts(normalise(x, self.expert_norm, self.geometry))
        return x + y, routing

    def _attend(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        heads = (self.geometry.num_attention_heads, self.geometry.head_dim)
        query, key, value = (
            functional.linear(x, matrix.to(x.dtype)).unflatten(-1, heads).transpose(1, 2)
            for matrix in (self.query, self.key, self.value)
        )
        query = rotate(normalise(query, self.query_norm, self.geometry), turn) * self.geometry.head_dim**-0.5
        key = rotate(normalise(key, self.key_norm, self.geometry), turn)
        # Written out: scaled_dot_product_attention's backward is slower on a CPU in bfloat16.
        scores = query @ key.transpose(-1, -2)
        length = x.shape[1]
        scores = scores + torch.full((length, length), -torch.inf, dtype=x.dtype).triu(1)
        mixed = scores.softmax(-1) @ value
        return functional.linear(mixed.transpose(1, 2).flatten(2), self.output.to(x.dtype))

    def _experts(self, x: Tensor) -> tuple[Tensor, Routing]:
        rows = x.flatten(0, 1)
        probability = functional.linear(rows.float(), self.router).softmax(-1)
        share, chosen = probability.topk(self.geometry.num_experts_per_tok, -1)
        share = share / share.sum(-1, keepdim=True)
        token_of_row, row_of_choice, ends = group_by_expert(chosen, self.geometry.num_experts)
        padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        grouped = padded.index_select(0, token_of_row)
        gate, up = functional.grouped_mm(grouped, self.gate_and_up.to(x.dtype).transpose(1, 2), offs=ends).chunk(2, -1)
        answers = functional.grouped_mm(functional.silu(gate) * up, self.down.to(x.dtype).transpose(1, 2), offs=ends)
        answers = answers.index_select(0, row_of_choice).unflatten(0, chosen.shape)
        mixed = share.to(x.dtype).unsqueeze(1) @ answers
        split = x.shape[:2]
        return mixed.view_as(x), Routing(probability.unflatten(0, split), chosen.unflatten(0, split))


@torch.no_grad()
def group_by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order of rows for grouped products.

    chosen: int64 [N, k]. Returns, of R rows sorted by expert: the token [R] each is computed for, N where a row is
    padding; the row [N * k] of each token's choices; the int32 end [E] of each expert's rows.
    """
    tokens, per_token = chosen.shape
    expert = chosen.flatten()
    count = expert.bincount(minlength=experts)
    room = (count + PAD_ROWS - 1).div(PAD_ROWS, rounding_mode="floor") * PAD_ROWS
    ends = room.cumsum(0)
    by_expert = expert.argsort(stable=True)
    place_in_expert = torch.arange(len(expert)) - (count.cumsum(0) - count).repeat_interleave(count)
    row = (ends - room).repeat_interleave(count) + place_in_expert
    token_of_row = torch.full((int(ends[-1]),), tokens)
    token_of_row[row] = by_expert // per_token
    row_of_choice = torch.empty_like(expert)
    row_of_choice[by_expert] = row
    return token_of_row, row_of_choice, ends.int()


def weight(*shape: int, scale: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * scale * shape[-1] ** -0.5)


def normalise(x: Tensor, gain: Tensor, geometry: Geometry) -> Tensor:
    return functional.rms_norm(x, gain.shape, gain.to(x.dtype), geometry.rms_norm_eps)


def rotation(length: int, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, head_dim / 2] of the rotary embedding."""
    half = geometry.head_dim // 2
    frequency = geometry.rope_theta ** -(torch.arange(half) / half)
    angle = torch.arange(length)[:, None] * frequency
    return angle.cos().bfloat16(), angle.sin().bfloat16()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = turn
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


def balance_loss(routings: list[Routing]) -> Tensor:
    """Mean over layers of E * sum(share of selections * mean probability) over the whole batch: 1 if even."""
    losses = []
    for routing in routings:
        experts = routing.probability.shape[-1]
        share = routing.chosen.flatten().bincount(minlength=experts) / routing.chosen.numel()
        losses.append(experts * (share * routing.probability.mean((0, 1))).sum())
    return torch.stack(losses).mean()


def sequence_information(routings: list[Routing]) -> Tensor:
    """Mean over layers of the mutual information, in nats, of a token's sequence in the batch and its expert."""
    values = []
    for routing in routings:
        of_sequence = routing.probability.mean(1)
        values.append(entropy(of_sequence.mean(0)) - entropy(of_sequence).mean())
    return torch.stack(values).mean()


def entropy(probability: Tensor) -> Tensor:
    return -(probability * (probability + 1e-9).log()).sum(-1)
