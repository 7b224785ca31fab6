"""privacy: differentially private training: per-example gradients into Opacus' optimizers, samplers and accountants."""
from slimtune.privacy.ledger import Ledger
from slimtune.privacy.losses import example_losses
from slimtune.privacy.spec import PrivacySpec
from slimtune.privacy.step import PrivateStep

__all__ = ["Ledger", "PrivacySpec", "PrivateStep", "example_losses"]
