"""Errors that teach: what happened, where, what exists, and what to do.

    SiteError: method LoRA asked for site 'mlp.gate', which bert does not have.
      It has: attn.q attn.k attn.v attn.o ...
      Did you mean 'mlp.up'? Set method.sites, or see `slimtune inspect MODEL`.

Every kind is a `ValueError` for the user's input; the command line turns it into exit code 2,
except `TrainError`, which says that a run failed (exit code 1).
"""
from collections.abc import Iterable
from difflib import get_close_matches


class SlimtuneError(ValueError):
    """What happened, and below it, indented, each further line: what exists and what to do.

    Example:
        >>> print(SlimtuneError("no such verb 'tuen'.", "Did you mean 'tune'?"))
        no such verb 'tuen'.
          Did you mean 'tune'?
    """

    exit_code = 2

    def __init__(self, what: str, *more: str) -> None:
        self.what = what
        self.more = tuple(line for line in more if line)
        super().__init__("\n  ".join((what, *self.more)))


class SiteError(SlimtuneError):
    """A site, tower, block or role that the backbone does not have."""


class AnatomyError(SlimtuneError):
    """A model whose blocks and roles could not be told."""


class MethodError(SlimtuneError):
    """A method that is unknown, badly configured, or cannot go on this backbone."""


class DeltaError(SlimtuneError):
    """A delta, or a delta file, that does not fit, does not verify, or is misused."""


class RecipeError(SlimtuneError):
    """A recipe with an unknown key or a bad value; says the path of the key."""


class DataError(SlimtuneError):
    """Data that is missing, malformed or does not fit the task."""


class ExtraError(SlimtuneError):
    """An optional dependency that is not installed; names the extra that brings it, and more where that is not all."""

    def __init__(self, package: str, extra: str, purpose: str, *more: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed.",
                         f"Install it with: pip install 'slimtune[{extra}]'", *more)


class TrainError(SlimtuneError):
    """A run that failed while it ran: nothing trains, a loss that is not finite, a lost checkpoint."""

    exit_code = 1


def suggest(word: str, options: Iterable[str]) -> str:
    """The sentence "Did you mean ...?" for a word that is none of the options, or an empty one.

    Example:
        >>> suggest("ranks", ["rank", "alpha"])
        "Did you mean 'rank'?"
        >>> suggest("zzz", ["rank", "alpha"])
        ''
    """
    near = get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f"Did you mean '{near[0]}'?" if near else ""


def listing(options: Iterable[str], limit: int = 40) -> str:
    """What exists, on one line, cut after `limit` names.

    Example:
        >>> listing(["rank", "alpha"])
        'rank alpha'
    """
    names = list(options)
    return " ".join(names[:limit]) + (f" ... ({len(names)} in all)" if len(names) > limit else "")
