"""ImageInput: what a vision model's folder says of the images it reads. No pixels here, and no torchvision."""
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.errors import ExtraError, SlimtuneError
from slimtune.io.models import find_model, model_config

log = logging.getLogger("slimtune")
BICUBIC = 3
"""Pillow's number of a filter, as preprocessor files have it; 2 is bilinear."""
_STEPS = ("_preprocess", "process_image", "resize", "center_crop", "rescale", "normalize", "pad")
_INTERPOLATES = ("dinov2", "dinov2_with_registers")
"""Families that fit their positions to any image without being asked."""
_BY_KEYWORD = ("clip",)
"""Families whose forward hands on a keyword that it does not name."""


@dataclass(frozen=True)
class ImageInput:
    """Resize, crop, scale and normalise, as the model was trained; and the sizes that it can read.

    edge: both sides, or with `square=False` the short side, to which an image is resized; None: it is not.
    crop: side of the centre that is cut out; None: nothing is. scale: what a byte is multiplied by.
    positions: side of the images whose positions the model has; asked: whether it must be asked to fit them to others
    (`interpolate_pos_encoding=True`); fits: whether it can. patch: side of a patch; None where any size will do.

    Example:
        >>> eye = ImageInput(positions=518, patch=14)
        >>> eye.size, eye.square
        (224, True)
    """

    edge: int | None = 224
    square: bool = True
    crop: int | None = None
    resample: int = BICUBIC
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    positions: int | None = None
    patch: int | None = None
    asked: bool = False
    fits: bool = True

    @property
    def size(self) -> int | None:
        """Side of the image that the model gets; None where the image's own size is kept."""
        return self.crop or (self.edge if self.square else None)


def load_image_input(name_or_path: str | Path) -> ImageInput:
    """Read preprocessor_config.json and config.json of a model's folder; without the former, ImageNet's habits.

    Errors: SlimtuneError for a model that reads no images, or whose preprocessor does what is not done here.
    """
    source = find_model(name_or_path)
    config = model_config(source)
    side = getattr(config, "image_size", None)
    if side is None and getattr(config, "vision_config", None) is not None:
        config = config.vision_config
        side = getattr(config, "image_size", None)
    if getattr(config, "patch_size", None) is None and side is None:
        raise SlimtuneError(f"{source}: a {config.model_type} reads no images.",
                            "image_classification takes ViT, DeiT, DINOv2, Swin or CLIP.")
    if getattr(config, "num_channels", 3) != 3:
        raise SlimtuneError(f"{source}: reads images of {config.num_channels} channels; only 3 (RGB) are made here.")
    facts = {"positions": _side(side), "patch": _side(getattr(config, "patch_size", None)), **_flag(config)}
    told = _preprocessor(source)
    if told is None:
        log.warning("%s: has no preprocessor_config.json; images are resized to %s and normalised as ImageNet's "
                    "(data.size, data.resize and data.normalize change that)", source, facts["positions"] or 224)
        return ImageInput(edge=facts["positions"] or 224, **facts)
    return ImageInput(**told, **facts)


def _side(value: Any) -> int | None:
    """A config has one number, or one for each side."""
    return int(max(value)) if isinstance(value, list | tuple) else None if value is None else int(value)


def _flag(config: Any) -> dict[str, bool]:
    """Whether the family fits its positions to an image, and whether it must be asked."""
    from inspect import signature

    import transformers

    family = config.model_type.removesuffix("_vision_model")
    kind = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(family)
    if kind is None or family in _INTERPOLATES:
        return {"asked": False, "fits": family in _INTERPOLATES}
    forward = getattr(transformers, kind if isinstance(kind, str) else kind[0]).forward
    asked = family in _BY_KEYWORD or "interpolate_pos_encoding" in signature(forward).parameters
    return {"asked": asked, "fits": asked}


def _preprocessor(source: Path | str) -> dict[str, Any] | None:
    """The fields of the folder's preprocessor, its class's defaults filled in; None without one."""
    if isinstance(source, Path) and not (source / "preprocessor_config.json").is_file():
        return None
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ExtraError("pillow", "vision", "Reading images") from None
    from transformers import AutoImageProcessor
    from transformers.image_processing_backends import PilBackend

    try:
        told: Any = AutoImageProcessor.from_pretrained(
            str(source), local_files_only=isinstance(source, Path), trust_remote_code=False, backend="pil")
    except Exception as error:  # transformers has no kind of its own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SlimtuneError(f"{source}: transformers cannot load its image preprocessor: {first[:300]}",
                            "It reads preprocessor_config.json.") from None
    own = [step for step in _STEPS if getattr(type(told), step, None) is not getattr(PilBackend, step)]
    if own or told.do_pad:
        raise SlimtuneError(f"{source}: {type(told).__name__} prepares images in a way of its own "
                            f"({', '.join(own) or 'pad'}), which is not done here.",
                            "Remove its preprocessor_config.json, and set data.size, data.resize and data.normalize.")
    return _fields(told, source)


def _fields(told: Any, source: Path | str) -> dict[str, Any]:
    size, crop = (told.size or {}) if told.do_resize else {}, (told.crop_size or {}) if told.do_center_crop else {}
    short, height, width = (getattr(size, key, None) for key in ("shortest_edge", "height", "width"))
    cut = (getattr(crop, "height", None), getattr(crop, "width", None))
    unequal = height != width or cut[0] != cut[1] or getattr(size, "longest_edge", None)
    if unequal or (short and not cut[0]) or (told.do_resize and not (short or height)):
        raise SlimtuneError(f"{source}: its preprocessor makes images that are not square: size {size}, crop {crop}.",
                            "Only square ones are made here: set data.size.")
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    colours = {"mean": tuple(told.image_mean), "std": tuple(told.image_std)} if told.do_normalize else plain
    return {"edge": short or height, "square": short is None, "crop": cut[0],
            "resample": 2 if told.resample is None else int(told.resample),
            "scale": float(told.rescale_factor) if told.do_rescale else 1.0, **colours}
