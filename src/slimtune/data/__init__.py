"""Local tables, sets of the `datasets` library and packaged sets, as tokenised examples; and metrics."""
from slimtune.data.metrics import metrics
from slimtune.data.spec import DataSpec
from slimtune.data.tasks import prepare

__all__ = ["DataSpec", "metrics", "prepare"]
