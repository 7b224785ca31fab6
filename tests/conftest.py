"""Every test leaves the process as it found it: the registry of methods, our logger, the hub offline."""
import logging
import os

import pytest

from slimtune.core import method

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _as_it_was():
    log, known = logging.getLogger("slimtune"), dict(method._REGISTRY)
    before = log.level, log.propagate, log.disabled, list(log.handlers)
    yield
    log.level, log.propagate, log.disabled = before[:3]
    log.handlers[:] = before[3]
    log.manager._clear_cache()  # a logger remembers which levels it lets through
    method._REGISTRY.clear()
    method._REGISTRY.update(known)
