from hypothesis import given, settings
from hypothesis import strategies as st

import slimtune
from slimtune.io.peft_layout import endings
from slimtune.io.peft_names import matches, site_patterns
from slimtune.testing import tiny


@settings(max_examples=40, deadline=None)
@given(st.sets(st.sampled_from(range(60)), min_size=1))
def test_endings_name_the_wanted_and_nothing_else(chosen):
    leaves = [f"{b}.{c}" for b in ("x", "y") for c in ("q", "v", "xq")]
    universe = [f"{a}.{i}.{leaf}" for a in ("enc", "dec") for i in range(5) for leaf in leaves]
    wanted = [universe[i] for i in sorted(chosen)]
    ends = endings(wanted, universe)
    assert [p for p in universe if matches(ends, p)] == wanted
    assert len(ends) <= len(wanted)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_site_patterns_name_the_wanted_and_nothing_else(data):
    family = data.draw(st.sampled_from(["bert", "t5", "gpt2", "clip"]))
    anatomy = _anatomy(family)
    wanted = data.draw(st.lists(st.sampled_from(anatomy.sites), min_size=1, unique=True))
    found = anatomy.select(site_patterns(anatomy, wanted))
    assert {s.name for s in found} == {s.name for s in wanted}


_ANATOMIES = {}


def _anatomy(family):
    if family not in _ANATOMIES:
        _ANATOMIES[family] = slimtune.dissect(tiny(family))
    return _ANATOMIES[family]
