"""slimtune: adapt one pretrained Transformer to many tasks by training a small delta."""
from slimtune import methods
from slimtune.core import (
    Anatomy,
    Count,
    Delta,
    Method,
    Site,
    TowerSpec,
    activate,
    attach,
    average,
    deltas,
    dissect,
    register,
)
from slimtune.core.examples import per_example
from slimtune.core.route import route
from slimtune.errors import SlimtuneError
from slimtune.io.load import load
from slimtune.io.model_folder import save_model
from slimtune.io.models import load_model
from slimtune.sparsity.macs import count_macs
from slimtune.sparsity.prune import prune
from slimtune.sparsity.shrink import shrink

__version__ = "0.1.0"

__all__ = ["Anatomy", "Count", "Delta", "Method", "Site", "SlimtuneError", "TowerSpec", "activate", "attach", "average",
           "count_macs", "deltas", "dissect", "load", "load_model", "methods", "per_example", "prune", "register",
           "route", "save_model", "shrink"]
