"""What the tables read of docstrings: every method of slimtune has all of it, and a lack is told."""
import sys
from types import ModuleType

import pytest

from slimtune.core import Add
from slimtune.recipe.entry import entry, lacks
from slimtune.testing.tables import own

WHOLE = '''Name: what it trains.

    y <- y + b,    b = 0

Source: {source}
behind it.
'''
FORM = 'Doe and Roe, 2024, "A Title: of\nTwo Lines", arXiv 2401.01234, eq. 1.'


@pytest.mark.parametrize("name", own())
def test_every_method_says_what_the_tables_need(name: str):
    missing = lacks(name, own()[name])
    assert not missing, "the tables of methods are made from docstrings:\n" + "\n".join(missing)


@pytest.fixture
def method(monkeypatch):
    """A method by the docstrings of its module and its class."""

    def make(module: str, about: str | None) -> type[Add]:
        monkeypatch.setitem(sys.modules, "toy", ModuleType("toy", module))
        return type("Toy", (Add,), {"__doc__": about, "__module__": "toy"})

    return make


def test_all_parts_are_read(method):
    about = "A class.\n\n    Trains 2 (m + min(d, f)) numbers a site: 12 on BERT-base.\n"
    cls = method(WHOLE.format(source=FORM), about)
    found = entry("toy", cls)
    assert (found.trains, found.formula) == ("what it trains", "2 (m + min(d, f)) a site")
    assert (found.paper, found.title) == ("Doe and Roe, 2024, arXiv 2401.01234", "A Title: of Two Lines")
    assert (found.equation, found.link) == ("y <- y + b,    b = 0", "https://arxiv.org/abs/2401.01234")
    assert lacks("toy", cls) == []


@pytest.mark.parametrize(("source", "number"), [
    ('the baseline of every paper here; Doe et al., 2019, "T", arXiv 1810.04805, section 3.', "arXiv 1810.04805"),
    ('the baseline of Doe et al., 2019, "T", arXiv 1810.04805; Roe, 2014, arXiv 1411.1792.', "arXiv 1810.04805"),
    ('Doe et al., 2019, "T", arXiv 1810.04805; Roe, 2020, "U", arXiv 2001.00001.', "arXiv 1810.04805"),
    ('Doe et al., 2019, "T" (Tee), doi 10.18653/v1/N19-1423.', "doi 10.18653/v1/N19-1423")])
@pytest.mark.parametrize("before", ["", "b is small. "])
def test_the_first_paper_counts(method, source: str, number: str, before: str):
    text = WHOLE.replace("Source:", before + "Source:").format(source=source)
    found = entry("toy", method(text, None))
    assert (found.authors, found.year, found.title, found.number) == ("Doe et al.", "2019", "T", number)


@pytest.mark.parametrize(("module", "about", "said"), [
    (WHOLE.replace("Name: what", "What"), "Trains d numbers.", "'Name: what it trains.'"),
    (WHOLE.replace("it trains.", "it trains"), "Trains d numbers.", "'Name: what it trains.'"),
    (WHOLE.replace("    y", "y"), "Trains d numbers.", "no indented equation"),
    (WHOLE.replace("Source:", "See"), "Trains d numbers.", "no 'Source: Author et al., year, ...'"),
    (WHOLE, "It trains d numbers.", "no sentence 'Trains <formula> numbers <a site>: ...'"),
    (WHOLE, None, "no sentence"),
    (WHOLE, f"Trains {'d + ' * 30}d numbers.", "has more than 100 characters")])
def test_a_lack_is_advice_to_the_author(method, module: str, about: str | None, said: str):
    missing = lacks("toy", method(module.format(source=FORM), about))
    assert any(said in line for line in missing), missing
    assert all(line.startswith("toy: ") for line in missing)


def test_a_source_without_title_or_number_is_told(method):
    missing = lacks("toy", method(WHOLE.format(source="Doe et al., 2019, section 3."), "Trains d numbers."))
    assert [("title" in line, "arXiv" in line) for line in missing] == [(True, False), (False, True)]


def test_a_method_without_any_docstring_still_has_a_row(method):
    cls = method("", None)
    found = entry("toy", cls)
    assert (found.name, found.primitive, found.paper, found.link, found.formula) == ("toy", "add", "", "", "")
    assert len(lacks("toy", cls)) == 6
