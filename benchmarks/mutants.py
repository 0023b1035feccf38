"""Mutants: copies of a file with one small fault each, of the kinds that people make.

A fault is a piece of text in place of another, found by Python's syntax tree, so that all else stays as it was
written. Not touched are annotations, decorators, docstrings and other texts, and what error messages are made of: no
test should have to repeat these.
"""

import ast
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
# Functions and methods that are easily taken for each other.
SIBLINGS = (("min", "max"), ("amin", "amax"), ("any", "all"), ("floor", "ceil"), ("zeros", "ones"), ("sum", "mean"))
SIBLING = {name: other for pair in SIBLINGS for name, other in (pair, pair[::-1])}
NUMBERS = ("int", "float", "Tensor")
# What does not mind in which order it is given its two arguments.
COMMUTATIVE = ("max", "min", "maximum", "minimum", "equal", "gcd", "logical_and", "logical_or")


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        file: The file, relative to the tree.
        line: Its line there, from 1.
        last_line: The last line of what is replaced.
        kind: What sort of fault it is.
        before: What stands there.
        after: What stands there in the mutant.
        statement: The line as a whole, without its indentation, by which a person finds it.
        begin: Where in the file's bytes it begins.
        end: Where it ends.
    """

    file: str
    line: int
    last_line: int
    kind: str
    before: str
    after: str
    statement: str
    begin: int
    end: int

    @property
    def name(self) -> str:
        """Of this fault alone."""
        return f"{self.file}:{self.begin}-{self.end} {self.after}"

    def of(self, source: bytes) -> bytes:
        """The file with the fault."""
        return source[: self.begin] + self.after.encode() + source[self.end :]


def find_mutants(source: str, file: str = "") -> list[Mutant]:
    """All mutants of a file, in the order of its lines.

    Args:
        source: The file's text.
        file: Its name.
    """
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    raw, lines = source.encode(), source.splitlines()
    mutants = {}
    for node, kind, after in _faults(ast.parse(source), None):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        before = raw[begin:end].decode()
        mutant = Mutant(
            file, node.lineno, node.end_lineno, kind, before, after, lines[node.lineno - 1].strip(), begin, end
        )
        mutants[mutant.name] = mutant
    return sorted(mutants.values(), key=lambda mutant: (mutant.begin, mutant.end, mutant.after))


def draw_mutants(root: Path, target: str, number: int, seed: int) -> list[Mutant]:
    """Some mutants of a file or of a folder's files, drawn with equal chances.

    Args:
        root: The tree.
        target: The file or folder, relative to it.
        number: How many; all where there are fewer.
        seed: Of the drawing.
    """
    place = root / target
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    found = [
        mutant for file in files for mutant in find_mutants(file.read_text("utf-8"), file.relative_to(root).as_posix())
    ]
    return random.Random(f"{seed} {target}").sample(found, min(number, len(found)))


Fault = tuple[ast.AST, str, str]


def _faults(node: ast.AST, returns: str | None) -> Iterator[Fault]:
    """Faults of a node and of what lies in it; `returns` is the annotation of the function around it."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        returns = ast.unparse(node.returns) if node.returns else None
    if isinstance(node, ast.expr):
        yield from ((node, kind, f"({ast.unparse(new)})") for kind, new in _of_expression(node))
    elif isinstance(node, ast.stmt):
        yield from ((where, kind, new) for where, kind, new in _of_statement(node, returns))
    for child in _children(node):
        yield from _faults(child, returns)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """What lies in a node and may be mutated."""
    left_out = {"annotation", "returns", "decorator_list"}
    if isinstance(node, ast.Raise) or (isinstance(node, ast.JoinedStr) and sys.version_info < (3, 12)):
        return  # messages; and Python before 3.12 does not say where in an f-string things stand
    if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    for name, value in ast.iter_fields(node):
        if name not in left_out:
            yield from (
                child for child in (value if isinstance(value, list) else [value]) if isinstance(child, ast.AST)
            )


def _of_expression(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """What may stand in an expression's place."""
    if isinstance(node, ast.Constant):
        yield from (("constant", ast.Constant(value)) for value in _other_constants(node.value))
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        for other in COMPARISONS[type(node.ops[0])]:
            yield "comparison", ast.Compare(node.left, [other()], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield "boolean", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield "sign", node.operand
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield "arithmetic", ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
    elif isinstance(node, ast.IfExp):
        yield "condition", ast.IfExp(_negated(node.test), node.body, node.orelse)
    elif isinstance(node, ast.Call):
        yield from _other_calls(node)


def _other_constants(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    return [value + 1, value - 1] if isinstance(value, int | float) else []


def _other_calls(node: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    """A call with arguments exchanged, an argument forgotten, or of a function's sibling."""
    first = node.args[:2]
    called = ast.unparse(node.func).rpartition(".")[2]
    told_apart = len({ast.dump(argument) for argument in first}) == 2 and called not in COMMUTATIVE
    if told_apart and not any(isinstance(argument, ast.Starred) for argument in first):
        yield "swapped arguments", ast.Call(node.func, [*first[::-1], *node.args[2:]], node.keywords)
    for keyword in node.keywords:
        if keyword.arg not in (None, "strict"):  # a `zip` that is right runs no differently without
            left = [other for other in node.keywords if other is not keyword]
            yield "forgotten argument", ast.Call(node.func, node.args, left)
    if isinstance(node.func, ast.Name) and node.func.id in SIBLING:
        yield "sibling", ast.Call(ast.Name(SIBLING[node.func.id]), node.args, node.keywords)
    if isinstance(node.func, ast.Attribute) and node.func.attr in SIBLING:
        yield "sibling", ast.Call(ast.Attribute(node.func.value, SIBLING[node.func.attr]), node.args, node.keywords)


def _of_statement(node: ast.stmt, returns: str | None) -> Iterator[Fault]:
    """What may stand in a statement's place, or in its condition's."""
    if isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
        yield node.test, "condition", f"({ast.unparse(_negated(node.test))})"
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield node, "removed statement", "pass"
    elif isinstance(node, ast.Raise):
        yield node, "removed raise", "pass"
    elif isinstance(node, ast.Continue | ast.Break):
        yield node, "loop", "break" if isinstance(node, ast.Continue) else "continue"
    elif isinstance(node, ast.Return) and node.value is not None and returns in ("bool", *NUMBERS):
        other = _negated(node.value) if returns == "bool" else ast.UnaryOp(ast.USub(), node.value)
        yield node.value, "returned", f"({ast.unparse(other)})"


def _negated(node: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), node)
