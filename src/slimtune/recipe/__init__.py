"""Recipes: one validated tree that describes one run, its text, and what is done with it."""
from slimtune.recipe.parse import read_recipe
from slimtune.recipe.run import Result, run
from slimtune.recipe.schema import schema
from slimtune.recipe.tree import Recipe
from slimtune.recipe.use import digest_run, evaluate_run, predict_run

__all__ = ["Recipe", "Result", "digest_run", "evaluate_run", "predict_run", "read_recipe", "run", "schema"]
