"""Tables of images: class folders, zips of them, .npz, IDX, lists of 'path label', and tables with an image column."""
import gzip
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimtune.data.picture import SUFFIXES, Picture, archive, exists, names_of, picture_at
from slimtune.data.spec import DataSpec
from slimtune.data.tables import Table, read_table, read_text
from slimtune.errors import DataError, listing

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


def read_images(given: str, spec: DataSpec, split: str = "train", labelled: bool = True) -> Table:
    """A table of pictures (column spec.image) and labels (column spec.label) from what a path leads to.

    Errors: DataError naming the file, and the line or member where there is one.
    """
    path = Path(given).expanduser()
    path = Path(spec.path).expanduser() / path if spec.path else path
    if path.is_dir():
        return _folder(path, spec, labelled)
    if not path.is_file():
        raise _missing(path)
    name, suffix = path.name.lower(), path.suffix.lower()
    if suffix == ".zip":
        return _zip(path, spec, labelled)
    if suffix == ".npz":
        return _npz(path, spec, split, labelled)
    if "-ubyte" in name:
        return _idx(path, spec, labelled)
    if suffix == ".txt":
        return read_list(path, spec, labelled=labelled)
    if suffix in TABLES:
        return pictures(read_table(str(path), spec), spec, path.parent)
    if suffix in SUFFIXES and not labelled:
        return make_table(str(path), [Picture(str(path), path)], None, spec)
    raise DataError(f"{path}: no images are read from files of kind '{path.suffix}'.",
                    f"They are read from: a folder .zip .npz IDX (-ubyte, .gz) .txt (path label) {listing(TABLES)}")


def make_table(name: str, found: Sequence[Any], labels: Sequence[Any] | None, spec: DataSpec,
               numbers: Sequence[int] | None = None, unit: str = "image") -> Table:
    """Pictures and labels as a table. Errors: DataError when there are none, or not one label an image."""
    if not len(found):
        raise DataError(f"{name}: there are no images.", f"Files that count as images: {listing(SUFFIXES)}")
    if labels is not None and len(labels) != len(found):
        raise DataError(f"{name}: {len(found):,} images, but {len(labels):,} labels.")
    columns = {spec.image: list(found)} | ({} if labels is None else {spec.label: list(labels)})
    return Table(name, columns, list(numbers or range(1, len(found) + 1)), unit)


def pictures(table: Table, spec: DataSpec, root: Path) -> Table:
    """A table whose image column holds paths, bytes, or {bytes, path}, with pictures in their place.

    Paths are taken from spec.path, else from `root`. Errors: DataError naming the row.
    """
    if spec.image not in table.columns:
        raise DataError(f"{table.name}: no column '{spec.image}' (data.image).",
                        f"It has: {listing(table.columns)}", "Set data.image to the one with the images.")
    roots = _roots(spec, root)
    made = [_picture(value, roots, table.place(row)) for row, value in enumerate(table.columns[spec.image])]
    return Table(table.name, {**table.columns, spec.image: made}, table.numbers, table.unit)


def _roots(spec: DataSpec, own: Path) -> tuple[Path, ...]:
    """Where relative names are looked for, in this order."""
    return (Path(spec.path).expanduser(), own) if spec.path else (own,)


def _picture(value: Any, roots: tuple[Path, ...], place: str) -> Picture:
    if isinstance(value, Picture):
        return value
    if isinstance(value, dict):
        raw, path = value.get("bytes"), value.get("path")
        value = raw if isinstance(raw, bytes) else path
    if isinstance(value, bytes):
        return Picture(place, data=value)
    if isinstance(value, str) and value.strip():
        return _found(value.strip(), roots, place)
    raise DataError(f"{place}: holds no image: {str(value)[:60]!r}.", "An image is a path, or the bytes of a file.")


def _at(name: str, roots: tuple[Path, ...]) -> Picture | None:
    return next((picture for root in roots if exists(picture := picture_at(root, name))), None)


