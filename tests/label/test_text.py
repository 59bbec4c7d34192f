"""Model output as HTML: Markdown is shown, attacks are text."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from trueup.label.text import CLASSES, LONGEST, TAGS, render

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](https://evil.example/pixel.png)",
    "![x](javascript:alert(1))",
    "[click](javascript:alert(1))",
    '[click](https://evil.example "title\' onmouseover=alert(1)")',
    "<javascript:alert(1)>",
    "<https://evil.example>",
    "[a]: javascript:alert(1)\n[a]",
    "<svg/onload=alert(1)>",
    "<iframe src=//evil.example></iframe>",
    "<style>*{display:none}</style>",
    "</div></section></main><form action=//evil.example><input name=csrf>",
    "<b onclick=alert(1)>x</b>",
    "`` ` <script>alert(1)</script> ``",
    "```html\n<script>alert(1)</script>\n```",
    '```" onclick="alert(1)\nx\n```',
    "| <script>x</script> | b |\n|---|---|\n| <img src=x> | 2 |",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#x3C;script&#x3E;alert(1)&#x3C;/script&#x3E;",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "a\x00<scr\x00ipt>alert(1)</scr\x00ipt>",
    "<!--><script>alert(1)</script>-->",
    "{{ 7 * 7 }} {% raw %}",
    "> " * 500 + "deep",
    "* " * 500 + "deep",
    "[" * 3000 + "x",
]


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.bad: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        known = CLASSES.get(tag, set())
        if tag not in TAGS or any(name != "class" or value not in known for name, value in attrs):
            self.bad.append(self.get_starttag_text())

    def handle_comment(self, data):
        self.bad.append(data)

    def handle_data(self, data):
        self.text += data


def read(text):
    reader = Reader()
    reader.feed(str(render(text)))
    reader.close()
    return reader


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_text(attack):
    assert read(attack).bad == []


def test_what_an_attack_says_is_seen():
    said = "<script>alert(1)</script> <b onclick=x>bold</b>"
    assert read(said).text.strip() == said


def test_markdown_is_shown():
    shown = str(
        render("# Title\n\n**bold** and `code`\n\n```python\nx < 1\n```\n\n1. one\n2. two\n\n|a|b|\n|-|-|\n|1|2|")
    )
    for part in ('<p class="heading">Title</p>', "<strong>bold</strong>", "<code>code</code>", "x &lt; 1"):
        assert part in shown
    assert "<ol>" in shown and '<div class="scroll"><table>' in shown


def test_where_a_link_or_image_would_lead_is_said():
    assert read("see [the *page*](https://a.example/b) ok").text.strip() == "see the page [https://a.example/b] ok"
    assert read("![a cat](https://a.example/c.png)").text.strip() == "[image: a cat https://a.example/c.png]"
    two = read("[a](https://a.example) [b](https://b.example)").text.strip()
    assert two == "a [https://a.example] b [https://b.example]"


def test_what_would_turn_or_hide_the_text_is_seen():
    assert "\u202e" not in render("abc\u202edef") and "\ufffd" in render("abc\u202edef")
    assert "␛" in render("\x1b[2J") and "\ufffd" in render("\ud800")


def test_a_text_without_end_is_plain():
    shown = str(render("**x** " * LONGEST))
    assert shown.startswith("<pre>**x**") and "<strong>" not in shown
