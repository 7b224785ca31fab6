"""The names that type checkers see are the registry's."""
import ast
from pathlib import Path

from slimtune import methods
from slimtune.testing.tables import own

OTHERS = {"Method", "from_config", "get", "key_of", "names", "register", "to_config"}


def test_the_names_that_are_written_out_are_the_registrys():
    tree = ast.parse(Path(str(methods.__file__)).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    written = {(node.module, alias.name) for node in block.body if isinstance(node, ast.ImportFrom)
               for alias in node.names}
    registry = {(cls.__module__, cls.__name__) for cls in own().values()}
    assert written == registry, f"in methods/__init__.py, if TYPE_CHECKING: add {registry - written}, " \
                                f"take out {written - registry}"
    classes = {name for _, name in registry}
    assert set(methods.__all__) - OTHERS == classes, f"in methods/__init__.py, __all__: add " \
                                                     f"{classes - set(methods.__all__)}"
    assert all(hasattr(methods, name) for name in methods.__all__)
