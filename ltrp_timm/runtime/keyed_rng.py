"""Random numbers that belong to a sample, not to a process.

All that is drawn in training is a function of (seed, epoch, index): a crop, the visible patches,
the items of a list. Which worker or which process draws it, and in what order, changes nothing:
hence a run that was killed goes on exactly, and two processes do what one would do.
"""

import contextlib
import hashlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch

HELD_OUT = -1  # the "epoch" of held-out images: what is drawn for them never changes


def sample_seed(seed: int, epoch: int, index: int, purpose: str) -> int:
    """A 63-bit seed for one purpose of one sample; the same on every machine.

    >>> sample_seed(0, 0, 0, "transform") == sample_seed(0, 0, 0, "patches")
    False
    """
    text = f"{seed}/{epoch}/{index}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generators(
    seed: int, epoch: int, indices: Sequence[int], purpose: str
) -> list[torch.Generator]:
    """A generator for each sample."""
    return [
        torch.Generator().manual_seed(sample_seed(seed, epoch, index, purpose)) for index in indices
    ]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's global generators seeded for a while, then as they were."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)  # the CPU's; others are left alone
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
