"""What a merge must keep, whatever the method."""
import torch
from torch import Tensor

from slimtune.core import Delta
from slimtune.testing import output


def check_merge(delta: Delta, inputs: dict[str, Tensor]) -> None:
    """A delta that does something gives the same output merged, and unmerged the same bits."""
    model = delta.model
    own = output(model, inputs)
    delta.merge()
    torch.testing.assert_close(output(model, inputs), own)
    delta.unmerge()
    assert torch.equal(output(model, inputs), own)
    with delta.disabled():
        assert not torch.allclose(output(model, inputs), own)
