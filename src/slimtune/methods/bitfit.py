"""BitFit: only the bias terms.

    y = W x + b,    b trained, W frozen

Source: Ben-Zaken et al., 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
Masked Language-models", arXiv 2106.10199, section 3.
"""
from typing import ClassVar

from pydantic import Field

from slimtune.core import Builder, Unfreeze, base_parameters
from slimtune.errors import MethodError


class BitFit(Unfreeze):
    """Trains the backbone's biases: 7d + f a layer of BERT, 102,912 on BERT-base with embeddings and pooler.

    sites: the sites whose biases are trained; all of the backbone by default. The paper's subset of
    query and intermediate is `sites=("attn.q", "mlp.up")`, 46,080 on BERT-base.

    Errors: MethodError on a backbone without biases (T5, Llama), or for a slice of a fused bias.
    """

    sites: tuple[str, ...] | None = Field(None, description="sites whose biases are trained; all by default")

    silent: ClassVar[dict[str, str]] = {
        r"(key|k_proj|k_lin|key_proj|attn\.k)\.bias$": "softmax ignores a shift of all keys by one vector"}

    def tensors(self, build: Builder) -> list[str]:
        parameters = base_parameters(build.model)
        if self.sites is None and self.blocks is None:
            heads = tuple(head + "." for head in build.anatomy.heads)
            found = [p for p in parameters if p.endswith(".bias") and not (heads and p.startswith(heads))]
        else:
            patterns = self.sites or ("attn.?", "mlp.up", "mlp.down", "norm.*")
            sites = build.anatomy.select(patterns, self.blocks, who="method BitFit")
            for site in sites:
                if site.part is not None and self.sites is not None:
                    raise MethodError(f"BitFit cannot train the bias of {site.name} alone: it is a slice of "
                                      f"{site.path}.bias.", "Leave sites unset to train all biases.")
            found = list(dict.fromkeys(p for s in sites if (p := f"{s.path}.bias") in parameters))
        if not found:
            raise MethodError(f"BitFit trains biases, and {build.anatomy.model_type} has none there.",
                              "Use NormTuning, IA3 or LoRA.")
        return found
