"""Random numbers that belong to a sample, whichever process or worker draws them."""

import contextlib
import hashlib
import random
from collections.abc import Iterator

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
