"""What tests that start many runs share."""
import gc

import pytest


@pytest.fixture
def quick_gc():
    """accelerate collects garbage at every start, over all of torch: half a second, a hundred times."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
