"""
Convert Markdown written by models to HTML that is safe to insert into a page.

Three independent protections: the parser treats raw HTML as text, only http, https and mailto URLs become links, and
the result passes a sanitizer with a short list of tags. Nothing is loaded from other sites: images become links.
"""

import re

import nh3
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

from nanochat.common import encodable

# A text with more of these is shown as plain text: the parser's time grows with the square of their number.
MAX_CHARS = 40_000
MAX_BRACKETS = 3000
MAX_LINES = 4000
MAX_NESTING = 20  # nesting depth of quotes and lists

# Languages that are highlighted: few, because each one runs its regular expressions on untrusted text.
LANGUAGES = """
    bash c c++ console cpp css diff go haskell html ini java javascript js json julia kotlin latex lua makefile
    php pycon py python r ruby rust sh shell sql swift toml ts typescript xml yaml
"""
MAX_CODE = 10_000  # longest block that is highlighted, in characters

ATTRIBUTES = {
    "a": {"href", "title", "target"},
    "code": {"class"},
    "span": {"class"},
    "ol": {"start"},
    "td": {"align"},
    "th": {"align"},
}
TAGS = "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre s span strong table tbody td th thead tr ul"
SCHEMES = {"http", "https", "mailto"}
LINK = re.compile(r"(https?://|mailto:)", re.IGNORECASE)
CLASS = re.compile(r"[a-z0-9]{1,3}|language-[a-z0-9+]{1,20}")


def _fence(self, tokens, index, options, env):
    code, info = tokens[index].content, tokens[index].info.split()
    language = info[0].lower() if info else ""
    if language not in LANGUAGES.split():
        return f"<pre><code>{escapeHtml(code)}</code></pre>\n"
    if len(code) <= MAX_CODE:
        html = highlight(code, get_lexer_by_name(language, stripnl=False, ensurenl=False), HtmlFormatter(nowrap=True))
    else:
        html = escapeHtml(code)
    return f'<pre><code class="language-{language}">{html}</code></pre>\n'


def _image(self, tokens, index, options, env):
    token = tokens[index]
    text = self.renderInlineAsText(token.children or [], options, env)
    return f'<a href="{escapeHtml(token.attrs["src"])}">{escapeHtml(text or "image")}</a>'


def _cell(self, tokens, index, options, env):
    """Alignment as an attribute, because the page's policy forbids style attributes."""
    token = tokens[index]
    style = token.attrs.pop("style", "")
    if style:
        token.attrs["align"] = style.removeprefix("text-align:")
    return self.renderToken(tokens, index, options, env)


def _parser():
    parser = MarkdownIt("js-default", {"html": False, "linkify": False, "maxNesting": MAX_NESTING})
    parser.validateLink = lambda url: bool(LINK.match(url))
    for rule, render in [("fence", _fence), ("image", _image), ("th_open", _cell), ("td_open", _cell)]:
        parser.add_render_rule(rule, render)
    return parser


PARSER = _parser()


def _only_our_classes(tag, attribute, value):
    return value if attribute != "class" or CLASS.fullmatch(value) else None


def render_markdown(text: str) -> str:
    """Sanitized HTML of a Markdown text, in time bounded by the length of the text."""
    text = encodable(text)
    plain = f"<pre>{escapeHtml(text)}</pre>\n"
    if len(text) > MAX_CHARS or text.count("[") > MAX_BRACKETS or text.count("\n") > MAX_LINES:
        return plain
    tokens = PARSER.parse(text)
    if any(token.level >= MAX_NESTING - 1 for token in tokens):  # deeper nesting was left out by the parser
        return plain
    return nh3.clean(
        PARSER.renderer.render(tokens, PARSER.options, {}),
        tags=set(TAGS.split()),
        clean_content_tags={"script", "style"},
        attributes=ATTRIBUTES,
        attribute_filter=_only_our_classes,
        url_schemes=SCHEMES,
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )
