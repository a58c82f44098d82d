"""Reading the documentation: tables, quoted messages, code; and what the code itself would say, as patterns."""
import ast
import re
from collections.abc import Iterator
from pathlib import Path

from demo.comfy_path import ROOT

ANYTHING = ".*"
LEAST = 15          # letters of a pattern that are not open: one that is all open would allow every sentence


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def tables(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """(headings, rows) of every table."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        yield head, rows


def quoted(text: str) -> list[str]:
    """The messages that a page shows: its lines that begin with >."""
    return [line[2:] for line in text.splitlines() if line.startswith("> ")]


def code(text: str, language: str) -> list[str]:
    """The blocks of code in this language; those in none where it is empty."""
    return [block for name, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if name == language]


def messages() -> list[re.Pattern]:
    """Every sentence that a user can meet, with what the moment puts in left open: those of WanLiteError, and what a node's validation returns."""
    found = {pattern for folder in ("nodes", "wanlite_model") for path in (ROOT / folder).rglob("*.py") for pattern in _of_file(path)}
    return [re.compile(pattern, re.DOTALL) for pattern in found if len(pattern.replace(ANYTHING, "")) >= LEAST]


def _of_file(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = _assigned(tree.body)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            names = {**constants, **_assigned(list(ast.walk(function)))}
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "WanLiteError":
                    parts = [_pattern(part, names) for part in node.args]
                    yield " ".join(part for part in parts if part)
                elif isinstance(node, ast.Return) and function.name == "validate_inputs" and isinstance(node.value, ast.JoinedStr):
                    yield _pattern(node.value, names)


def _assigned(body: list[ast.AST]) -> dict[str, list[ast.expr]]:
    found: dict[str, list[ast.expr]] = {}
    for node in body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
    return found


def _pattern(node: ast.AST, names: dict[str, list[ast.expr]]) -> str:
    if isinstance(node, ast.Constant):
        return re.escape(str(node.value).strip(" ") if node.value == "" else str(node.value))
    if isinstance(node, ast.JoinedStr):
        return "".join(_pattern(part, {}) if isinstance(part, ast.Constant) else ANYTHING for part in node.values)
    if isinstance(node, ast.BinOp):
        return _pattern(node.left, names) + _pattern(node.right, names)
    if isinstance(node, ast.IfExp):
        return _either([_pattern(node.body, names), _pattern(node.orelse, names)])
    if isinstance(node, ast.Name) and node.id in names:
        return _either([_pattern(value, {name: values for name, values in names.items() if name != node.id}) for value in names[node.id]])
    return ANYTHING


def _either(patterns: list[str]) -> str:
    return ANYTHING if ANYTHING in patterns else f"(?:{'|'.join(dict.fromkeys(patterns))})"