def _found(name: str, roots: tuple[Path, ...], place: str) -> Picture:
    picture = _at(name, roots)
    if picture is None:
        raise DataError(f"{place}: no such image: {name}.",
                        f"It was looked for at: {', '.join(dict.fromkeys(str(root / name) for root in roots))}",
                        "Give a whole path, or one from data.path or from the folder of the list.")
    return picture


def _missing(path: Path) -> DataError:
    folder = path.parent
    if not folder.is_dir():
        return DataError(f"{path}: no such file; the folder {folder} does not exist either.",
                         "Set data.path to the folder of the images, or give whole paths.")
    return DataError(f"{path}: no such file or folder.", f"The folder has: {names_of(folder)}")


def _is_image(name: str) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in Path(name).parts)
    return not hidden and name.lower().endswith(SUFFIXES)


def _folder(path: Path, spec: DataSpec, labelled: bool) -> Table:
    """root/class/any/depth/image.jpg, in the order of their names."""
    files = sorted(Path(home, name).relative_to(path).as_posix() for home, _, names in os.walk(path, followlinks=True)
                   for name in names)
    files = [name for name in files if _is_image(name)]
    if not labelled:
        return make_table(str(path), [Picture(name, path / name) for name in files], None, spec)
    loose = [name for name in files if "/" not in name]
    if loose:
        raise DataError(f"{path}: {len(loose)} images are in no class folder, such as {loose[0]}.",
                        "Each class is a folder of its own: class/image.jpg", f"It has: {names_of(path)}")
    classes = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    seen = {name.partition("/")[0] for name in files}
    empty = [name for name in classes if name not in seen]
    if empty:
        raise DataError(f"{path}: {len(empty)} class folders hold no image: {listing(empty, 8)}",
                        f"Files that count as images: {listing(SUFFIXES)}")
    return make_table(str(path), [Picture(f"{path.name}/{name}", path / name) for name in files],
                      [name.partition("/")[0] for name in files], spec)


def _zip(path: Path, spec: DataSpec, labelled: bool) -> Table:
    """As a folder; a single folder around all classes is looked through."""
    members = [info for info in archive(path).infolist() if not info.is_dir() and _is_image(info.filename)]
    locked = [info.filename for info in members if info.flag_bits & 1]
    if locked:
        raise DataError(f"{path}: {len(locked)} members need a password, such as {locked[0]}.", "Unpack it yourself.")
    names = sorted(info.filename for info in members)
    found = [Picture(f"{path.name}@{name}", path, name) for name in names]
    if not labelled or not names:
        return make_table(str(path), found, None, spec)
    parts = [name.split("/") for name in names]
    while len({part[0] for part in parts}) == 1 and min(map(len, parts)) > 2:
        parts = [part[1:] for part in parts]
    loose = [name for name, part in zip(names, parts, strict=True) if len(part) < 2]
    if loose:
        raise DataError(f"{path}: {len(loose)} images are in no class folder, such as {loose[0]}.",
                        "Each class is a folder of its own: class/image.jpg")
    return make_table(str(path), found, [part[0] for part in parts], spec)


def read_list(path: Path, spec: DataSpec, root: Path | None = None, labelled: bool = True) -> Table:
    """Lines of 'path label': the label is what stands behind the last space; a path may hold spaces.

    Paths are taken from `root` alone, or from spec.path, else the list's own folder. Errors: DataError naming the line.
    """
    roots = (root,) if root else _roots(spec, path.parent)
    found, labels, numbers = [], [], []
    for number, line in enumerate(read_text(path, spec.encoding).splitlines(), 1):
        if not line.strip():
            continue
        name, label = split_line(line, f"{path}, line {number}") if labelled else (line.strip(), "")
        if not labelled and len(line.split()) > 1 and _at(name, roots) is None:
            name, _ = split_line(line, f"{path}, line {number}")  # the list of a labelled split
        found.append(_found(name, roots, f"{path}, line {number}"))
        labels.append(label)
        numbers.append(number)
    return make_table(str(path), found, labels if labelled else None, spec, numbers, "line")


