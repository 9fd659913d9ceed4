"""Temporary changes that are undone on exit, also when the body raises."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import nn

__all__ = ["modes_kept", "seeded"]


@contextmanager
def seeded(seed: int, *parts: int | str) -> Iterator[None]:
    """A context in which Python's, NumPy's and PyTorch's random numbers follow from `seed` and `parts` alone.

    The states before it return on exit. Different parts (an epoch, a layer's name) give independent streams.
    """
    digest = hashlib.sha256(repr((seed, *parts)).encode()).digest()
    python, arrays = random.getstate(), numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            random.seed(digest)
            numpy.random.seed(int.from_bytes(digest[:4], "big"))
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """A context after which every module is in training or evaluation mode as it was before."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
