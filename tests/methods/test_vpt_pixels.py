"""VPT in pixels: patches, a frame around the image, channels below it."""
import pytest
import torch
import torch.nn.functional as F
from vpt_cases import assert_same, images, stream

import slimtune as st
from slimtune.errors import MethodError
from slimtune.methods.vpt import VPT
from slimtune.testing import output, tiny

PATCH = "vit.embeddings.patch_embeddings.projection"


def normalised(pixels, channels=3):
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64)
    if channels != 3:
        mean, std = mean.mean().expand(1), std.mean().expand(1)
    return (pixels - mean[:, None, None]) / std[:, None, None]


@pytest.mark.parametrize("init", ["xavier", "normal", "imagenet"])
def test_patches_of_trained_pixels(init: str):
    def formula(model, x, values):
        image = values["vision.0.tokens.vpt.prompt"]
        image = normalised(image) if init == "imagenet" else image
        p = torch.stack([model.vit.embeddings.patch_embeddings.projection(image[None, :, :, 4 * i:4 * i + 4]).flatten()
                         for i in range(3)])
        return model.classifier(stream(model, model.vit.embeddings(x), {0: p})[0][:, 0])
    assert_same(tiny("vit").double(), VPT(length=3, location="pixel", deep=False, init=init), images("vit"), formula)


def framed(x, values, length, norm=normalised):
    sides, ends = (norm(values[f"vision.image.vpt.{n}"]).expand(len(x), -1, -1, -1) for n in ("sides", "ends"))
    wide = torch.cat([sides[..., :length], x, sides[..., length:]], 3)
    return torch.cat([ends[:, :, :length], wide, ends[:, :, length:]], 2)


@pytest.mark.parametrize("family", ["vit", "dinov2", "swin"])
def test_a_frame_of_pixels(family: str):
    """Position embeddings are interpolated by the model for the larger image."""
    more = {} if family == "dinov2" else {"interpolate_pos_encoding": True}
    for settings, norm in (({}, normalised), ({"init": "normal"}, lambda t: t)):
        assert_same(tiny(family).double(), VPT(length=4, location="pad", deep=False, **settings), images(family),
                    lambda m, x, v, norm=norm: m(framed(x, v, 4, norm), **more).logits)


def convolutional(kind: str):
    import transformers as t

    torch.manual_seed(0)
    if kind == "convnext":
        config = t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=16, num_labels=3)
        return t.ConvNextForImageClassification(config).double().eval()
    config = t.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_labels=3)
    return t.ResNetForImageClassification(config).double().eval()


@pytest.mark.parametrize("kind", ["convnext", "resnet"])
def test_a_frame_around_a_convolutional_networks_image(kind: str):
    model, method = convolutional(kind), VPT(length=2, location="pad", deep=False, image_size=16)
    assert_same(model, method, images("vit"), lambda m, x, v: m(framed(x, v, 2)).logits)
    before = {n: b.clone() for n, b in model.named_buffers()}
    delta = st.attach(model.train(), method)
    output(model, images("vit")).sum().backward()
    delta.detach()
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())  # the batch norms are in eval mode
    with pytest.raises(MethodError, match="pad"):
        st.attach(model, VPT())


@pytest.mark.parametrize("settings", [{}, {"init": "imagenet"}], ids=str)
def test_channels_below_the_images(settings):
    def formula(model, x, values):
        conv, image = model.vit.embeddings.patch_embeddings.projection, values["vision.image.vpt.prompt"]
        image = normalised(image, 1) if settings else image
        weight = torch.cat([values[f"own.{PATCH}.weight"], values["vision.image.vpt.weight"]], 1)
        wide = torch.cat([x, image.expand(len(x), -1, -1, -1)], 1)
        patches = F.conv2d(wide, weight, values[f"own.{PATCH}.bias"], stride=4).flatten(2).mT
        handle = conv.register_forward_hook(lambda m, a, y: patches.mT.unflatten(2, (4, 4)))
        try:
            return model(x).logits
        finally:
            handle.remove()
    assert_same(tiny("vit").double(), VPT(length=2, location="below", deep=False, **settings), images("vit"), formula)


def test_an_image_of_another_size_is_told():
    model = tiny("vit")
    st.attach(model, VPT(length=2, location="pad", deep=False, image_size=20))
    with pytest.raises(MethodError, match="image_size"):
        model(pixel_values=torch.zeros(1, 3, 16, 16))
