"""What a private run's card says: the promise in words, and what it does not cover."""
from typing import Any


def promise(told: dict[str, Any]) -> list[str]:
    """Lines of Markdown, from the ledger's report (see `slimtune.privacy.Ledger.report`)."""
    if told["epsilon"] is None:
        return ["## Privacy", "", "No noise was added: there is no guarantee.", ""]
    secret = ("The seed of sampling and noise was given: there is no guarantee towards whoever knows it."
              if told["seed"] == "given" else "Sampling and noise come from the operating system's random numbers; the "
              "secret they were made from is in the checkpoints alone.")
    return ["## Privacy", "", f"The delta is ({told['epsilon']:.3f}, {told['delta']})-differentially private towards "
            f"each of its {told['examples']:,} training examples ({told['neighbours']}; an upper bound, by the "
            f"{told['accountant']} accountant).", "",
            f"Noise {told['noise_multiplier']:.4f} times the clip, clip {told['clip']} ({told['clipping']}), "
            f"{told['steps']:,} steps of Poisson draws at rate {told['sample_rate']:.4g}"
            f"{', four draws for each noise' if told['secure'] else ''}; Opacus {told['opacus']}. {secret}", "",
            *_loose(told),
            "Not covered: metrics.jsonl and the checkpoints (do not publish them), the names of the labels, the number "
            "of examples, scores on data held out from the training file, settings chosen by looking at other runs on "
            "the same data, and whoever wrote more than one of the examples.", ""]


def _loose(told: dict[str, Any]) -> list[str]:
    if told["delta"] < 1 / told["examples"]:
        return []
    return [f"Delta is not below 1 / examples ({1 / told['examples']:.2g}), so a program that publishes one example "
            "whole could keep this promise.", ""]
