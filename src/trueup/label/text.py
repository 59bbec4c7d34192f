"""What models wrote, as HTML that is safe to show: Markdown and code, no script, no image, no link that acts.

Model output is hostile. markdown-it reads it with HTML off; links and images become text that shows where they would
have led; nh3 then lets through only the tags and the classes named here, so that a mistake in the first does no harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markupsafe import Markup, escape

from trueup.records import visible

TAGS = {
    *("p", "br", "hr", "em", "strong", "s", "code", "pre", "ul", "ol", "li", "blockquote", "span", "div"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}
CLASSES = {"p": {"heading"}, "span": {"url"}, "div": {"scroll"}}
LONGEST = 60_000
"""Characters that are rendered; longer ones are shown as plain text."""

_markdown = MarkdownIt("commonmark", {"html": False, "maxNesting": 20}).enable(["table", "strikethrough"])


def _rule(name: str) -> Any:
    def add(function: Any) -> Any:
        _markdown.add_render_rule(name, function)
        return function

    return add


@_rule("heading_open")
def _heading(*_: Any) -> str:
    """A paragraph in bold: an answer's own headings would break the page's outline for who hears it read."""
    return '<p class="heading">'


@_rule("heading_close")
def _heading_end(*_: Any) -> str:
    return "</p>\n"


@_rule("link_open")
def _link(*_: Any) -> str:
    return "<span>"


@_rule("link_close")
def _link_end(self: RendererHTML, tokens: Sequence[Token], index: int, *_: Any) -> str:
    """The link's text, and after it where it would have led."""
    depth, k = 0, index
    while k >= 0:
        depth += {"link_close": 1, "link_open": -1}.get(tokens[k].type, 0)
        if depth == 0:
            break
        k -= 1
    return f'</span> <span class="url">[{escape(str(tokens[k].attrGet("href") or ""))}]</span>'


@_rule("image")
def _image(self: RendererHTML, tokens: Sequence[Token], index: int, *_: Any) -> str:
    token = tokens[index]
    return f'<span class="url">[image: {escape(token.content)} {escape(str(token.attrGet("src") or ""))}]</span>'


@_rule("table_open")
def _table(*_: Any) -> str:
    return '<div class="scroll"><table>\n'


@_rule("table_close")
def _table_end(*_: Any) -> str:
    return "</table></div>\n"


def render(text: str) -> Markup:
    """HTML of a message or an answer. Control characters and marks that turn the direction of writing are shown as
    characters, not obeyed."""
    shown = visible(text, bidi=False)
    if len(shown) > LONGEST:
        return Markup("<pre>") + escape(shown) + Markup("</pre>")
    cleaned = nh3.clean(
        _markdown.render(shown),
        tags=TAGS,
        attributes={},
        allowed_classes=CLASSES,
        strip_comments=True,
        url_schemes=set(),
    )
    return Markup(cleaned)
