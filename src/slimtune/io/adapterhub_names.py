"""AdapterHub's names: where `adapters` keeps what it adds to each family, with the module names of transformers 4."""
import re
from dataclasses import dataclass, field
from functools import cached_property

from slimtune.core.anatomy import Anatomy
from slimtune.core.sites import Site, join
from slimtune.errors import DeltaError, listing, suggest
from slimtune.io.delta_folder import NOTHING

PLACES = {"attn": "mh_adapter", "cross.attn": "cross_adapter", "mlp": "output_adapter"}
"""A sub-layer, and the key of the config that gives it a bottleneck."""

LINEARS = {"attn.q": "q", "attn.k": "k", "attn.v": "v", "mlp.up": "intermediate_lora", "mlp.down": "output_lora"}
"""A linear role, and the letter or key of the config that gives it a LoRA."""


@dataclass(frozen=True)
class Layout:
    """One family. Paths are of transformers 4.

    prefix: the base model in a model with a head; blocks: tower -> its blocks, from the base model;
    adapters: tower -> {sub-layer: module that holds bottlenecks, from a block};
    renamed: path from a block today -> then; locations: names of prefixes' places;
    relative: positions are a bias that counts keys, prefix included.
    """

    prefix: str
    blocks: dict[str, str]
    adapters: dict[str, dict[str, str]]
    renamed: dict[str, str] = field(default_factory=dict)
    locations: dict[str, tuple[str, bool]] = field(default_factory=dict)
    relative: bool = False


_SEQ2SEQ = {"encoder_prefix": ("encoder", False), "cross_prefix": ("decoder", True), "self_prefix": ("decoder", False)}
_HELD = {"attn": "attention_adapters", "mlp": "output_adapters"}
_T5 = Layout("transformer", {"encoder": "encoder.block", "decoder": "decoder.block"},
             {"encoder": {"attn": "layer.0", "mlp": "layer.1"},
              "decoder": {"attn": "layer.0", "cross.attn": "layer.1", "mlp": "layer.2"}},
             locations=_SEQ2SEQ, relative=True)
_BART = Layout("model", {"encoder": "encoder.layers", "decoder": "decoder.layers"},
               {"encoder": _HELD, "decoder": {**_HELD, "cross.attn": "cross_attention_adapters"}}, locations=_SEQ2SEQ)
_VIT = {"attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}


def _bert(prefix: str) -> Layout:
    return Layout(prefix, {"encoder": "encoder.layer"}, {"encoder": {"attn": "attention.output", "mlp": "output"}},
                  locations={"self_prefix": ("encoder", False)})


LAYOUTS = {
    "bert": _bert("bert"), "roberta": _bert("roberta"), "xlm-roberta": _bert("roberta"), "electra": _bert("electra"),
    "distilbert": Layout("distilbert", {"encoder": "transformer.layer"}, {"encoder": _HELD},
                         locations={"self": ("encoder", False)}),
    "gpt2": Layout("transformer", {"decoder": "h"}, {"decoder": _HELD}, locations={"self_prefix": ("decoder", False)}),
    "t5": _T5, "mt5": _T5, "bart": _BART, "mbart": _BART,
    "vit": Layout("vit", {"vision": "encoder.layer"},
                  {"vision": {"attn": "attention_adapters", "mlp": "output.output_adapters"}}, _VIT,
                  {"self_prefix": ("vision", False)}),
}


class Hub:
    """One model's sites by AdapterHub's names. Layers are counted through all towers, the encoder first.

    Errors: DeltaError for a family that AdapterHub does not have, or slimtune does not know it to have.
    """

    def __init__(self, anatomy: Anatomy, where: str) -> None:
        if anatomy.model_type not in LAYOUTS:
            raise DeltaError(f"{where}: AdapterHub's names for {anatomy.model_type} are not known to slimtune.",
                             f"It knows: {listing(LAYOUTS)}.", NOTHING)
        self.anatomy, self.layout = anatomy, LAYOUTS[anatomy.model_type]
        self.layers = [(tower, block) for tower in self.layout.blocks
                       for block in range(len(anatomy.tower(tower).blocks))]
        self.number = {layer: i for i, layer in enumerate(self.layers)}

    @property
    def root(self) -> str:
        """What a file's keys start with, for this model's class."""
        return f"{self.anatomy.base}." if self.anatomy.base else ""

    @property
    def width(self) -> int:
        return self.anatomy.towers[0].width

    def post_norm(self) -> bool:
        return self.anatomy.towers[0].post_norm

    def layer(self, site: Site) -> int:
        """The number of the layer a site is in; its sites of no block are in none."""
        return -1 if site.block is None else self.number[site.tower, site.block]

    @cached_property
    def places(self) -> dict[tuple[int, str], Site]:
        """The sub-layers that may have a bottleneck, by layer and place, in the library's order."""
        found = {(self.layer(s), ("cross." if s.cross else "") + s.role): s
                 for s in self.anatomy.sites if s.role in ("attn", "mlp")}
        return {(i, place): found[i, place] for i, (tower, _) in enumerate(self.layers)
                for place in PLACES if place in self.layout.adapters[tower]}

    def holder(self, layer: int, place: str) -> str:
        """The path of the module that holds a sub-layer's bottlenecks, from the base model."""
        tower, block = self.layers[layer]
        return join(self.layout.blocks[tower], str(block), self.layout.adapters[tower][place])

    @cached_property
    def linears(self) -> dict[str, list[Site]]:
        """The linear modules that may have a LoRA: path from the base model -> its site, or its slices."""
        found: dict[str, list[Site]] = {}
        for site in self.anatomy.sites:
            if site.role in LINEARS and site.at == "output" and site.block is not None:
                block = self.anatomy.tower(site.tower).blocks[site.block]
                inside = site.path.removeprefix(f"{block}.")
                path = join(self.layout.blocks[site.tower], str(site.block), self.layout.renamed.get(inside, inside))
                found.setdefault(path, []).append(site)
        return found

    @cached_property
    def prefixes(self) -> dict[str, list[Site]]:
        """The attentions that may have a prefix, by location, in order."""
        return {name: [s for s in self.anatomy.sites if s.role == "attn" and (s.tower, s.cross) == place]
                for name, place in self.layout.locations.items()}


_LEGACY = {"attention_text_task_adapters": "adapters", "attention_text_lang_adapters": "adapters",
           "layer_text_task_adapters": "adapters", "layer_text_lang_adapters": "adapters"}
_KEY = re.compile(r"(?:(.+?)\.)?(adapters|loras|prefix_tunings|shared_parameters)\.([^.]+)\.(.+)")


def parse_key(key: str, hub: Hub, name: str, where: str) -> str:
    """A tensor's key without the base model's and the adapter's names.

    Errors: DeltaError for what is no tensor of an adapter, or of another adapter.
    """
    for old, new in _LEGACY.items():
        key = key.replace(old, new)
    match = _KEY.fullmatch(key)
    if match is None:
        raise DeltaError(f"{where}: {key!r} belongs to nothing that slimtune reads.",
                         "It reads bottlenecks, LoRA, (IA)^3 and prefixes.", NOTHING)
    if match[3] != name:
        raise DeltaError(f"{where}: {key!r} is of an adapter {match[3]!r}, and the config's name is {name!r}.",
                         suggest(name, [match[3]]), NOTHING)
    host = f"{match[1] or ''}.".removeprefix(f"{hub.layout.prefix}.").strip(".")
    return join(host, match[2], match[4])
