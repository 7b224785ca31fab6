"""Where a run happened: versions and machine, without the names of users, hosts or folders."""
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy", "scikit-learn", "datasets")


def environment() -> dict[str, Any]:
    """Versions of Python and packages, CPU, instruction set, cores, threads and platform.

    Example:
        >>> sorted(environment())[:4]
        ['cores', 'cpu', 'gpu', 'instruction_set']
    """
    return {
        "slimtune": version("slimtune"),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def version(package: str) -> str | None:
    """The version of an installed package, or None; of slimtune run from its sources, "source"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source" if package == "slimtune" else None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
                platform.processor())
