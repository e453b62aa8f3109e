"""Counter-based draws: the same everywhere, and indistinguishable from random where it matters."""

import itertools
import math

import pytest
import torch
from scipy.stats import chi2, kstest
from torch import Tensor

from decentral import draws
from decentral.draws import LARGEST_SIZE, hash64, normal, shuffled, uniform_index

KEYS = 100_000
TINY = (1, 2, 3, 4, 5, 7, 8, 10, 17)


def p_value(observed: Tensor, expected: float) -> float:
    """Of Pearson's chi-square test against a uniform law."""
    statistic = ((observed.double() - expected) ** 2 / expected).sum().item()
    return float(chi2.sf(statistic, observed.numel() - 1))


def permutations(size: int, keys: int = KEYS) -> Tensor:
    """The permutation of each of many keys, [keys, size]."""
    return shuffled(hash64(2024, size, torch.arange(keys)), size)


def splitmix64(state: int, draws: int) -> list[int]:
    """Steele, Lea and Flood's generator, in Python's integers."""
    out = []
    for _ in range(draws):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        out.append(z ^ (z >> 31))
    return out


def test_hash_along_its_last_word_is_the_splitmix64_stream():
    # The first output for seed 1234567, as published with the reference implementations.
    assert splitmix64(1234567, 1) == [6457827717110365317]
    first = splitmix64(0, 1)[0]  # absorbs the word 0
    expected = torch.tensor([x - 2**64 if x >= 2**63 else x for x in splitmix64(first, 1000)])
    assert torch.equal(hash64(0, torch.arange(1000)), expected)


def test_ints_and_tensors_of_one_element_hash_alike():
    words = (-3, 2**40, 0, 17)
    assert hash64(*words).item() == hash64(*(torch.tensor(word) for word in words)).item()
    assert hash64(2**64 + 5).item() == hash64(5).item()


def test_the_order_of_words_counts():
    a, b = torch.arange(300)[:, None], torch.arange(300)
    assert len(hash64(a, b).unique()) == 300 * 300


def test_each_input_bit_flips_each_output_bit_half_of_the_time():
    words = torch.arange(20_000)
    bits = torch.arange(64)
    for flipped in (0, 1, 31, 62):
        change = hash64(7, words) ^ hash64(7, words ^ (1 << flipped))
        rate = ((change[:, None] >> bits) & 1).double().mean(0)
        # Standard deviation 1/2 / sqrt(20,000) = 0.0035; six of them.
        assert (rate - 0.5).abs().max() < 0.021


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1000])
def test_indices_are_uniform(size: int):
    drawn = uniform_index(hash64(11, torch.arange(KEYS)), size)
    assert drawn.min() >= 0
    assert drawn.max() < size
    assert size == 1 or p_value(torch.bincount(drawn, minlength=size), KEYS / size) > 1e-4


def test_the_largest_size_does_not_overflow():
    drawn = uniform_index(hash64(torch.arange(1000)), LARGEST_SIZE)
    assert drawn.min() >= 0
    assert drawn.max() < LARGEST_SIZE
    assert drawn.double().mean() == pytest.approx(LARGEST_SIZE / 2, rel=0.06)


@pytest.mark.parametrize("size", [*range(1, 40), 64, 65, 1000, 1025, 8000])
def test_every_key_gives_a_permutation(size: int):
    images = permutations(size, keys=50)
    assert torch.equal(images.sort(dim=1).values, torch.arange(size).expand(50, size))


@pytest.mark.parametrize("size", TINY[1:])
def test_each_position_goes_everywhere_equally_often(size: int):
    images = permutations(size)
    for place in range(size):
        count = torch.bincount(images[:, place], minlength=size)
        assert p_value(count, KEYS / size) > 1e-4 / size


