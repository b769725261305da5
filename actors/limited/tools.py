"""The tools that ship, and how a limited process runs them."""

from __future__ import annotations

import ast
import operator
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from actors.errors import ToolError
from actors.loading import Caller, find

OUTPUT_BYTES = 1 << 16
"""More than this of a program's output is not read; the program is killed."""

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def toolbox(tools: dict[str, str]) -> Callable[[str, list[Any] | dict[str, Any]], str]:
    """The handler of a limited process: (name, arguments) to the tool's output.

    Raises `LoadError` for a tool that cannot be loaded.
    """
    functions = {
        name: find(path, f"rollout.environment.arguments.tools.{name}") for name, path in tools.items()
    }
    caller = Caller()

    def use(name: str, arguments: list[Any] | dict[str, Any]) -> str:
        if name not in functions:
            raise ToolError(f"no tool {name!r}, there are {', '.join(functions)}")
        if isinstance(arguments, dict):
            return str(caller(functions[name], **arguments))
        return str(caller(functions[name], *arguments))

    return use


def calculator(expression: str) -> str:
    """The value of an arithmetic expression: numbers, `+ - * / // % **` and brackets.

    >>> calculator("2 * (3 + 4)"), calculator("7 / 2"), calculator("6 / 2")
    ('14', '3.5', '3')
    """
    value = _value(ast.parse(expression.strip(), mode="eval").body)
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def python(code: str) -> str:
    """What a Python program prints, errors included, run in an interpreter of its own."""
    program = subprocess.Popen(
        [sys.executable, "-I", "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with program:
        assert program.stdout is not None
        output = program.stdout.read(OUTPUT_BYTES)
        if len(output) == OUTPUT_BYTES:
            program.kill()
    return output.decode(errors="replace")


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
    raise ToolError(f"got {ast.unparse(node)!r}, expected numbers, + - * / // % ** and brackets")
