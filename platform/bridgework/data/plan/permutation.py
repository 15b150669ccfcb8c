"""Keyed permutations of 0 .. n-1, computed per element without a table, for any n.

`permute` is a Feistel network on a grid of about sqrt(n) x sqrt(n), with cycle walking if the grid
is larger than n (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). Keys, sizes and
places are arrays, so one call handles rows of many sources, epochs and pieces. Integer arithmetic
gives the same order on every machine and with every version of numpy, which numpy's own generators
do not guarantee.
"""

import hashlib
import json
import math

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

# The finalizer of SplitMix64 (Steele et al. 2014) in the constants of Stafford's "Mix13", and its
# odd increment.
_MULTIPLY = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFT = (np.uint64(30), np.uint64(27), np.uint64(31))
_STEP = np.uint64(0x9E3779B97F4A7C15)
_ONE = np.uint64(1)
_ROUNDS = 6  # four are enough for a large domain; pieces are small domains
_NOISE = tuple(np.array([0x9E3779B97F4A7C15 * r % 2**64], dtype=np.uint64) for r in range(_ROUNDS))


def key_of(*names: str | int) -> int:
    """Return a 64-bit hash of `names`, equal on every machine."""
    return int.from_bytes(hashlib.blake2b(json.dumps(names).encode(), digest_size=8).digest())


def derive(key: U64, number: U64) -> U64:
    """Derive a key from `key` and `number`, elementwise; both have at least one dimension."""
    return _mix(key + number * _STEP)


def shuffle(size: int, key: U64) -> npt.NDArray[np.int64]:
    """Return 0 .. size-1 in an order given by `key` (shape (1,)), if that fits in memory."""
    return np.argsort(derive(key, np.arange(size, dtype=np.uint64)), kind="stable")


def side_of(size: int) -> int:
    """Return the first side of the grid of `permute`: near sqrt(size), with few surplus cells."""
    top = math.isqrt(size - 1) + 1
    sides = range(max(top // 2 + 1, top - 1023), top + 1)
    return min(sides, key=lambda side: (-(-size // side) * side, -side))


def permute(place: U64, size: U64, side: U64, key: U64) -> U64:
    """Map `place` (< size) to its place in the order given by `key`: a bijection of [0, size).

    All arguments have the same one-dimensional shape; `side` is `side_of(size)`.
    """
    other = (size + side - _ONE) // side
    target = _network(place, side, other, key)
    while (walk := np.flatnonzero(target >= size)).size:
        target[walk] = _network(target[walk], side[walk], other[walk], key[walk])
    return target


def _network(place: U64, side: U64, other: U64, key: U64) -> U64:
    """Return the output of the Feistel network, a bijection of [0, side * other)."""
    left, right = np.divmod(place, other)
    for even, odd in zip(_NOISE[::2], _NOISE[1::2], strict=True):
        # one bit less than 64, because a sum that wraps would map two places to one
        left = (left + (_mix((right ^ key) + even) >> _ONE)) % side
        right = (right + (_mix((left ^ key) + odd) >> _ONE)) % other
    return left * other + right


def _mix(x: U64) -> U64:
    x = x ^ (x >> _SHIFT[0])
    x *= _MULTIPLY[0]
    x ^= x >> _SHIFT[1]
    x *= _MULTIPLY[1]
    x ^= x >> _SHIFT[2]
    return x
