"""Which examples a step draws, and its noise: functions of one secret and the step's number, and of nothing else.

So a resumed run draws exactly what the stopped one drew or would have drawn: a step that was taken, lost with the
process, and taken again releases the same noisy gradient, and is spent once.
"""
import hashlib
import os

import torch
from torch import Tensor

from slimtune.privacy.extra import opacus

SECRET = 32
"""Bytes: 256 bits."""
_WORDS, _FROM = 624, 24
"""The Mersenne twister's words in the state of torch's generator on a CPU, 8 bytes each, behind so many others."""


def new_secret(seed: int | None) -> Tensor:
    """Bytes (32): the operating system's, or those of a seed."""
    drawn = os.urandom(SECRET) if seed is None else hashlib.sha256(f"slimtune/privacy/{seed}".encode()).digest()
    return torch.frombuffer(bytearray(drawn), dtype=torch.uint8)


def rekey(generator: torch.Generator, secret: Tensor, purpose: str) -> None:
    """Set a generator's state by the secret and a purpose.

    `manual_seed` keeps 32 bits of a seed on a CPU, few enough to try them all; so the whole state is filled.
    """
    hashed = hashlib.shake_256(bytes(secret.tolist()) + purpose.encode())
    if generator.device.type != "cpu":
        generator.manual_seed(int.from_bytes(hashed.digest(8), "little") >> 1)
        return
    generator.manual_seed(0)
    state = generator.get_state()
    words = torch.frombuffer(bytearray(hashed.digest(4 * _WORDS)), dtype=torch.int32).long() & 0xFFFFFFFF
    state[_FROM:_FROM + 8 * _WORDS] = words.view(torch.uint8)
    generator.set_state(state)


def poisson(secret: Tensor, step: int, examples: int, rate: float) -> list[int]:
    """The examples of a step: each is drawn by itself, with probability `rate`; there may be none.

    Example:
        >>> secret = new_secret(0)
        >>> poisson(secret, 1, 100, 0.1) == poisson(secret, 1, 100, 0.1) != poisson(secret, 2, 100, 0.1)
        True
    """
    sampler = opacus("utils.uniform_sampler").UniformWithReplacementSampler
    generator = torch.Generator()
    rekey(generator, secret, f"examples of step {step}")
    return next(iter(sampler(num_samples=examples, sample_rate=rate, generator=generator, steps=1)))
