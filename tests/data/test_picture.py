"""Decoding: every mode as RGB, upright; every way to be damaged named."""
import zipfile

import numpy as np
import pytest
from image_toys import pixels, save
from PIL import Image

from slimtune.data.picture import CorruptImageError, Picture, decode, exists, picture_at
from slimtune.errors import DataError, ExtraError


def test_the_same_pixels_from_a_file_an_archive_bytes_and_an_array(tmp_path):
    path = save(tmp_path / "a.png", 0)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        out.write(path, "in/a.png")
    ways = [picture_at(tmp_path, "a.png"), picture_at(tmp_path, "a.zip@in/a.png"),
            Picture("bytes", data=path.read_bytes()), Picture("array", data=pixels(0))]
    for way in ways:
        assert exists(way)
        assert np.array_equal(np.asarray(decode(way)), pixels(0))
    assert not exists(picture_at(tmp_path, "a.zip@in/b.png"))
    assert not exists(picture_at(tmp_path, "b.png"))


def test_an_archive_that_is_replaced_is_read_anew(tmp_path):
    for seed in (0, 1):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
            out.writestr("x.png", save(tmp_path / "x.png", seed).read_bytes() + b" " * seed)
        assert np.array_equal(np.asarray(decode(picture_at(tmp_path, "a.zip@x.png"))), pixels(seed))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "RGB"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = Image.fromarray(pixels(3)).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    assert np.array_equal(np.asarray(decode(Picture("a", path))), np.asarray(image.convert("RGB")))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 255, 256], [40_000, 65_279, 65_535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    assert np.array_equal(np.asarray(decode(Picture("a", tmp_path / "a.png"))), expected)


@pytest.mark.parametrize(("turn", "way"), [(1, None), (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270),
                                           (8, Image.Transpose.ROTATE_90)])
def test_photos_are_turned_upright(tmp_path, turn, way):
    image = Image.fromarray(pixels(4))
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / "a.png", exif=exif)
    expected = image if way is None else image.transpose(way)
    assert np.array_equal(np.asarray(decode(Picture("a", tmp_path / "a.png"))), np.asarray(expected))


def damaged(tmp_path, kind: str) -> Picture:
    path = tmp_path / f"a.{'jpg' if 'jpg' in kind else 'png'}"
    save(path, 5, height=64, width=64)
    whole = path.read_bytes()
    if kind == "bytes in the middle":
        path.write_bytes(whole[:60] + bytes(200) + whole[260:])
    elif kind == "32 bits":
        path = tmp_path / "a.tif"
        Image.fromarray(pixels(5).mean(2).astype(np.float32)).save(path)
    else:
        path.write_bytes({"empty": b"", "text": b"not an image at all", "half a jpg": whole[:len(whole) // 2],
                          "half": whole[:len(whole) // 2], "header": whole[:20]}[kind])
    return Picture("my/" + path.name, path)


@pytest.mark.parametrize(("kind", "said"), [
    ("empty", "the file is empty"), ("text", "is no image that Pillow knows"), ("half a jpg", "is damaged"),
    ("half", "is damaged"), ("header", "is "), ("bytes in the middle", "is damaged"), ("32 bits", "32 bits a pixel")])
def test_what_cannot_be_decoded_is_named(tmp_path, kind, said):
    picture = damaged(tmp_path, kind)
    with pytest.raises(CorruptImageError) as caught:
        decode(picture)
    assert caught.value.picture == picture.name
    assert said in str(caught.value)
    assert isinstance(caught.value, DataError)


def test_an_image_of_absurd_size(monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(CorruptImageError, match="more pixels than any image"):
        decode(Picture("bomb", save(tmp_path / "a.png", 0, height=20, width=20)))


@pytest.mark.parametrize("array", [np.zeros((4, 4)), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8)])
def test_arrays_that_are_no_image(array):
    with pytest.raises(CorruptImageError, match="is no image of bytes"):
        decode(Picture("x", data=array))


def test_a_bad_archive(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 no")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as out:
        out.writestr("é.png", b"x")
    whole = (tmp_path / "b.zip").read_bytes()
    (tmp_path / "b.zip").write_bytes(whole.replace("é".encode(), b"\xff\xff"))  # marked as UTF-8, and is not
    for name in ("a", "b"):
        with pytest.raises(DataError, match="not readable as a zip archive"):
            exists(picture_at(tmp_path, f"{name}.zip@x.png"))


def test_an_archive_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.zip").write_bytes(b"x")

    def denied(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(zipfile, "ZipFile", denied)
    with pytest.raises(DataError, match=r"a.zip: cannot be read: Permission denied.$"):
        exists(picture_at(tmp_path, "a.zip@x.png"))


def test_without_pillow(monkeypatch):
    import builtins

    from slimtune.data import picture

    real = builtins.__import__

    def lacking(name, *args, **kwargs):
        if name == "PIL":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    picture._pillow.cache_clear()
    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(ExtraError, match=r"slimtune\[vision\]"):
        decode(Picture("x", data=b"x"))
    monkeypatch.undo()
    picture._pillow.cache_clear()
