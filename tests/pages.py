"""What a page defines, for the tests: imports, functions, classes and plain constants; no cell is run."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

BOOK = Path(__file__).resolve().parents[1] / "book"


def code_cells(name: str) -> list[str]:
    cells = json.loads((BOOK / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def markdown(path):
    """The prose of a page, as one text."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def _is_constant(node: ast.stmt) -> bool:
    if not (isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets)):
        return False
    try:
        ast.literal_eval(node.value)
    except ValueError:
        return False
    return True


def page(name: str) -> SimpleNamespace:
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    nodes = [
        node
        for node in ast.parse("\n".join(code_cells(name))).body
        if isinstance(node, kept) or _is_constant(node)
    ]
    names: dict[str, object] = {}
    exec(compile(ast.Module(nodes, []), f"{name}.ipynb", "exec"), names)
    return SimpleNamespace(**names)
