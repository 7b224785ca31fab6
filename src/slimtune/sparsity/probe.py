"""Probe: a small random batch that a model of transformers can be tried on, and what comes out."""
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.modes import evaluating
from slimtune.errors import MethodError

TOKENS = 12


def probe(model: nn.Module) -> dict[str, Tensor]:
    """Text, images or sound of the shapes its config states, two examples, the second one padded.

    Errors: MethodError for a model whose inputs are not known, or that does not run on these.
    Example:
        >>> from slimtune.testing import tiny
        >>> {name: tuple(t.shape) for name, t in probe(tiny("bert")).items()}
        {'input_ids': (2, 12), 'attention_mask': (2, 12)}
    """
    config: Any = getattr(model, "config", None)
    takes = inspect.signature(model.forward).parameters
    if config is None or not {"input_ids", "pixel_values", "input_features"} & set(takes):
        raise MethodError(f"shrink does not know what a {type(model).__name__} takes, to try it on.",
                          "Pass inputs=, a batch of it.")
    try:
        made = _made(model, config, set(takes))
        outputs(model, made)
    except Exception as error:
        raise MethodError(f"a {type(model).__name__} does not run on the random batch it was tried on: "
                          f"{type(error).__name__}: {error}", "Pass inputs=, a batch of its own.") from error
    return made


def _made(model: nn.Module, config: Any, takes: set[str]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    if "input_ids" in takes:
        made |= _text(config, g)
    if "pixel_values" in takes:
        made["pixel_values"] = _images(getattr(config, "vision_config", config), g)
    if "input_features" in takes:
        frames = 2 * config.max_source_positions
        made["input_features"] = torch.randn(2, config.num_mel_bins, frames, generator=g)
    if getattr(config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = made.get("input_ids", _text(config, g)["input_ids"])
    like = next(p for p in model.parameters() if p.is_floating_point())
    return {n: t.to(like.device, like.dtype if t.is_floating_point() else t.dtype) for n, t in made.items()}


def _text(config: Any, g: torch.Generator) -> dict[str, Tensor]:
    text = config.get_text_config()
    vocabulary, end = text.vocab_size, getattr(text, "eos_token_id", None)
    end = end[0] if isinstance(end, list | tuple) else end
    tokens = min(TOKENS, getattr(text, "max_position_embeddings", None) or TOKENS)
    ids = torch.randint(vocabulary // 2, vocabulary, (2, tokens), generator=g)
    if end is not None:  # BART reads its sentence at its end
        ids[ids == end] = vocabulary // 2
        ids[:, -1] = end
    mask = torch.ones_like(ids)
    if getattr(config, "pad_token_id", None) is None:  # GPT-2 classifies one sentence at a time without
        return {"input_ids": ids[:1], "attention_mask": mask[:1]}
    mask[1, tokens - 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _images(config: Any, g: torch.Generator) -> Tensor:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(2, config.num_channels, height, width, generator=g)


@torch.no_grad()
def outputs(model: nn.Module, inputs: Mapping[str, Any] | Tensor) -> dict[str, Tensor]:
    """Every tensor of numbers that a model returns, by name, in eval mode."""
    with evaluating(model):
        out: Any = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    if isinstance(out, Tensor):
        out = {"output": out}
    elif not isinstance(out, Mapping):
        out = {str(i): value for i, value in enumerate(out)}
    return {name: value.detach() for name, value in out.items()
            if isinstance(value, Tensor) and value.is_floating_point()}
