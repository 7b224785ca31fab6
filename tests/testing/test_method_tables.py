"""The tables of methods in the documents: of today, and what they say is so."""
from pathlib import Path

import pytest

from slimtune.methods import get
from slimtune.testing import tables

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("page", tables.TABLES, ids=str)
def test_a_table_is_of_today(page: Path):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text == tables.rewritten(text, tables.TABLES[page]()), "run: python -m slimtune.testing.tables"


def test_a_page_keeps_what_is_outside_the_marks(tmp_path):
    before = f"head\n{tables.OPEN}\nold\n{tables.CLOSE}\ntail\n"
    assert tables.rewritten(before, "new\n") == f"head\n{tables.OPEN}\nnew\n{tables.CLOSE}\ntail\n"
    for broken in ("none", before.replace(tables.CLOSE, ""), before + before):
        with pytest.raises(ValueError, match="one pair of marks"):
            tables.rewritten(broken, "new\n")


@pytest.mark.parametrize(("name", "count", "merges"), [
    ("lora", "294,912 (rank 8)", "yes"), ("houlsby", "2,379,264 + 38,400 norms (bottleneck 64)", "no"),
    ("prompt_tuning", "76,800 (length 100)", "no"), ("bitfit", "102,912", "in place"), ("ia3", "55,296", "yes")])
def test_what_a_row_says(name: str, count: str, merges: str):
    assert (tables.counted(get(name)), tables.mergeable(get(name))) == (count, merges)


def test_a_method_that_bert_has_no_place_for_is_counted_elsewhere():
    class Cross(get("lora")):
        sites: tuple[str, ...] = ("cross.attn.q",)

    # twelve cross-attentions of T5-base
    assert tables.counted(Cross) == f"{12 * 8 * (768 + 768):,} (rank 8) on T5-base"
    assert tables.mergeable(Cross) == "yes"
