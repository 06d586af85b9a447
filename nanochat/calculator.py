"""
The calculator that the model can call between <|python_start|> and <|python_end|>.

Text written by a model is parsed, never evaluated. Two forms are accepted; everything else gives None.
"""

import ast
import operator
import re

MAX_CHARS = 256  # longer than any expression of the tasks; bounds the parser's work
MAX_MAGNITUDE = 10**18  # of each intermediate result; bounds the work of the arithmetic

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}

STRING = r"""(?:"([^"\\\n]*)"|'([^'\\\n]*)')"""
COUNT = re.compile(rf"{STRING}\.count\({STRING}\)")
ARITHMETIC = re.compile(r"[0-9.+\-*/%() \t]+")
THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")


class _Refused(ValueError):
    pass


def _value(node):
    match node:
        case ast.Constant(value=int() | float() as value):
            pass
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            value = OPERATORS[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in SIGNS:
            value = SIGNS[type(op)](_value(operand))
        case _:
            raise _Refused
    if not abs(value) <= MAX_MAGNITUDE:
        raise _Refused
    return value


def calculate(expression: str) -> str | None:
    """
    The result of `expression` as Python would print it, or None if it is not accepted.

    Accepted are + - * / // % with parentheses, signs, decimals and thousands commas ("1,200 * 3" → "3600"),
    and the count of a string in a string ("'berry'.count('r')" → "2"). Never raises.
    """
    if len(expression) > MAX_CHARS:
        return None
    expression = expression.strip(" \t\n")
    if match := COUNT.fullmatch(expression):
        text, part = match[1] or match[2] or "", match[3] or match[4] or ""
        return str(text.count(part))
    expression = THOUSANDS.sub("", expression)
    if not ARITHMETIC.fullmatch(expression):
        return None
    try:
        return repr(_value(ast.parse(expression, mode="eval").body))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None  # no expression, a division by zero, or nested too deeply for the parser
