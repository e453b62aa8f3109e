"""A small GPT: the model of the task `text`."""

import math
from collections.abc import Sequence

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from decentral.errors import UserError

STD = 0.02  # of initial weights, as in GPT-2


class Attention(nn.Module):
    """Causal self-attention of several heads: position t sees positions 0 .. t.

    Written out, as torch's fused attention does not stack over workers on CPUs.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, T, width] to the same shape."""
        batch, T, width = x.shape
        split = (batch, T, 3, self.heads, width // self.heads)
        q, k, v = (
            self.qkv(x).reshape(split).permute(2, 0, 3, 1, 4)
        )  # each [batch, heads, T, width/h]
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(later, -math.inf).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, T, width))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.narrow(functional.gelu(self.widen(self.norm_mlp(x))))


class GPT(nn.Module):
    """Characters [batch, T] to scores of each next one [batch, T, vocabulary].

    Layer norms before each part, learned positions, no dropout; the first and the last layer share
    their weights. Radford et al. 2019 (GPT-2), and its initial values: N(0, 0.02^2), divided by
    sqrt(2 layers) where a block adds to its input; biases zero.
    """

    def __init__(self, context: int, vocabulary: int, width: int, layers: int, heads: int):
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                adds = name.endswith(("out.weight", "narrow.weight"))
                nn.init.normal_(parameter, std=STD / (math.sqrt(2 * layers) if adds else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, characters: Tensor) -> Tensor:
        positions = torch.arange(characters.shape[-1], device=characters.device)
        x = self.characters(characters) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.characters.weight)


def gpt(
    shape: Sequence[int],
    classes: int,
    *,
    width: PositiveInt = 64,
    layers: PositiveInt = 2,
    heads: PositiveInt = 4,
) -> nn.Module:
    """A GPT; `shape` is [context], `classes` the vocabulary. `heads` must divide `width`."""
    if width % heads:
        raise UserError(
            f"the heads share the width evenly; got {heads} heads and width {width}",
            "task.model.heads",
        )
    (context,) = shape
    return GPT(context, classes, width, layers, heads)
