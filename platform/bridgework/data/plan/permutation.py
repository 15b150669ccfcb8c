"""Orders that are functions: the x-th of n things in a random order, with nothing stored and for any n.

`permute` is a Feistel network on a grid of about sqrt(n) x sqrt(n), with cycle walking where the grid is larger than n
(Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). Keys, sizes and places are arrays, so that one call
serves rows of many sources, epochs and pieces. All of it is integer arithmetic: the same on every machine and under
every version of numpy, which numpy's own generators do not promise.
"""

import hashlib
import json
import math

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

# The finalizer of SplitMix64 (Steele et al. 2014) in the constants of Stafford's "Mix13", and its odd increment.
_MULTIPLY = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFT = (np.uint64(30), np.uint64(27), np.uint64(31))
_STEP = np.uint64(0x9E3779B97F4A7C15)
_ONE = np.uint64(1)
_ROUNDS = 6  # four make a good cipher of a large domain; pieces are small ones
_NOISE = tuple(np.array([0x9E3779B97F4A7C15 * r % 2**64], dtype=np.uint64) for r in range(_ROUNDS))


def key_of(*words: str | int) -> int:
    """64 bits that name these words: equal on every machine."""
    return int.from_bytes(hashlib.blake2b(json.dumps(words).encode(), digest_size=8).digest())


def derive(key: U64, number: U64) -> U64:
    """The key of thing `number` under `key`, element by element; both of at least one dimension."""
    return _mix(key + number * _STEP)


def shuffle(size: int, key: U64) -> npt.NDArray[np.int64]:
    """0 .. size-1 in an order drawn by `key` (shape (1,)), for sizes that fit in memory."""
    return np.argsort(derive(key, np.arange(size, dtype=np.uint64)), kind="stable")


def side_of(size: int) -> int:
    """The first side of the grid for `permute`: near the square root, and with few cells to spare (often none)."""
    top = math.isqrt(size - 1) + 1
    sides = range(max(top // 2 + 1, top - 1023), top + 1)
    return min(sides, key=lambda side: (-(-size // side) * side, -side))


def permute(place: U64, size: U64, side: U64, key: U64) -> U64:
    """Where `place` (< size) goes in the order of `size` things that `key` draws: a bijection of [0, size).

    All four have one shape of one dimension; `side` is `side_of(size)`.
    """
    other = (size + side - _ONE) // side
    goes = _network(place, side, other, key)
    while (walk := np.flatnonzero(goes >= size)).size:
        goes[walk] = _network(goes[walk], side[walk], other[walk], key[walk])
    return goes


def _network(place: U64, side: U64, other: U64, key: U64) -> U64:
    left, right = np.divmod(place, other)
    for even, odd in zip(_NOISE[::2], _NOISE[1::2], strict=True):
        # one bit less than 64, so that the sum cannot wrap: a wrapped sum would send two places to one
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
