"""The house: layers import downwards, siblings in methods/ not at all, files and functions stay small."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "slimtune"
LAYERS = [{"errors"}, {"core"}, {"methods", "sparsity"}, {"objectives", "privacy"}, {"io"}, {"data"}, {"train"},
          {"search", "compress"}, {"recipe"}, {"bench"}, {"report", "serve"}, {"cli"}]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted(SRC.rglob("*.py"))
HEAVY = {"transformers", "datasets", "sklearn", "pyarrow", "peft", "adapters", "accelerate", "pandas", "opacus", "onnx",
         "onnxscript", "onnxruntime", "openvino"}


def layer(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Every module of ours that a file imports, wherever in the file, but for typing."""
    tree = ast.parse(path.read_text())
    typing_only = {id(n) for b in ast.walk(tree) if isinstance(b, ast.If) and "TYPE_CHECKING" in ast.unparse(b.test)
                   for s in b.body for n in ast.walk(s)}
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("slimtune"):
            base = node.module or ""
            found += [f"{base}.{a.name}" if base in ("slimtune", "slimtune.methods") else base for a in node.names]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.startswith("slimtune")]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_a_file_imports_only_from_lower_layers(path: Path):
    own = layer(path)
    if own in ("__init__", "__main__"):
        return
    for module in imports(path):
        other = module.split(".")[1] if "." in module else "__init__"
        if own == "testing":
            assert other != "cli", f"{path}: testing imports {module}"
            continue
        assert other != "testing", f"{path}: only tests import testing, not {module}"
        assert other in RANK, f"{path}: {module} is in no layer"
        assert own in RANK, f"{path} is in no layer"
        assert other == own or RANK[other] < RANK[own], f"{path}: {own} imports {module}, which is not below it"


@pytest.mark.parametrize("path", sorted((SRC / "methods").glob("*.py")), ids=lambda p: p.name)
def test_methods_do_not_import_each_other(path: Path):
    if path.name != "__init__.py":
        assert not [m for m in imports(path) if m.startswith("slimtune.methods")]


def test_a_core_file_is_not_in_a_cycle():
    files = [p for p in (SRC / "core").glob("*.py") if p.stem != "__init__"]
    graph = {f"slimtune.core.{p.stem}": [m for m in imports(p) if m != "slimtune.core"] for p in files}

    def reach(module: str, seen: set[str]) -> set[str]:
        for other in graph.get(module, []):
            if other not in seen:
                seen.add(other)
                reach(other, seen)
        return seen

    assert not [m for m in graph if m in reach(m, set())]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_files_and_functions_are_small(path: Path):
    text = path.read_text()
    assert text.count("\n") <= 300, f"{path} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0  # type: ignore
            assert (node.end_lineno or 0) - node.lineno + 1 - doc <= 40, f"{path}: {node.name} is too long"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_heavy_packages_are_imported_where_they_are_used(path: Path):
    """train/ subclasses transformers' Trainer and is itself imported where it is used; nothing else is so heavy."""
    if layer(path) == "train":
        return
    for node in ast.parse(path.read_text()).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
        assert not {n.split(".")[0] for n in names} & HEAVY, f"{path}: {names} at the top of the file"


def test_importing_slimtune_imports_torch_and_nothing_else_heavy():
    asked_for = {"slimtune.sparsity.wanda"}  # a criterion is imported when one is named
    code = f"import slimtune, slimtune.cli.main, sys; print(sorted({HEAVY | asked_for!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
