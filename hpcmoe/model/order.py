"""The order of packed sequences in an epoch: a permutation that is computed number by number, in no memory.

A Feistel network over the least power of 4 that holds the numbers, followed until it leads back to them: Black and
Rogaway 2002, "Ciphers with arbitrary finite domains", method 2; the round's hash is the end of SplitMix64.
"""

import numpy as np

_ROUNDS = 6
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def number_sequences(step: int, num_sequences: int, num_packed: int, seed: int) -> np.ndarray:
    """Draw the packed sequences of a step (from 1), each once an epoch -> int64 [num_sequences] below num_packed.

    An epoch follows the other within a step too. The result depends on nothing else, so that a run can begin anywhere.
    """
    positions = np.arange((step - 1) * num_sequences, step * num_sequences, dtype=np.int64)
    numbers = np.empty_like(positions)
    for epoch in np.unique(positions // num_packed).tolist():
        within = positions // num_packed == epoch
        numbers[within] = permute(positions[within] % num_packed, num_packed, (seed, epoch))
    return numbers


def permute(numbers: np.ndarray, size: int, seed: tuple[int, ...]) -> np.ndarray:
    """Map numbers int64 [n] below size to others below size, one to one, in the permutation of that seed."""
    half_bits = max((size - 1).bit_length() + 1, 2) // 2
    keys = np.random.default_rng(seed).integers(0, 2**64, _ROUNDS, dtype=np.uint64)
    result = numbers.astype(np.uint64)
    outside = np.arange(len(numbers))
    while len(outside) > 0:  # at most 3 in 4 stay outside each time
        result[outside] = pass_rounds(result[outside], keys, half_bits)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def pass_rounds(numbers: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    """Pass numbers uint64 [n] of 2 * half_bits bits through the rounds of the network -> as many, one to one."""
    shift, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = numbers >> shift, numbers & mask
    for key in keys:
        left, right = right, left ^ (mix_bits(right + key) & mask)
    return (left << shift) | right


def mix_bits(numbers: np.ndarray) -> np.ndarray:
    """Hash each of some numbers uint64 [n]."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(31))
