"""What the documents say is true: their code runs, their files exist."""
import doctest
import importlib
import re
from pathlib import Path

import pytest

from slimtune.testing.tables import own

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGE = ROOT / "src" / "slimtune"
MODULES = [".".join(("slimtune", *p.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
           for p in sorted(PACKAGE.rglob("*.py")) if p.name != "__main__.py"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_in_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(block, str(page), "exec"), scope)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module: str):
    found = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert found.failed == 0


def test_every_method_has_its_test():
    tests = {p.stem.removeprefix("test_") for p in (ROOT / "tests" / "methods").glob("test_*.py")}
    together = {"full", "linear_probe", "bitfit", "norm_tuning"} if "unfreeze" in tests else set()
    assert set(own()) <= tests | together
