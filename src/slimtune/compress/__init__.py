"""compress: what a trained model runs as once it is deployed, and how fast that really is."""
from slimtune.compress.deploy import Exported, export_model, open_exported
from slimtune.compress.isa import instruction_sets
from slimtune.compress.latency import Latency, latency
from slimtune.compress.sparse_linear import Sparsified, desparsify, sparsify
from slimtune.compress.units import UnitTimes, unit_times

__all__ = ["Exported", "Latency", "Sparsified", "UnitTimes", "desparsify", "export_model", "instruction_sets",
           "latency", "open_exported", "sparsify", "unit_times"]
