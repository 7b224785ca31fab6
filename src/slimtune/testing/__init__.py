"""Public helpers for tests: tiny backbones, the conformance suite, real sizes without weights, fault injection."""
from slimtune.testing.check import CHECKS, CheckFailure, Report, check_method
from slimtune.testing.meta import (
    bart_large_meta,
    bert_base_meta,
    bert_large_meta,
    gpt2_medium_meta,
    roberta_base_meta,
    roberta_large_meta,
    t5_base_meta,
    t5_xl_meta,
    vit_b16_meta,
)
from slimtune.testing.site import assert_equation, randomize, site_io
from slimtune.testing.small import small
from slimtune.testing.tiny import NAMES, batch, doubled, kind, loss, output, tiny

__all__ = [
    "CHECKS", "NAMES", "CheckFailure", "Report", "assert_equation", "bart_large_meta", "batch", "bert_base_meta",
    "bert_large_meta", "check_method", "doubled", "gpt2_medium_meta", "kind", "loss", "output", "randomize",
    "roberta_base_meta", "roberta_large_meta", "site_io", "small", "t5_base_meta", "t5_xl_meta", "tiny", "vit_b16_meta",
]
