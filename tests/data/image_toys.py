"""Tiny images for the data tests."""
from pathlib import Path

import numpy as np
from PIL import Image

from slimtune.data import DataSpec


def pixels(seed: int, height: int = 12, width: int = 10) -> np.ndarray:
    """A smooth random picture: an upscaled grid, so that JPEG keeps it well."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, seed: int, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, **options)).save(path)
    return path


def class_folders(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 3) -> Path:
    """root/class/i.png, of different seeds."""
    for c, name in enumerate(classes):
        for i in range(each):
            save(root / name / f"{i}.png", 100 * c + i)
    return root


def spec(**values) -> DataSpec:
    """Images without a validation split, unless told."""
    return DataSpec(task="image_classification", **{"validation_fraction": 0, "size": 8, **values})
