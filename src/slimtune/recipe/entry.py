"""entry: what a method's docstrings say of it, for the tables of the command line and of the documents.

    module:  'Name: what it trains.', the equation indented, and
             'Source: Author et al., year, "Title", arXiv NNNN.NNNNN, eq. N.'
    class:   a sentence 'Trains <formula> numbers <a site>: ...'
"""
import re
import sys
from dataclasses import dataclass

from slimtune.methods import Method, registered

LONGEST = 100
_SOURCE = re.compile(r"""(?:the\ baseline\ of\ (?:[^;]*;\ )??)?(?P<authors>[^;"]+?),\ (?P<year>(?:19|20)\d\d)\b
                         (?:,\ "(?P<title>[^"]+)")?
                         (?:.*?\barXiv\ (?P<arxiv>\d{4}\.\d{4,5})|.*?\bdoi\ (?P<doi>10\.\S+\w))?""", re.VERBOSE)
_ADVICE = {
    "trains": "the module docstring's first line should read 'Name: what it trains.'",
    "equation": "the module docstring has no indented equation",
    "authors": "the module docstring has no 'Source: Author et al., year, ...'",
    "title": "its Source should name the paper's title in double quotes behind the year",
    "number": "its Source should name 'arXiv NNNN.NNNNN', or 'doi 10....' where there is none",
    "formula": "the class docstring has no sentence 'Trains <formula> numbers <a site>: ...'; what its letters "
               "stand for goes behind",
}


@dataclass(frozen=True)
class Entry:
    """A method as the tables show it; a part that its docstrings lack is empty.

    trains: in words; formula: how many numbers; number: the paper's, as 'arXiv 2106.09685'.
    """

    name: str
    primitive: str
    trains: str
    formula: str
    equation: str
    authors: str
    year: str
    title: str
    number: str

    @property
    def who(self) -> str:
        """The authors and the year."""
        return ", ".join(part for part in (self.authors, self.year) if part)

    @property
    def paper(self) -> str:
        """Who and when, and the paper's number."""
        return ", ".join(part for part in (self.who, self.number) if part)

    @property
    def link(self) -> str:
        """The paper's address, or an empty one."""
        kind, _, number = self.number.partition(" ")
        return {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}[kind] + number if number else ""


def catalogue() -> list[Entry]:
    """Every registered method, also those of third parties, sorted by name.

    Example:
        >>> lora = next(e for e in catalogue() if e.name == "lora")
        >>> lora.paper, lora.formula
        ('Hu et al., 2021, arXiv 2106.09685', 'r (d_in + d_out) a site')
    """
    return [entry(name, cls) for name, cls in registered().items()]


def entry(name: str, cls: type[Method]) -> Entry:
    """One method, by its name."""
    about = getattr(sys.modules.get(cls.__module__), "__doc__", None) or ""
    stated = (re.search(r"(?:^|[.;] )Source: (.+)", paragraph) for paragraph in _paragraphs(about))
    source = next((_SOURCE.match(found[1]) for found in stated if found), None)
    told = {key: value or "" for key, value in source.groupdict().items()} if source else {}
    number = f"arXiv {told['arxiv']}" if told.get("arxiv") else f"doi {told['doi']}" if told.get("doi") else ""
    first = re.match(r"[^\n:]+: (\S[^\n]*)\.\n", about + "\n")
    equation = re.search(r"^ {4}(\S.*)$", about, re.MULTILINE)
    return Entry(name, cls.primitive, first[1] if first else "", _formula(cls.__doc__ or ""),
                 equation[1] if equation else "", told.get("authors", ""), told.get("year", ""),
                 told.get("title", ""), number)


def lacks(name: str, cls: type[Method]) -> list[str]:
    """What a method's docstrings lack for the tables, as advice to its author; empty when all is there."""
    found = entry(name, cls)
    where = f"{cls.__module__}: "
    missing = [where + advice for part, advice in _ADVICE.items() if not getattr(found, part)]
    long = [part for part in ("trains", "formula") if len(getattr(found, part)) > LONGEST]
    return missing + [f"{where}'{getattr(found, part)}' has more than {LONGEST} characters; end the "
                      f"{'first line' if part == 'trains' else 'formula with a colon'} earlier" for part in long]


def _formula(about: str) -> str:
    """What stands behind 'Trains', up to the end of the clause, without the word 'numbers'."""
    for paragraph in _paragraphs(about):
        found = re.search(r"(?:^|[.:;] )Trains (.+?)(?:[:;.](?: |$)|$)", paragraph)
        if found:
            return re.sub(r" numbers?\b", "", found[1])
    return ""


def _paragraphs(text: str) -> list[str]:
    """The paragraphs of a docstring, each on one line."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]

