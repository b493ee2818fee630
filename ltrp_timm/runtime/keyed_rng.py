"""Random numbers that belong to a sample, not to a process.

Everything that training draws depends on (seed, epoch, index) only: a crop, the visible patches,
the items of a list. The worker or process that draws it, and the order, do not matter: a run that
was killed resumes exactly, and two processes compute what one would.
"""

import contextlib
import hashlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch

HELD_OUT = -1  # the "epoch" of held-out images: their random numbers never change


def sample_seed(seed: int, epoch: int, index: int, purpose: str) -> int:
    """Derive a 63-bit seed for one purpose of one sample; the same on every machine.

    >>> sample_seed(0, 0, 0, "transform") == sample_seed(0, 0, 0, "patches")
    False
    """
    text = f"{seed}/{epoch}/{index}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generators(
    seed: int, epoch: int, indices: Sequence[int], purpose: str
) -> list[torch.Generator]:
    """Make a generator for each sample."""
    return [
        torch.Generator().manual_seed(sample_seed(seed, epoch, index, purpose)) for index in indices
    ]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's global generators for a while, then restore them."""
    with restored():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.random.default_generator.manual_seed(seed)  # that of the CPU only
        yield


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Restore Python's, numpy's and torch's global generators afterwards."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
