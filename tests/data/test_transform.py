"""Images to batches: bit for bit what transformers' processors make, and augmentation that a seed repeats."""
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from image_toys import pixels, spec
from PIL import Image

from slimtune.data.transform import COLOURS, Transform, centre, drawn_by, transform_of
from slimtune.errors import DataError
from slimtune.io.images import ImageInput, load_image_input
from slimtune.testing import tiny


def batch(transform: Transform, *arrays) -> torch.Tensor:
    rows = [{"pixel_values": transform.shrink(Image.fromarray(a))} for a in arrays]
    return transform.collate(rows)["pixel_values"]


SIZES = [(37, 52), (52, 37), (40, 40), (9, 70), (300, 280)]


@pytest.mark.parametrize(("name", "options", "taken"), [
    ("ViTImageProcessorPil", {"size": {"height": 32, "width": 32}},
     ImageInput(edge=32, resample=2, mean=(0.5,) * 3, std=(0.5,) * 3)),
    ("DeiTImageProcessorPil", {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}},
     ImageInput(edge=40, crop=32, mean=(0.5,) * 3, std=(0.5,) * 3)),
    ("BitImageProcessorPil", {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32},
                              "image_mean": list(COLOURS["imagenet"][0]), "image_std": list(COLOURS["imagenet"][1])},
     ImageInput(edge=37, square=False, crop=32)),
    ("CLIPImageProcessorPil", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
     ImageInput(edge=32, square=False, crop=32, mean=(0.48145466, 0.4578275, 0.40821073),
                std=(0.26862954, 0.26130258, 0.27577711))),
    ("BitImageProcessorPil", {"do_resize": False, "crop_size": {"height": 32, "width": 32}, "do_normalize": False},
     ImageInput(edge=None, crop=32, mean=(0.0,) * 3, std=(1.0,) * 3))])
def test_bit_for_bit_what_transformers_makes(name, options, taken):
    import transformers

    processor = getattr(transformers, name)(**options)
    arrays = [pixels(i, *size) for i, size in enumerate(SIZES)]
    theirs = torch.stack([processor(Image.fromarray(a), return_tensors="pt")["pixel_values"][0] for a in arrays])
    assert torch.equal(batch(transform_of(spec(train="x", size=None), taken), *arrays), theirs)


@pytest.mark.parametrize("options", [{"size": None}, {"size": 16}, {"size": 32, "resize": "crop", "normalize": "none"},
                                     {"size": 16, "resize": "square", "normalize": "half"}])
@pytest.mark.parametrize("taken", [ImageInput(edge=40, crop=32), ImageInput(edge=37, square=False, crop=32, resample=2),
                                   ImageInput(edge=None, crop=32, scale=1.0)])
def test_the_file_that_is_written_says_the_same_steps(tmp_path, options, taken):
    tiny("vit").config.save_pretrained(tmp_path)
    made = transform_of(spec(train="x", augment=["flip"], **options), taken)
    made.for_training().save_pretrained(tmp_path)
    found = transform_of(spec(train="x", size=None), load_image_input(tmp_path))
    assert replace(found, asked=False) == replace(made, augment=())


def test_every_byte_is_scaled_and_normalised_as_the_formula_says():
    transform = transform_of(spec(train="x", size=16, normalize="imagenet"), ImageInput(edge=16))
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    mean, std = (np.array(v)[:, None, None] for v in COLOURS["imagenet"])
    expected = (image.transpose(2, 0, 1) / 255 - mean) / std
    np.testing.assert_allclose(batch(transform, image)[0].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("options", "expected"), [
    ({}, (224, 256, False)), ({"size": 98}, (98, 112, False)), ({"size": 98, "resize": "square"}, (98, 98, True)),
    ({"size": 98, "resize": "crop"}, (98, 112, False)), ({"resize": "square"}, (224, 224, True))])
def test_what_a_recipe_sets_replaces_the_preprocessors(options, expected):
    taken = ImageInput(edge=256, square=False, crop=224, positions=518, patch=14)
    made = transform_of(spec(train="x", **{"size": None, **options}), taken)
    assert (made.size, made.edge, made.square) == expected


def test_sizes_that_the_model_cannot_read():
    with pytest.raises(DataError, match=r"no multiple of the model's patches of 14.\n  Set data.size=98 or 112"):
        transform_of(spec(train="x", size=100), ImageInput(patch=14))
    with pytest.raises(DataError, match="positions for 224 alone"):
        transform_of(spec(train="x", size=112), ImageInput(positions=224, patch=16, fits=False))
    assert transform_of(spec(train="x", size=112), ImageInput(positions=224, asked=True)).asked
    assert not transform_of(spec(train="x", size=224), ImageInput(positions=224, asked=True)).asked


def test_normalisation_has_a_name():
    for name, (mean, std) in COLOURS.items():
        assert transform_of(spec(train="x"), ImageInput(mean=mean, std=std)).normalize == name
        chosen = transform_of(spec(train="x", normalize=name), ImageInput(mean=(0.1,) * 3))
        assert (chosen.normalize, chosen.mean, chosen.std) == (name, mean, std)
    assert transform_of(spec(train="x"), ImageInput(mean=(0.1,) * 3)).normalize == "model"


def test_the_centre_is_cut_out_or_filled_up():
    image = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3) + 1
    cut = centre(image, 3)
    assert np.array_equal(cut, image[:, 1:4])
    wide = centre(image, 6)
    assert wide.shape == (6, 6, 3)
    assert np.array_equal(wide[2:5, 1:6], image)
    assert wide.astype(int).sum() == image.astype(int).sum()


def test_augmentation_is_of_the_seed_epoch_and_image_alone():
    transform = transform_of(spec(train="x", size=8, augment=("flip", "crop")), ImageInput(edge=8)).for_training()
    kept = transform.shrink(Image.fromarray(pixels(0, 40, 40)))
    assert kept.shape == (3, 9, 9)
    places = {transform.place(kept, drawn_by(0, epoch, 3)).numpy().tobytes() for epoch in range(40)}
    assert len(places) == 8  # 2 x 2 corners, and their mirror images
    for seed, epoch, index in ((0, 0, 0), (5, 2, 9)):
        one, two = (transform.place(kept, drawn_by(seed, epoch, index)) for _ in range(2))
        assert torch.equal(one, two)
        rng = random.Random(f"slimtune/augment/{seed}/{epoch}/{index}")
        top, left, mirrored = rng.randint(0, 1), rng.randint(0, 1), rng.random() < 0.5
        expected = kept[:, top:top + 8, left:left + 8]
        assert torch.equal(one, expected.flip(2) if mirrored else expected)


def test_without_augmentation_training_is_as_testing():
    plain = transform_of(spec(train="x"), ImageInput(edge=8))
    assert plain.for_training() == plain
    flipped = transform_of(spec(train="x", augment=("flip",)), ImageInput(edge=8))
    assert not flipped.training
    assert flipped.for_training().plain() == flipped
