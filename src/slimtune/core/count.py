"""Counts, always apart: what a method adds, the norms and the head it trains, and what it stores."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Count:
    """Numbers of one delta.

    adapter: the method's own trainable numbers; norms, head: trained beside it;
    trainable: the three together; stored: what its file holds (a reparametrisation is dropped);
    backbone: the pretrained model without head.

    Example:
        >>> count = Count(adapter=294_912, norms=0, head=1_538, stored=296_450, backbone=109_482_240)
        >>> count.trainable, f"{count.percent:.3f} %"
        (296450, '0.269 %')
    """

    adapter: int
    norms: int
    head: int
    stored: int
    backbone: int

    @property
    def trainable(self) -> int:
        return self.adapter + self.norms + self.head

    @property
    def percent(self) -> float:
        """Adapter and norms in percent of the backbone."""
        return 100 * (self.adapter + self.norms) / max(self.backbone, 1)

    def as_dict(self) -> dict[str, int]:
        return {"adapter": self.adapter, "norms": self.norms, "head": self.head, "trainable": self.trainable,
                "stored": self.stored, "backbone": self.backbone}

    def __str__(self) -> str:
        return (f"adapter {self.adapter:,} + norms {self.norms:,} + head {self.head:,} = {self.trainable:,} trainable "
                f"({self.percent:.3f} % of {self.backbone:,}); stored {self.stored:,}")
