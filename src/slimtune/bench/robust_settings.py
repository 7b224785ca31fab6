"""The settings of the robust-ticket experiment, chosen on training phrases and on sentences of the validation file."""
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from slimtune.objectives.adversarial import FreeLB
from slimtune.objectives.attack import PGD
from slimtune.sparsity.robust import TicketSpec
from slimtune.train import TrainSpec

TOKENS, WORDS = 40, 4
"""Length that texts are cut to, and the fewest words of a phrase to train on."""


@dataclass(frozen=True)
class Settings:
    """One experiment. tune: of all three models; search, adversary: of the robust ticket; sparsity: of both tickets.

    sentences: how many of the test file are attacked; threshold, candidates, share: of the synonym table and the word
    attack; evidence: how far apart the two classes' log odds of a word must be for it to be of a class.
    """

    tune: TrainSpec
    search: TicketSpec
    adversary: FreeLB
    balls: tuple[PGD, ...]
    sparsity: float = 0.3
    sentences: int = 300
    threshold: float = 0.35
    candidates: int = 12
    share: float = 0.4
    evidence: float = 0.5

    def told(self) -> dict[str, Any]:
        """As the results hold it."""
        return asdict(self) | {"tune": self.tune.model_dump(mode="json")}

    def digest(self) -> str:
        """Of what makes the models: the name of the folder that keeps them."""
        told = {key: self.told()[key] for key in ("tune", "search", "adversary", "sparsity")}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


SETTINGS = Settings(
    tune=TrainSpec(steps=300, batch_size=32, learning_rate=2e-5, weight_decay=0.01, warmup=0.1, precision="bfloat16",
                   save_every=10_000, threads=1),
    search=TicketSpec(steps=500, columns=4), adversary=FreeLB(steps=3, rate=0.1),
    balls=(PGD(0.1, 0.02), PGD(0.2, 0.04)))
