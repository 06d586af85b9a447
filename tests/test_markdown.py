"""Markdown to HTML: what it shows, what it never lets through, and how long it takes at worst."""

import html
import re
import time
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat import markdown
from nanochat.markdown import render_markdown

EVIL = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<iframe src=javascript:alert(1)></iframe>",
    '<a href="javascript:alert(1)">x</a>',
    "<style>*{background:url(//evil.example)}</style>",
    '<form action="//evil.example"><button>go</button></form>',
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](&#x6A&#x61vascript:alert(1))",
    "[x](<javascript:alert(1)>)",
    "[x](vbscript:msgbox(1))",
    "[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "[x](file:///etc/passwd)",
    "[x](//evil.example)",
    "[x](/stats)",
    "[x]: javascript:alert(1)\n\n[x]",
    "<javascript:alert(1)>",
    "![x](javascript:alert(1))",
    "![x](http://evil.example/pixel.png)",
    "![x](data:image/svg+xml,<svg onload=alert(1)>)",
    '![" onerror="alert(1)](http://a.example/"onerror="alert(1))',
    "[x](http://a.example/'onmouseover='alert(1))",
    '[x](http://a.example "title" onclick=alert(1)")',
    '[a](http://a.example "\\" onclick=alert(1) x=\\"")',
    '``` "><img src=x onerror=alert(1)>\ncode\n```',
    '```python" onclick="alert(1)\ncode\n```',
    "```html\n<script>alert(1)</script>\n```",
    "`<script>alert(1)</script>`",
    '| a |\n|:-:"onclick="alert(1)|\n| <script>alert(1)</script> |',
    "# <img src=x onerror=alert(1)>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--><img src=1 onerror=alert(1)>'>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "\x00<script\x00>alert(1)</script>",
    "<a\u2028href=javascript:alert(1)>x</a>",
]


class Audit(HTMLParser):
    """Fails on anything but the tags and attributes that are known to be harmless."""

    def handle_starttag(self, tag, attrs):
        assert tag in markdown.TAGS.split(), tag
        for name, value in attrs:
            assert name in {"href", "title", "target", "rel", "class", "start", "align"}, (tag, name)
            if name == "href":
                assert re.match(r"(https?://|mailto:)", value, re.IGNORECASE), value
            if name == "class":
                assert re.fullmatch(r"[a-z0-9+-]+", value), value
        if tag == "a" and "href" in dict(attrs):
            assert dict(attrs)["rel"] == "noopener noreferrer nofollow"
            assert dict(attrs)["target"] == "_blank"


def audit(result):
    Audit().feed(result)


@pytest.mark.parametrize("text", EVIL)
def test_evil_is_harmless(text):
    result = render_markdown(text)
    audit(result)
    assert re.sub("<.*?>", "", result).strip()  # it is shown, not swallowed


def test_the_audit_can_fail():
    for bad in ("<script>", "<a href='javascript:1'>", "<p onclick=1>", "<a href='https://a.example'>"):
        with pytest.raises((AssertionError, KeyError)):
            audit(bad)


@given(st.lists(st.sampled_from([*EVIL, "> ", "- ", "|", "```", "\n", "[", "](", ")", "<", '"', " "]), max_size=8))
def test_mixtures_of_evil_are_harmless(parts):
    audit(render_markdown("".join(parts)))


@given(st.text(max_size=200))
def test_any_text_can_be_rendered(text):
    audit(render_markdown(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("**a** *b* ~~c~~ `d`", "<p><strong>a</strong> <em>b</em> <s>c</s> <code>d</code></p>"),
        ("1 < 2 & 3", "<p>1 &lt; 2 &amp; 3</p>"),
        ("# T", "<h1>T</h1>"),
        ("> q", "<blockquote>\n<p>q</p>\n</blockquote>"),
        ("3. a\n4. b", '<ol start="3">\n<li>a</li>\n<li>b</li>\n</ol>'),
        ("```\n<b>\n```", "<pre><code>&lt;b&gt;\n</code></pre>"),
        ("```nolanguage\nx\n```", "<pre><code>x\n</code></pre>"),
        ("```c++\nx\n```", '<pre><code class="language-c++"><span class="n">x</span>\n</code></pre>'),
        ("```python\n```", '<pre><code class="language-python"></code></pre>'),
        ("half a pair \ud83d", "<p>half a pair \ufffd</p>"),
        (
            "[t](https://a.example 'why')",
            '<p><a href="https://a.example" title="why" target="_blank" rel="noopener noreferrer nofollow">t</a></p>',
        ),
        (
            "![t *u*](https://a.example/i.png)",
            '<p><a href="https://a.example/i.png" target="_blank" rel="noopener noreferrer nofollow">t u</a></p>',
        ),
        (
            "![](https://a.example/i.png)",
            '<p><a href="https://a.example/i.png" target="_blank" rel="noopener noreferrer nofollow">image</a></p>',
        ),
    ],
)
def test_what_it_looks_like(text, expected):
    assert render_markdown(text).strip() == expected


def test_table():
    table = render_markdown("| a | b | c |\n|:--|--:|---|\n| 1 | 2 | 3 |")
    assert '<th align="left">a</th>\n<th align="right">b</th>\n<th>c</th>' in table
    assert '<td align="left">1</td>\n<td align="right">2</td>\n<td>3</td>' in table
    assert "style" not in table


def test_every_language_has_a_lexer():
    for language in markdown.LANGUAGES.split():
        code = render_markdown(f"```{language}\nx = 1  # 'text'\n\n```")
        assert f'<code class="language-{language}">' in code
        assert code.count("\n") >= 2  # blank lines of code are kept


@pytest.mark.parametrize(
    "text",
    ["[" * 3001, "\n" * 4001 + "a", "a" * 40_001, "> " * 20 + "a", "- " * 30 + "a"],
    ids=["brackets", "lines", "characters", "quotes", "lists"],
)
def test_a_text_that_would_take_long_is_shown_as_it_is(text):
    assert html.unescape(render_markdown(text)) == f"<pre>{text}</pre>\n"


@pytest.mark.parametrize("depth", range(1, 25))
def test_nothing_that_is_nested_gets_lost(depth):
    for mark in ("> ", "- ", "1. ", "> - "):
        assert "here" in render_markdown(mark * depth + "here")


N = 32_000
SLOW = {
    "quotes": ">" * N,
    "lazy lines": ">" * 100 + "\n" + "abcdefg\n" * 3990,
    "brackets": "[" * 3000 + "]" * 3000,
    "links": "[a](" * 2900 + "(" * (N // 2),
    "references": "[a][b" * 1500,
    "definitions": "[\n" * 2990,
    "images": "![" * 3000,
    "emphasis": "*a_ " * (N // 4),
    "mixed emphasis": "_*" * (N // 2),
    "backticks": "".join("`" * i + " " for i in range(250)),
    "lists": "- " * (N // 2),
    "deep list": "\n".join("  " * i + "* a" for i in range(150)),
    "entities": "&amp" * (N // 4),
    "angles": "<a " * (N // 3),
    "table": "a|" * (N // 2) + "\n" + "-|" * (N // 2),
    "empty cells": "|" + "a|" * 100 + "\n|" + "-|" * 100 + "\n" + "|\n" * 3900,
    "code": "```cpp\n" + "\n" * 3900 + "\n```",
    "strings": "```python\n" + "f'{" * 3300 + "\n```",
}


@pytest.mark.parametrize("name", SLOW)
def test_no_text_takes_long(name):
    """Without the limits several of these take much longer, and their time grows with the square of the length."""
    start = time.thread_time()
    result = render_markdown(SLOW[name])
    assert time.thread_time() - start < 5  # processor time; about 1 at worst on an idle machine
    audit(result)
