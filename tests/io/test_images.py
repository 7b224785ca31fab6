"""What a vision model's folder says of its images, with and without a preprocessor file."""
import json

import pytest

from slimtune.errors import SlimtuneError
from slimtune.io.images import ImageInput, load_image_input
from slimtune.testing import tiny


@pytest.fixture
def folder(tmp_path):
    def save(family: str, **preprocessor):
        tiny(family).save_pretrained(tmp_path)
        if preprocessor:
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        return tmp_path

    return save


@pytest.mark.parametrize(("kind", "options", "expected"), [
    ("ViTImageProcessor", {"size": {"height": 16, "width": 16}},
     {"edge": 16, "square": True, "crop": None, "resample": 2, "mean": (0.5,) * 3, "std": (0.5,) * 3}),
    ("ViTFeatureExtractor", {"size": 16}, {"edge": 16, "square": True, "crop": None}),
    ("BitImageProcessor", {"size": {"shortest_edge": 18}, "crop_size": {"height": 16, "width": 16},
                           "image_mean": [0.1, 0.2, 0.3]},
     {"edge": 18, "square": False, "crop": 16, "resample": 3, "mean": (0.1, 0.2, 0.3)}),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 16}, "crop_size": 16, "do_normalize": False},
     {"edge": 16, "square": False, "crop": 16, "mean": (0.0,) * 3, "std": (1.0,) * 3}),
    ("DeiTImageProcessor", {"do_resize": False, "do_rescale": False, "crop_size": {"height": 16, "width": 16}},
     {"edge": None, "crop": 16, "scale": 1.0})])
def test_preprocessors(folder, kind, options, expected):
    key = "feature_extractor_type" if "Extractor" in kind else "image_processor_type"
    found = load_image_input(folder("vit", **{key: kind}, **options))
    assert {name: getattr(found, name) for name in expected} == expected
    assert (found.positions, found.patch) == (16, 4)


@pytest.mark.parametrize(("family", "asked"), [("vit", True), ("deit", True), ("swin", True), ("clip", True),
                                               ("dinov2", False)])
def test_without_a_preprocessor(folder, family, asked, caplog):
    found = load_image_input(folder(family))
    assert found == ImageInput(edge=16, positions=16, patch=found.patch, asked=asked)
    assert "has no preprocessor_config.json; images are resized to 16" in caplog.text


def test_models_and_preprocessors_that_are_refused(folder, tmp_path):
    with pytest.raises(SlimtuneError, match=r"a bert reads no images.\n  image_classification takes ViT"):
        load_image_input(folder("bert"))
    for options, said in (({"image_processor_type": "ConvNextImageProcessor"}, r"way of its own \(.*resize"),
                          ({"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 16}},
                           "not square"),
                          ({"image_processor_type": "BitImageProcessor", "do_center_crop": False}, "not square"),
                          ({"image_processor_type": "NoSuchProcessor"}, "cannot load its image preprocessor")):
        with pytest.raises(SlimtuneError, match=said):
            load_image_input(folder("vit", **options))
    (tmp_path / "preprocessor_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_channels": 1}))
    with pytest.raises(SlimtuneError, match="images of 1 channels"):
        load_image_input(tmp_path)
    for text in ('{"model_type": "nosuch"}', "{}", "{"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(SlimtuneError, match="transformers cannot load its config"):
            load_image_input(tmp_path)
