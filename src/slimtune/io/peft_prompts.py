"""PEFT's prompt and prefix tuning: one matrix `prompt_embeddings`, in and out.

A prefix is [l, 2 n d]: K_0, V_0, K_1, V_1, ... of n layers. To PEFT it is a cache, so it stands before the text
(our positions="before"). In an encoder-decoder, PEFT 0.21 doubles the list, then deals four a layer: keys and
values of the decoder's self-attention, and two that it drops. So layer i gets the pair at 4 i modulo 2 n, which
for an even n gives two layers the same one. Reading does the same; writing asks for one layer more where n is
even, which lets every layer have its own.
"""
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slimtune.core.anatomy import Anatomy
from slimtune.core.method import from_config
from slimtune.core.sites import Site
from slimtune.errors import DeltaError, listing
from slimtune.io.delta_folder import NOTHING
from slimtune.io.peft_config import PrefixFields, PromptFields
from slimtune.io.peft_names import site_patterns
from slimtune.io.peft_weights import Found, Source
from slimtune.methods.prefix_tuning import PrefixTuning
from slimtune.methods.prompt_tuning import PromptTuning

MATRIX = "prompt_embeddings"


def _matrix(source: Source) -> tuple[Tensor, dict[str, Tensor]]:
    """(the matrix, every other tensor by its path in the model)."""
    if MATRIX not in source.tensors:
        raise DeltaError(f"{source.where}: there is no tensor '{MATRIX}'.",
                         f"There is: {listing(source.tensors, 8) or 'nothing'}.", NOTHING)
    rest = {k: v for k, v in source.tensors.items() if k != MATRIX}
    plain = Source(source.where, source.config, rest, source.modules).split()[1]
    return source.tensors[MATRIX], plain


def _shaped(source: Source, matrix: Tensor, shape: tuple[int, int]) -> None:
    if tuple(matrix.shape) != shape:
        raise DeltaError(f"{source.where}: {MATRIX} has shape {tuple(matrix.shape)}, and should have {shape}.",
                         "Load the model it was trained on. " + NOTHING)


def is_seq2seq(anatomy: Anatomy) -> bool:
    return {"encoder", "decoder"} <= {t.name for t in anatomy.towers}


def pools_the_prompt(source_task: str | None, anatomy: Anatomy) -> bool:
    """Whether PEFT's model classifies by the first token, which with a prompt is the prompt's own."""
    return source_task == "SEQ_CLS" and {t.name for t in anatomy.towers} == {"encoder"}


def read_prompt(source: Source, fields: PromptFields) -> Found:
    """The prompt of the first tower. PEFT's logits of the prompt itself are taken off here."""
    anatomy = source.modules.anatomy
    matrix, plain = _matrix(source)
    tower = anatomy.towers[0]
    if tower.name not in ("encoder", "decoder"):
        raise DeltaError(f"{source.where}: PEFT has no prompt tuning for a {anatomy.model_type}.", NOTHING)
    if pools_the_prompt(fields.task_type, anatomy):
        raise DeltaError(f"{source.where}: a prompt for classification with {anatomy.model_type}.",
                         "PEFT classifies by the first token of [prompt; text], which is the prompt's; slimtune takes "
                         "the prompt off before pooling, so this file would give other logits.",
                         f"Train slimtune.methods.PromptTuning(length={fields.num_virtual_tokens}) instead. {NOTHING}")
    length, width = fields.num_virtual_tokens, next(s.d_out for s in anatomy.sites
                                                    if s.tower == tower.name and s.role == "embed")
    parts = fields.num_transformer_submodules or 1
    _shaped(source, matrix, (length * parts, width))
    prompt = matrix[:length]  # PEFT's forward never reads the rows of a second submodule
    method = from_config({"name": "prompt_tuning", "length": length, "towers": (tower.name,), "head": "none"})
    return Found([method], {f"{tower.name}.tokens.prompt_tuning.prompt": prompt}, plain)


def prefix_sites(anatomy: Anatomy) -> list[Site]:
    """The self-attentions that PEFT's cache reaches, in order."""
    tower = "decoder" if is_seq2seq(anatomy) else anatomy.towers[0].name
    return [s for s in anatomy.sites if s.tower == tower and s.role == "attn" and not s.cross]


def pair_of(layer: int, layers: int, seq2seq: bool) -> int:
    """Which (K, V) pair of PEFT's matrix a layer gets.

    Example:
        >>> [pair_of(i, 4, True) for i in range(4)], [pair_of(i, 5, True) for i in range(4)]
        ([0, 2, 0, 2], [0, 2, 4, 1])
    """
    return 2 * layer % layers if seq2seq else layer


