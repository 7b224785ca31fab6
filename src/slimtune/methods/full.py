"""Full fine-tuning: every tensor of the backbone, as a difference.

    theta <- theta + d,    d of theta's size

Source: the baseline of every paper here; Devlin et al., 2019, "BERT: Pre-training of Deep Bidirectional
Transformers for Language Understanding", arXiv 1810.04805, section 3.2.
"""
from typing import ClassVar

from slimtune.core import Builder, Unfreeze, base_parameters


class Full(Unfreeze):
    """Trains the whole backbone. The delta's file is as large as the model.

    The base is kept beside the trained copy, so that it can be given back bitwise: twice the memory.
    """

    silent: ClassVar[dict[str, str]] = {
        r"\.mask_token$": "used in pre-training only",
        r"(key|k_proj|k_lin|key_proj|attn\.k)\.bias$": "softmax ignores a shift of all keys by one vector"}

    def tensors(self, build: Builder) -> list[str]:
        heads = tuple(head + "." for head in build.anatomy.heads)
        return [path for path in base_parameters(build.model) if not (heads and path.startswith(heads))]
