"""Sparsity: criteria, granularities, allocations and schedules, any with any; and what is sliced out for real."""
from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):  # a criterion is known once its file was imported
    import_module(f"{__name__}.{_module.name}")