def read_prefix(source: Source, fields: PrefixFields) -> Found:
    """The keys and values of every self-attention of the decoder, or of the only tower."""
    anatomy = source.modules.anatomy
    matrix, plain = _matrix(source)
    seq2seq = is_seq2seq(anatomy)
    if seq2seq and fields.num_transformer_submodules == 1:
        raise DeltaError(f"{source.where}: num_transformer_submodules is 1 for an encoder-decoder, where PEFT mixes "
                         "the prefix with the cross-attention's cache.", "Train it with 2 (PEFT's default). " + NOTHING)
    sites, layers, length = prefix_sites(anatomy), fields.num_layers, fields.num_virtual_tokens
    if not sites or anatomy.towers[0].name not in ("encoder", "decoder"):
        raise DeltaError(f"{source.where}: PEFT has no prefix tuning for a {anatomy.model_type}.", NOTHING)
    width = sites[0].heads * sites[0].head_dim
    if len(sites) > layers or (not seq2seq and len(sites) != layers):
        raise DeltaError(f"{source.where}: num_layers is {layers}; this {anatomy.model_type} has {len(sites)}.",
                         "Load the model it was trained on. " + NOTHING)
    if fields.num_attention_heads != sites[0].heads:
        raise DeltaError(f"{source.where}: num_attention_heads is {fields.num_attention_heads}; this "
                         f"{anatomy.model_type} has {sites[0].heads} heads of keys.", NOTHING)
    _shaped(source, matrix, (length, 2 * layers * width))
    pairs = matrix.view(length, 2 * layers, width)
    method = from_config({"name": "prefix_tuning", "length": length, "sites": site_patterns(anatomy, sites),
                          "positions": "before", "head": "none"})
    found = Found([method], {}, plain)
    for number, site in enumerate(sites):
        at = 2 * pair_of(number, layers, seq2seq)
        found.state |= {f"{site.name}.prefix_tuning.key": pairs[:, at],
                        f"{site.name}.prefix_tuning.value": pairs[:, at + 1]}
    return found


def write_prefix(anatomy: Anatomy, method: PrefixTuning, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
    """(the fields, the matrix) of a prefix on every self-attention that PEFT's cache reaches."""
    sites, seq2seq = prefix_sites(anatomy), is_seq2seq(anatomy)
    have = {m[1] for key in state if (m := re.fullmatch(r"(.+\.attn)\.prefix_tuning\.(?:key|value)", key))}
    if have != {s.name for s in sites}:
        odd = sorted(have ^ {s.name for s in sites})
        raise DeltaError(f"PEFT cannot hold this prefix: it has one for each of {sites[0].name} ... {sites[-1].name} "
                         f"and no other, and the delta differs at: {listing(odd, 6)}.",
                         f"Attach PrefixTuning(sites={site_patterns(anatomy, sites)!r}, positions='before').")
    if method.positions != "before":
        raise DeltaError("PEFT's prefix takes the first positions, and this delta's has none (positions='apart').",
                         "Train PrefixTuning(positions='before') to export it.")
    layers = len(sites) + (1 if seq2seq and len(sites) % 2 == 0 else 0)
    width = sites[0].heads * sites[0].head_dim
    first = state[f"{sites[0].name}.prefix_tuning.key"]
    pairs = torch.zeros(method.length, 2 * layers, width, dtype=first.dtype, device=first.device)
    for number, site in enumerate(sites):
        at = 2 * pair_of(number, layers, seq2seq)
        pairs[:, at] = state[f"{site.name}.prefix_tuning.key"]
        pairs[:, at + 1] = state[f"{site.name}.prefix_tuning.value"]
    fields = {"num_virtual_tokens": method.length, "token_dim": width, "num_layers": layers,
              "num_attention_heads": sites[0].heads, "num_transformer_submodules": 2 if seq2seq else 1,
              "encoder_hidden_size": width, "prefix_projection": False}
    return fields, pairs.flatten(1)


def write_prompt(anatomy: Anatomy, method: PromptTuning, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
    """(the fields, the matrix) of a prompt in front of the first tower."""
    tower = anatomy.towers[0].name
    if tuple(method.towers or (tower,)) != (tower,) or tower not in ("encoder", "decoder"):
        raise DeltaError(f"PEFT cannot hold a prompt for {listing(method.towers or (tower,))}: it has one for the "
                         "first tower of a text model.", "Keep the delta in slimtune's own folder.")
    prompt = state[f"{tower}.tokens.prompt_tuning.prompt"]
    spec = next(t for t in anatomy.towers if t.name == tower)
    heads = next(s for s in anatomy.sites if s.tower == tower and s.role == "attn")
    return {"num_virtual_tokens": method.length, "token_dim": prompt.shape[1], "num_layers": len(spec.blocks),
            "num_attention_heads": max(1, heads.d_in // heads.head_dim), "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM"}, prompt
