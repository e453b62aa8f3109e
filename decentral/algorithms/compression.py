"""What goes over the wire instead of floats: compressors, each a code of bytes.

`encode` turns [..., D] into uint8 [..., M], `decode` turns it back; the M bytes are what is sent
and counted. `contraction` is delta in ||x - Q(x)||^2 <= (1 - delta) ||x||^2, in expectation where
Q is random: CHOCO converges for any delta > 0 (Koloskova et al. 2019, assumption 1).
"""

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from decentral.draws import hash64
from decentral.replica import Compressor

Fraction = Annotated[float, Field(gt=0, le=1)]


class Identity:
    """No compression: every float as it is."""

    def encode(self, x: Tensor, key: Tensor) -> Tensor:
        return _bytes(x)

    def decode(self, message: Tensor, like: Tensor) -> Tensor:
        return message.view(like.dtype)

    def contraction(self, size: int) -> float:
        return 1.0


class BFloat16:
    """Every float cast to bfloat16: 2 D bytes, eight bits of mantissa."""

    def encode(self, x: Tensor, key: Tensor) -> Tensor:
        return _bytes(x.to(torch.bfloat16))

    def decode(self, message: Tensor, like: Tensor) -> Tensor:
        return message.view(torch.bfloat16).to(like.dtype)

    def contraction(self, size: int) -> float:
        return 1 - 2.0**-16  # rounding to nearest: a relative error of at most 2^-8 each


class Int8:
    """Every float rounded to one of 255 levels between -m and m, m the largest magnitude in its
    block of BLOCK: a byte each, and four for each block.

    With one m for a whole model the levels of its small layers would be those of its largest.
    """

    BLOCK = 1024

    def encode(self, x: Tensor, key: Tensor) -> Tensor:
        size = x.shape[-1]
        blocks = torch.nn.functional.pad(x, (0, -size % self.BLOCK)).unflatten(-1, (-1, self.BLOCK))
        scale = blocks.abs().amax(dim=-1, keepdim=True).to(torch.float32) / 127
        levels = torch.round(blocks / torch.where(scale > 0, scale, 1)).clamp(-127, 127)
        codes = levels.to(torch.int8).flatten(-2)[..., :size]
        return torch.cat([_bytes(codes), _bytes(scale.squeeze(-1))], dim=-1)

    def decode(self, message: Tensor, like: Tensor) -> Tensor:
        size = like.shape[-1]
        levels = message[..., :size].view(torch.int8).to(like.dtype)
        scale = _floats(message[..., size:], torch.float32).to(like.dtype)
        return levels * scale.repeat_interleave(self.BLOCK, dim=-1)[..., :size]

    def contraction(self, size: int) -> float:
        return 1 - min(size, self.BLOCK) / (4 * 127**2)  # each off by at most half a level


class Sign:
    """The signs, a bit each, and one scale ||x||_1 / D: D / 8 + 4 bytes."""

    def encode(self, x: Tensor, key: Tensor) -> Tensor:
        scale = x.abs().mean(dim=-1, keepdim=True).to(torch.float32)
        positive = torch.nn.functional.pad((x >= 0).to(torch.uint8), (0, -x.shape[-1] % 8))
        bits = 2 ** torch.arange(8, dtype=torch.uint8, device=x.device)
        packed = (positive.unflatten(-1, (-1, 8)) * bits).sum(dim=-1, dtype=torch.uint8)
        return torch.cat([packed, _bytes(scale)], dim=-1)

    def decode(self, message: Tensor, like: Tensor) -> Tensor:
        bits = torch.arange(8, dtype=torch.uint8, device=message.device)
        positive = (message[..., :-4].unsqueeze(-1) >> bits) & 1
        signs = positive.flatten(-2)[..., : like.shape[-1]].to(like.dtype) * 2 - 1
        return signs * _floats(message[..., -4:], torch.float32).to(like.dtype)

    def contraction(self, size: int) -> float:
        return 1 / size  # ||x||_1^2 / (D ||x||^2) is at least that


class TopK:
    """The largest elements by magnitude, and where they are: (itemsize + 4) k bytes."""

    def __init__(self, fraction: Fraction):
        self.fraction = fraction

    def encode(self, x: Tensor, key: Tensor) -> Tensor:
        places = x.abs().topk(_count(self.fraction, x.shape[-1]), dim=-1).indices
        values = x.gather(-1, places)
        return torch.cat([_bytes(values), _bytes(places.to(torch.int32))], dim=-1)

    def decode(self, message: Tensor, like: Tensor) -> Tensor:
        count = _count(self.fraction, like.shape[-1])
        values = _floats(message[..., : -4 * count], like.dtype)
        places = _floats(message[..., -4 * count :], torch.int32).to(torch.int64)
        return _scattered(values, places, like)

    def contraction(self, size: int) -> float:
        return _count(self.fraction, size) / size


class RandomK:
    """Random elements, and the key they were drawn with: itemsize k + 8 bytes."""

    def __init__(self, fraction: Fraction):
        self.fraction = fraction

    def encode(self, x: Tensor, key: Tensor) -> Tensor:
        places = self._places(key.unsqueeze(-1), x)
        return torch.cat([_bytes(x.gather(-1, places)), _bytes(key.unsqueeze(-1))], dim=-1)

    def decode(self, message: Tensor, like: Tensor) -> Tensor:
        places = self._places(_floats(message[..., -8:], torch.int64), like)
        return _scattered(_floats(message[..., :-8], like.dtype), places, like)

    def contraction(self, size: int) -> float:
        return _count(self.fraction, size) / size

    def _places(self, key: Tensor, like: Tensor) -> Tensor:
        order = hash64(key, torch.arange(like.shape[-1], device=key.device))
        return order.topk(_count(self.fraction, like.shape[-1]), dim=-1).indices


COMPRESSORS: dict[str, Callable[..., Compressor]] = {
    "none": Identity,
    "bfloat16": BFloat16,
    "int8": Int8,
    "sign": Sign,
    "top_k": TopK,
    "random_k": RandomK,
}


def _count(fraction: float, size: int) -> int:
    return max(1, round(fraction * size))


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _floats(message: Tensor, dtype: torch.dtype) -> Tensor:
    return message.clone(memory_format=torch.contiguous_format).view(dtype)  # at an aligned place


def _scattered(values: Tensor, places: Tensor, like: Tensor) -> Tensor:
    whole = torch.zeros(*values.shape[:-1], like.shape[-1], dtype=like.dtype, device=values.device)
    return whole.scatter_(-1, places, values)
