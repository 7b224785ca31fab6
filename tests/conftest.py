"""Every test leaves the process as it found it: the registry of methods, our logger, the hub offline."""
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is a disk of it: thousands of small files are slow on a busy one."""
    memory = Path("/dev/shm")
    home = memory if os.access(memory, os.W_OK) else tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(dir=home) as folder:
        yield Path(folder)
