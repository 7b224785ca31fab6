"""Transform: from a picture to what a vision model reads, by Pillow and torch alone.

    resize (both sides, or the short one) -> crop -> bytes (3, S, S) -> (scale x - mean) / std

The steps are those of transformers' own processors, bit for bit. Bytes are what is kept of an image; scaling and
normalising happen a batch at a time.
"""
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimtune.data.spec import DataSpec
from slimtune.errors import DataError
from slimtune.io.images import ImageInput

if TYPE_CHECKING:
    from PIL.Image import Image

COLOURS = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "half": ((0.5,) * 3, (0.5,) * 3),
           "none": ((0.0,) * 3, (1.0,) * 3)}
MARGIN = 8 / 7
"""256 / 224: how much larger than the crop an image is resized, in the usual recipe."""


@dataclass(frozen=True)
class Transform:
    """How images are made into batches.

    size: side of the result; edge: both sides, or with `square=False` the short side, before the crop; None keeps the
    image's own. normalize: the name of mean and std, which are in 0 to 1. augment: flip, crop; of training images.
    asked: whether the model must be told that the images are not of the size of its positions.

    Example:
        >>> transform = transform_of(DataSpec(task="image_classification", train="x", size=28), ImageInput(patch=14))
        >>> transform.size, transform.normalize
        (28, 'imagenet')
    """

    size: int
    edge: int | None
    square: bool
    resample: int
    scale: float
    normalize: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: tuple[str, ...] = ()
    asked: bool = False
    training: bool = False

    def for_training(self) -> "Transform":
        """The same, with augmentation."""
        return replace(self, training=bool(self.augment))

    def plain(self) -> "Transform":
        """The same, without augmentation."""
        return replace(self, training=False)

    def shrink(self, image: "Image") -> Tensor:
        """The bytes that are kept of an image: resized and cropped, but for a crop that is drawn each time.

        Shapes:
            result: uint8 (3, S, S), or (3, h, w) with h, w >= S where a crop is to be drawn.
        """
        import numpy as np

        drawn = self.training and "crop" in self.augment
        edge = max(self.edge or 0, round(self.size * MARGIN)) if drawn else self.edge
        if edge is not None:
            width, height = image.size
            short = min(width, height)
            wide = (edge, edge) if self.square else (int(edge * width / short), int(edge * height / short))
            image = image.resize(wide, resample=self.resample)  # type: ignore[arg-type]
        pixels = np.asarray(image)
        if not drawn:
            pixels = centre(pixels, self.size)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)).copy())

    def place(self, pixels: Tensor, rng: random.Random) -> Tensor:
        """One draw of the augmentation. Shapes: (3, h, w) -> (3, S, S)."""
        if "crop" in self.augment:
            top, left = (rng.randint(0, side - self.size) for side in pixels.shape[1:])
            pixels = pixels[:, top:top + self.size, left:left + self.size]
        return pixels.flip(2) if "flip" in self.augment and rng.random() < 0.5 else pixels

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch: pixel_values, and labels where the rows have them.

        Shapes:
            pixel_values: float32 (B, 3, S, S); labels: (B,).
        """
        pixels = torch.stack([row["pixel_values"] for row in rows])
        mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (self.mean, self.std))
        batch: dict[str, Any] = {"pixel_values": ((pixels.double() * self.scale).float() - mean) / std}
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch | ({"interpolate_pos_encoding": True} if self.asked else {})

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the steps, without augmentation, as transformers' preprocessor_config.json."""
        side = {"height": self.edge, "width": self.edge} if self.square else {"shortest_edge": self.edge}
        told = {"image_processor_type": "ViTImageProcessor", "resample": self.resample,
                "do_resize": self.edge is not None, **({"size": side} if self.edge is not None else {}),
                "do_center_crop": True, "crop_size": {"height": self.size, "width": self.size},
                "do_rescale": True, "rescale_factor": self.scale,
                "do_normalize": True, "image_mean": list(self.mean), "image_std": list(self.std)}
        Path(folder, "preprocessor_config.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

    def about(self) -> dict[str, Any]:
        """What result.json keeps of it."""
        names = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
        return {"size": self.size, "resize": "square" if self.square else "short side, then the centre",
                "edge": self.edge, "resample": names.get(self.resample, self.resample), "normalize": self.normalize,
                "mean": list(self.mean), "std": list(self.std), "augment": list(self.augment)}


def transform_of(spec: DataSpec, taken: ImageInput) -> Transform:
    """The transform of a run: the preprocessor's steps, with what the recipe sets in their place.

    Errors: DataError for a size that the model cannot read.
    """
    size = spec.size or taken.size or taken.positions or 224
    square, edge = taken.square, taken.edge
    if spec.resize != "model":
        square, edge = spec.resize == "square", size if spec.resize == "square" else round(size * MARGIN)
    elif spec.size is not None or (edge is None and taken.crop is None):
        edge = round(size * edge / taken.size) if edge and taken.size else size
    if taken.patch and size % taken.patch:
        low = size // taken.patch * taken.patch
        near = " or ".join(str(n) for n in (low, low + taken.patch) if n)
        raise DataError(f"data.size: {size} is no multiple of the model's patches of {taken.patch}.",
                        f"Set data.size={near}.")
    other = taken.positions is not None and size != taken.positions
    if other and not taken.fits:
        raise DataError(f"data.size: {size}, but the model has positions for {taken.positions} alone.",
                        f"Set data.size={taken.positions}.")
    name, (mean, std) = _colours(spec, taken)
    return Transform(size, edge, square, taken.resample, taken.scale if spec.normalize == "model" else 1 / 255, name,
                     mean, std, spec.augment, asked=other and taken.asked)


def _colours(spec: DataSpec, taken: ImageInput) -> tuple[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """The name and numbers of the normalisation; the preprocessor's get their usual name where they have one."""
    if spec.normalize != "model":
        return spec.normalize, COLOURS[spec.normalize]
    own = (taken.mean, taken.std)
    return next((name for name, values in COLOURS.items() if values == own), "model"), own


def centre(pixels: Any, size: int) -> Any:
    """The centre of an image, filled up with 0 where the image is smaller. Shapes: (h, w, 3) -> (S, S, 3)."""
    import numpy as np

    gaps = [max(size - side, 0) for side in pixels.shape[:2]]
    if any(gaps):
        pixels = np.pad(pixels, [((gap + 1) // 2, gap // 2) for gap in gaps] + [(0, 0)])
    top, left = ((side - size) // 2 for side in pixels.shape[:2])
    return pixels[top:top + size, left:left + size]


def drawn_by(seed: int, epoch: int, index: int) -> random.Random:
    """The generator of one image in one epoch: the same in any process, and for a run that is resumed."""
    return random.Random(f"slimtune/augment/{seed}/{epoch}/{index}")
