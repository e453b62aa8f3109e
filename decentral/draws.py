"""Random numbers as a function of counters, not of a generator's state.

A draw depends on the words it is asked for (seed, worker, step, ...) and on nothing drawn before.
So the simulator, a worker on its own and a resumed run all draw the same, and ten thousand workers
draw at once. All arithmetic is int64 modulo 2^64: the values are the same on every device.
Not for cryptography.
"""

import math

import torch
from torch import Tensor

LARGEST_SIZE = 2**31  # of a range to draw from: 32 random bits times the size must fit in int64

SHUFFLE_BLOCK = 2**15  # positions to sort at a time, at least those of one order

NORMAL_BLOCK = 2**18  # pairs of normals drawn at a time

_WEYL = 0x9E3779B97F4A7C15  # odd, 2^64 / golden ratio: spreads successive counters


def hash64(*words: int | Tensor) -> Tensor:
    """64 random bits, int64, for each combination of the broadcastable `words`.

    Words are ints (of any size, taken modulo 2^64) or int64 tensors. Their order counts.
    Each word is absorbed by the finaliser of splitmix64 (Steele, Lea and Flood 2014), so that the
    draws along the last word are that generator's own stream.
    """
    state = torch.zeros((), dtype=torch.int64)
    for word in words:
        if isinstance(word, int):
            state = _finalise(state + _signed((word + 1) * _WEYL))
        else:
            state = _finalise(state + (word + 1) * _signed(_WEYL))
    return state


def uniform_index(bits: Tensor, size: Tensor | int) -> Tensor:
    """Map 64 random `bits` to range(size); `size` at most 2^31, broadcastable with `bits`.

    No index is more likely than another by more than size / 2^32 of itself.
    """
    return (((bits >> 32) & 0xFFFFFFFF) * size) >> 32


def uniform_float(bits: Tensor) -> Tensor:
    """64 random `bits` to the middle of one of 2^53 equal parts of (0, 1), float64."""
    return (((bits >> 11) & ((1 << 53) - 1)).double() + 0.5) / 2.0**53


def shuffled(key: Tensor, size: int) -> Tensor:
    """A uniformly random order of range(size) for each of the `key`s [k], int64 [k, size].

    The order in which hashed positions sort: every order is equally likely but for ties, of which
    64 bits leave none in practice. The position takes the place of the lowest of them, so that it
    is plain numbers which are sorted: numpy does that several times faster than any argsort. Some
    keys at a time, whose hashes stay in the cache.
    """
    position = torch.arange(size)
    low = (1 << max(1, size - 1).bit_length()) - 1  # the bits that a position takes
    order = torch.empty(len(key), size, dtype=torch.int64)
    block = max(1, SHUFFLE_BLOCK // max(1, size))
    for keys, rows in zip(key.split(block), order.split(block), strict=True):
        torch.bitwise_or(hash64(keys[:, None], position) & ~low, position, out=rows)
        rows.numpy().sort(axis=1)
        rows &= low
    return order


def normal(key: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Standard normals in `dtype`, [..., size], for each of the `key`s [...].

    Box and Muller's pairs, sqrt(-2 ln u) (cos, sin)(2 pi v), the two uniforms being the halves of
    64 bits: none is beyond 6.8. Made in float64, a block at a time to spare memory.
    """
    half = (size + 1) // 2
    drawn = torch.empty(*key.shape, 2, half, dtype=dtype, device=key.device)
    block = max(1, NORMAL_BLOCK // max(1, key.numel()))
    for counter in torch.arange(half, device=key.device).split(block):
        bits = hash64(key[..., None], counter)
        radius = _unit(bits >> 32).log_().mul_(-2).sqrt_()
        angle = _unit(bits).mul_(2 * math.pi)
        pair = slice(int(counter[0]), int(counter[-1]) + 1)
        drawn[..., 0, pair] = radius * angle.cos()
        drawn[..., 1, pair] = radius * angle.sin()
    return drawn.flatten(-2)[..., :size]


def signs(key: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Independent signs +1 or -1 in `dtype`, [..., size], for each of the `key`s [...]."""
    bits = hash64(key[..., None], torch.arange(size, device=key.device))
    return ((bits >> 63) * 2 + 1).to(dtype)  # the shift leaves -1 or 0


def _unit(bits: Tensor) -> Tensor:
    """The lower 32 `bits` as a float64 within (0, 1)."""
    return (bits & 0xFFFFFFFF).double().add_(0.5).mul_(2.0**-32)


def _finalise(z: Tensor) -> Tensor:
    """The finaliser of splitmix64. The masks make logical shifts of the arithmetic ones."""
    z = z ^ ((z >> 30) & ((1 << 34) - 1))
    z *= _signed(0xBF58476D1CE4E5B9)
    z ^= (z >> 27).bitwise_and_((1 << 37) - 1)
    z *= _signed(0x94D049BB133111EB)
    z ^= (z >> 31).bitwise_and_((1 << 33) - 1)
    return z


def _signed(word: int) -> int:
    """The int64 with the same 64 bits."""
    return (word + 2**63) % 2**64 - 2**63
