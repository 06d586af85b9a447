"""The calculator against Python's own evaluation, and against what must be refused."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nanochat.calculator import MAX_CHARS, calculate

# Six such numbers in any sum stay below the limit on magnitude, so that nothing may be refused.
NUMBERS = st.one_of(
    st.integers(0, 99).map(str),
    st.tuples(st.integers(0, 99), st.integers(0, 99)).map(lambda pair: f"{pair[0]}.{pair[1]:02}"),
)


def combine(inner):
    pair = st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%", " + ", " * "]), inner).map("".join)
    return st.one_of(pair, inner.map("({})".format), inner.map("-{}".format), inner.map("+{}".format))


@given(st.recursive(NUMBERS, combine, max_leaves=6))
def test_equals_python_on_sums(expression):
    assume(len(expression) <= MAX_CHARS)
    try:
        expected = repr(eval(expression))  # of our own making
    except ZeroDivisionError:
        expected = None
    assert calculate(expression) == expected


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("2+3*4", "14"),
        (" (1 + 2) * -3 ", "-9"),
        ("84 / 7", "12.0"),
        ("84 // 7", "12"),
        ("17 % 5", "2"),
        ("0.1+0.2", "0.30000000000000004"),
        ("1,200 * 3", "3600"),
        ("1,234,567+1", "1234568"),
        (".5*2", "1.0"),
        ("'strawberry'.count('r')", "3"),
        ('"strawberry".count("rr")', "1"),
        ("\"don't\".count('t')", "1"),
        ("'straße'.count('ß')", "1"),
        ("''.count('a')", "0"),
        ("'ab'.count('')", "3"),
    ],
)
def test_understands(expression, result):
    assert calculate(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        *[
            "",
            " ",
            "1+",
            "+",
            "1/0",
            "1//0",
            "1%0",
            "0.0/0",
            "()",
            "1 2",
            "(1,2)",
            "1,23",
            "12,34 + 1",
            "2**3",
            "9**9**9",
        ],
        *[
            "1_000",
            "0x10",
            "1e3",
            "1j",
            "1if 1else 2",
            "x",
            "None",
            "True",
            "a+b",
            "lambda: 1",
            "012",
            "1(2)",
            "1..real",
        ],
        *["__import__('os').system('true')", "'a'*1000", "'a'.count", "'a'.count()", "'a'.count('a', 0)"],
        *["'a'.upper()", "'a'.count('a').count('b')", "f'{1}'.count('1')", "'\\x61'.count('a')", "'a\n'.count('a')"],
        *["b'a'.count(b'a')", "'a' 'b'.count('a')", "('a').count('a')", "\ud800", "١+١", "²", "1\n+1", "1\0", "1#2"],
        *["9" * 200, "9" * 20 + "*1", "*".join(["99999"] * 30), "(" * 100 + "1" + ")" * 99],
        *["-" * 250 + "x", "[1]*3", "1<2", "1@2", "~1", "1;2", "1:=2", "1" + "+1" * 5000, "(" * 10**6],
    ],
)
def test_refuses(expression):
    assert calculate(expression) is None


@pytest.mark.parametrize("expression", ["-" * 255 + "1", "(" * 127 + "1" + ")" * 127, "1" + "+1" * 127])
def test_depth_is_no_crash(expression):
    assert calculate(expression) in (None, "-1", "1", "128")


@given(st.text(max_size=60) | st.text("0123456789+-*/%(). ,'\"count", max_size=60))
def test_never_raises(text):
    result = calculate(text)
    assert result is None or isinstance(result, str)