@pytest.mark.parametrize("size", TINY[1:])
def test_each_pair_of_positions_goes_everywhere_equally_often(size: int):
    images = permutations(size)
    different = ~torch.eye(size, dtype=torch.bool)
    pairs = list(itertools.islice(itertools.combinations(range(size), 2), 40))
    for one, other in pairs:
        count = torch.bincount(images[:, one] * size + images[:, other], minlength=size**2)
        count = count.view(size, size)[different]
        assert p_value(count, KEYS / len(count)) > 1e-4 / len(pairs)


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_every_permutation_is_equally_likely(size: int):
    images = permutations(size)
    codes = (images * size ** torch.arange(size)).sum(1)
    _, count = codes.unique(return_counts=True)
    assert len(count) == math.factorial(size)
    assert p_value(count, KEYS / len(count)) > 1e-4


def test_successive_keys_and_positions_are_uncorrelated_in_a_large_permutation():
    size = 1500
    images = permutations(size, keys=400).double()
    images = (images - (size - 1) / 2) / math.sqrt((size**2 - 1) / 12)
    # Products of independent standardised values: standard deviation 1 / sqrt(400 * 1500) = 0.0013.
    assert (images[:, 1:] * images[:, :-1]).mean().abs() < 0.0065
    assert (images[1:] * images[:-1]).mean().abs() < 0.0065
    # A fixed point per permutation, on average; standard deviation 1 / sqrt(400).
    fixed = (permutations(size, keys=400) == torch.arange(size)).sum(1).double().mean()
    assert fixed == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("size", [1, 2, 3, 64, 1025])
def test_an_order_is_that_of_the_hashed_positions_whatever_is_sorted_at_a_time(size, monkeypatch):
    key = hash64(3, torch.arange(7))
    monkeypatch.setattr(draws, "SHUFFLE_BLOCK", 2 * size + 1)
    hashed = hash64(key[:, None], torch.arange(size))
    assert torch.equal(shuffled(key, size), hashed.argsort(dim=1))


def test_an_order_does_not_depend_on_the_others_in_the_call():
    key = hash64(torch.arange(20))
    together = shuffled(key, 30)
    alone = [shuffled(key[i : i + 1], 30) for i in range(20)]
    assert torch.equal(together, torch.cat(alone))


def test_normals_are_standard_and_independent():
    z = normal(hash64(torch.arange(200)), 1001, torch.float64)
    assert z.shape == (200, 1001)
    assert kstest(z.flatten(), "norm").pvalue > 0.01
    # Fourth moment 3 with variance 96; the halves of a pair, neighbours, keys: correlation 0.
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / z.numel())
    for one, other in ((z[:, :500], z[:, 501:1001]), (z[:, :-1], z[:, 1:]), (z[:-1], z[1:])):
        assert abs((one * other).mean()) < 4 / math.sqrt(one.numel())
        assert abs((one**2 * other**2).mean() - 1) < 4 * math.sqrt(8 / one.numel())


@pytest.mark.parametrize("size", [1, 6, 7])
def test_normals_of_a_key_are_the_same_alone_among_others_and_in_any_blocks(size, monkeypatch):
    keys = hash64(torch.arange(5))
    together = normal(keys, size, torch.float64)
    monkeypatch.setattr(draws, "NORMAL_BLOCK", 2)
    for key, row in zip(keys, together, strict=True):
        # The last bit of a logarithm may depend on how many are taken at once.
        torch.testing.assert_close(normal(key, size, torch.float64), row, rtol=1e-14, atol=1e-15)
    assert torch.equal(normal(keys, size, torch.float32), together.float())


def test_normals_by_hand():
    """Box-Muller of the two halves of 64 bits: the first of a pair here, the second D/2 on."""
    bits = int(hash64(9, 1)) % 2**64
    u, v = ((bits >> 32) + 0.5) / 2**32, (bits % 2**32 + 0.5) / 2**32
    radius = math.sqrt(-2 * math.log(u))
    z = normal(torch.tensor(9), 4, torch.float64).tolist()
    assert z[1] == pytest.approx(radius * math.cos(2 * math.pi * v), rel=1e-12)
    assert z[3] == pytest.approx(radius * math.sin(2 * math.pi * v), rel=1e-12)
