"""Picture: where one image is; decode: its pixels. Pillow reads; nothing of an archive is unpacked to disk."""
import os
import zipfile
from dataclasses import dataclass, field
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.errors import DataError, ExtraError, listing

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
"""What counts as an image in a folder or archive."""


class CorruptImageError(DataError):
    """An image that cannot be decoded. picture: its name; why: in a few words."""

    def __init__(self, picture: str, why: str) -> None:
        self.picture, self.why = picture, why
        super().__init__(f"{picture}: {why}.")


@dataclass(frozen=True)
class Picture:
    """An image not yet read: a file, a member of a .zip, the bytes of a file, or an array of bytes.

    Shapes:
        data, as an array: uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).

    Example:
        >>> Picture("cat.png", path=Path("cat.png"))
        Picture(name='cat.png', path=PosixPath('cat.png'), member=None)
    """

    name: str
    path: Path | None = None
    member: str | None = None
    data: Any = field(default=None, repr=False, compare=False)


def picture_at(root: Path, name: str) -> Picture:
    """A file below a folder; `archive.zip@inside.jpg` is a member of an archive there."""
    before, at, member = name.partition("@")
    if at and before.lower().endswith(".zip"):
        return Picture(name, root / before, member)
    return Picture(name, root / name)


def exists(picture: Picture) -> bool:
    """Whether the file or the member is there; its contents are not looked at. Errors: DataError for a bad archive."""
    if picture.path is None:
        return True
    if picture.member is None:
        return picture.path.is_file()
    return picture.path.is_file() and picture.member in archive(picture.path).NameToInfo


def archive(path: Path) -> zipfile.ZipFile:
    """An archive, opened once in each process. Errors: DataError."""
    try:
        stamp = path.stat()
        return _archive(str(path), stamp.st_mtime_ns, stamp.st_size, os.getpid())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from None
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:  # damaged
        raise DataError(f"{path}: not readable as a zip archive: {error}.", "Is it whole? Fetch it again.") from None


@lru_cache(maxsize=16)
def _archive(path: str, changed: int, size: int, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def decode(picture: Picture) -> "Image":
    """The image in RGB, turned as its EXIF says; transparency is dropped, the first frame of several is taken.

    Errors: CorruptImageError for what is no image, is cut off, is absurdly large, or has 32 bits a pixel.
    """
    if not isinstance(picture.data, bytes | None):
        return _of_array(picture)
    pillow, ops = _pillow()
    try:
        raw = _bytes(picture)
        if not raw:
            raise CorruptImageError(picture.name, "the file is empty")
        with pillow.open(BytesIO(raw)) as image:
            image.load()
            return _rgb(picture, _upright(image, ops))
    except DataError:
        raise
    except pillow.UnidentifiedImageError:
        raise CorruptImageError(picture.name, "is no image that Pillow knows") from None
    except pillow.DecompressionBombError:
        raise CorruptImageError(picture.name, "has more pixels than any image for learning") from None
    except Exception as error:  # decoders raise nearly every kind for a damaged file
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CorruptImageError(picture.name, f"is damaged: {said[:120]}") from None


def _bytes(picture: Picture) -> bytes:
    if picture.data is not None:
        return picture.data
    assert picture.path is not None
    if picture.member is None:
        return picture.path.read_bytes()
    return archive(picture.path).read(picture.member)


def _upright(image: "Image", ops: Any) -> "Image":
    try:
        return ops.exif_transpose(image)
    except Exception:  # EXIF that cannot be read turns nothing
        return image


def _rgb(picture: Picture, image: "Image") -> "Image":
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        import numpy as np

        return _pillow()[0].fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise CorruptImageError(picture.name, "has 32 bits a pixel, of unknown range; save it with 8 or 16")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _of_array(picture: Picture) -> "Image":
    array = picture.data
    kind = getattr(array, "dtype", None)
    flat = getattr(array, "ndim", 0) == 3 and array.shape[2] == 1
    if str(kind) != "uint8" or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise CorruptImageError(picture.name, f"is no image of bytes: {kind}, shape {getattr(array, 'shape', None)}")
    return _pillow()[0].fromarray(array[:, :, 0] if flat else array).convert("RGB")


@cache
def _pillow() -> tuple[Any, Any]:
    """Pillow's two modules, every decoder registered. Errors: ExtraError."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ExtraError("pillow", "vision", "Reading images") from None
    Image.init()
    return Image, ImageOps


def refuse(bad: list[CorruptImageError], of: int, where: str) -> DataError:
    """The error that names images that cannot be decoded."""
    more = f" ... ({len(bad)} in all)" if len(bad) > 5 else ""
    return DataError(f"{where}: {len(bad)} of {of:,} images cannot be decoded.",
                     *(f"{error.picture}: {error.why}" for error in bad[:5]), more.strip(),
                     "Replace or remove them, or leave them out: data.corrupt=skip")


def names_of(folder: Path) -> str:
    """What a folder holds, for an error."""
    return listing(sorted(p.name for p in folder.iterdir()), 12) or "nothing"
