"""Random numbers as a function of counters, not of a generator's state.

A draw depends on the words it is asked for (seed, worker, step, ...) and on nothing drawn before.
So the simulator, a worker on its own and a resumed run all draw the same, and ten thousand workers
draw at once. All arithmetic is int64 modulo 2^64: the values are the same on every device.
Not for cryptography.
"""

import torch
from torch import Tensor

LARGEST_SIZE = 2**31  # of a range to draw from: 32 random bits times the size must fit in int64

_WEYL = 0x9E3779B97F4A7C15  # odd, 2^64 / golden ratio: spreads successive counters
_ROUNDS = 12  # where pairs of positions pass chi-square over 10^6 keys at every size tried


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


def permute(position: Tensor, size: Tensor, key: Tensor) -> Tensor:
    """Where a pseudo-random permutation of range(size) sends `position`; one permutation per `key`.

    All three are broadcastable int64 tensors, 0 <= position < size <= 2^31 and `key` 64 random
    bits. Nothing of length `size` is built: a Feistel network permutes the range of the next power
    of two, and a value that falls outside range(size) goes through again until it lands inside
    (cycle walking; Black and Rogaway 2002), twice on average at the worst size. Cheapest where
    `size` and `key` have fewer elements than `position`.
    """
    # 3 bits split 1 + 2 mix slowly, so sizes 5 to 8 walk on 4 bits.
    bits = torch.frexp((size - 1).to(torch.float64)).exponent.to(torch.int64)  # exact bit length
    bits = bits + (bits == 3)
    slope = hash64(key, 0)
    shape = torch.broadcast_shapes(position.shape, size.shape, key.shape)
    image = _feistel(position.expand(shape), bits, key, slope)
    size = size.expand(shape)

    outside = (image >= size).flatten().nonzero().squeeze(1)
    if len(outside):
        image = image.flatten()
        columns = [c.expand(shape).flatten() for c in (bits, key, slope, size)]
        walking = [c.gather(0, outside) for c in (image, *columns)]
        while len(outside):
            landed = _feistel(*walking[:4])
            image.scatter_(0, outside, landed)
            still = (landed >= walking[4]).nonzero().squeeze(1)
            outside = outside.gather(0, still)
            walking = [c.gather(0, still) for c in (landed, *walking[1:])]
        image = image.view(shape)

    # From 4 bits on every round is an even permutation: swap 0 and 1 for half of the keys.
    swap = (slope >> 40) & (size > 1)
    return image ^ ((image < 2) & swap)


def _feistel(x: Tensor, bits: Tensor, key: Tensor, slope: Tensor) -> Tensor:
    """Permute range(2^bits): each half in turn is xored with a keyed function of the other."""
    low_bits = bits >> 1
    low_mask = (1 << low_bits) - 1
    high_mask = (1 << (bits - low_bits)) - 1
    low, high = x & low_mask, x >> low_bits
    for _ in range(_ROUNDS // 2):
        high ^= _round(low, key).bitwise_and_(high_mask)
        key = key + slope
        low ^= _round(high, key).bitwise_and_(low_mask)
        key = key + slope
    return (high << low_bits).bitwise_or_(low)


def _round(half: Tensor, key: Tensor) -> Tensor:
    """Middle bits of (key half + key') squared: linear alone leaves small sizes far from random."""
    mixed = half * key
    mixed += key >> 32
    mixed *= mixed
    mixed >>= 20
    return mixed


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
