"""What docs/data.md shows is what the readers read and the plain template writes."""

from __future__ import annotations

from pathlib import Path

from tests.models_made import make_tokenizer
from trueup.data.chat import Chat
from trueup.data.readers import read_demonstrations, read_preferences, read_prompts, read_thumbs
from trueup.records import Prompt

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def indented() -> list[str]:
    return [line[4:] for line in PAGE.read_text().splitlines() if line.startswith("    ") or not line]


def test_every_row_shown_is_read(tmp_path):
    shown = [line for line in indented() if line.startswith("{")]
    assert len(shown) == 10
    for line in shown:
        path = tmp_path / "rows.jsonl"
        path.write_text(line + "\n")
        assert read_prompts(path).records[0].text in ("Hi", "Add.\n\n1 2")
        if '"chosen"' in line:
            (p,) = read_preferences(path).records
            assert (p.prompt, p.chosen.text.strip(), p.rejected.text.strip()) == (Prompt.of("Hi"), "Hello", "Go away")
        elif '"label"' in line:
            (t,) = read_thumbs(path).records
            assert (t.prompt, t.completion.text, t.good) == (Prompt.of("Hi"), "Hello", True)
        elif line != '{"prompt": "Hi"}':
            assert read_demonstrations(path).records[0].reply in ("Hello", "3")


def test_the_plain_template_writes_what_is_shown():
    said = ("You are kind.", "Hi", "Hello", "Who are you?")
    roles = ("system", "user", "assistant", "user")
    chat = Chat(make_tokenizer())
    ids = chat.prompt_ids([{"role": role, "content": text} for role, text in zip(roles, said, strict=True)])
    assert chat.plain and chat.tokenizer.decode(ids) in "\n".join(indented())