def split_line(line: str, place: str) -> tuple[str, str]:
    """The path and the label of a line. Errors: DataError for a line with one word.

    Example:
        >>> split_line("images/my cat.jpg 3", "train.txt, line 1")
        ('images/my cat.jpg', '3')
    """
    parts = line.rsplit(None, 1)
    if len(parts) < 2:
        raise DataError(f"{place}: one word, {line.strip()[:60]!r}; a path and a label are expected.",
                        "For example: images/0001.jpg 3")
    return parts[0].strip(), parts[1]


def _npz(path: Path, spec: DataSpec, split: str, labelled: bool) -> Table:
    """Arrays data.image and data.label, or those of the usual names: train_images, x_train, images, x ..."""
    import numpy as np

    short = {"validation": "val"}.get(split, split)
    pairs = [(spec.image, spec.label), (f"{short}_images", f"{short}_labels"), (f"x_{short}", f"y_{short}"),
             ("images", "labels"), ("x", "y")]
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = next(((a, b) for a, b in pairs if a in file and (b in file or not labelled)), None)
            if keys is None:
                raise DataError(f"{path}: no arrays of images and labels of {split} under a usual name.",
                                f"It has: {listing(file)}", "Name them: data.image=... data.label=...")
            images, labels = file[keys[0]], file[keys[1]] if labelled else None
    except DataError:
        raise
    except Exception as error:  # numpy and zipfile raise nearly every kind for a damaged file
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: not readable as .npz: {said[:200]}") from None
    return _arrays(path, images, labels, spec)


def _idx(path: Path, spec: DataSpec, labelled: bool) -> Table:
    """The files of MNIST and its kin; the labels are in the file of the same name with labels-idx1."""
    if not labelled:
        return _arrays(path, read_idx(path), None, spec)
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if beside == path or not beside.is_file():
        raise DataError(f"{path}: its file of labels is not beside it: {beside.name}.",
                        f"The folder has: {names_of(path.parent)}")
    return _arrays(path, read_idx(path), read_idx(beside), spec)


def read_idx(path: Path) -> Any:
    """An IDX file of bytes, gzipped or not, as an array. Errors: DataError when its header and size differ."""
    import numpy as np

    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not readable as gzip: {error}.", "Is it whole? Fetch it again.") from None
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"{path}: not an IDX file of bytes.", "It begins with 0, 0, 8 and the number of its axes.")
    start = 4 + 4 * raw[3]
    shape = struct.unpack(f">{raw[3]}I", raw[4:start])
    if np.prod(shape, dtype=object) != len(raw) - start:
        said = " x ".join(map(str, shape))
        raise DataError(f"{path}: its header says {said}, but {len(raw) - start:,} bytes follow.",
                        "Is it whole? Fetch it again.")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _arrays(path: Path, images: Any, labels: Any, spec: DataSpec) -> Table:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) of bytes, and labels (N,) or (N, 1)."""
    if str(images.dtype) != "uint8" or images.ndim not in (3, 4):
        raise DataError(f"{path}: images are {images.dtype} of shape {tuple(images.shape)}; bytes (uint8) of shape "
                        "(N, H, W) or (N, H, W, 3) are expected.", "Scale them to 0 to 255 and save them as uint8.")
    if images.ndim == 4 and images.shape[-1] not in (1, 3, 4) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    found = [Picture(f"{path.name}, image {i + 1}", data=images[i]) for i in range(len(images))]
    if labels is None:
        return make_table(str(path), found, None, spec)
    flat = labels.reshape(len(labels), -1) if labels.ndim and len(labels) else labels
    if flat.ndim != 2 or flat.shape[1] != 1:
        raise DataError(f"{path}: labels of shape {tuple(labels.shape)}; one an image is expected.")
    return make_table(str(path), found, flat[:, 0].tolist(), spec)
