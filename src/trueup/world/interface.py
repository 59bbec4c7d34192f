"""A world by its name: the built-in one, or a module that somebody else wrote. What a world is made of:

    prompts(split, n, seed, world)     n Prompts of a split (SPLITS), each with a category; fewer where it has no more
    demonstrations(n, seed, world)     n Demonstrations on prompts of the split `sft`
    gold()                             the true score, a Scorer; it may look at the prompt's text and `meta`
    raters(name, seed)                 a Judge by name; it should know the name `pool`; another seed is other people
    auditors(seed)                     if there are any: who audits in place of `pool` under another seed
    corpus(seed)                       an endless stream of documents (texts), from which a base model is pretrained
    base_path()                        in place of `corpus`: the folder of a base model

`seed` is another draw; `world` another division into what training sees and what it does not. The prompts of the
split `heldout` are in no other. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from trueup.faults import told
from trueup.named import MODULE, load_module, module_hash
from trueup.records import Demonstration, Prompt, UserError, write_jsonl, write_text

BUILT_IN = "trueup.world"
SPLITS = ("sft", "preference", "ppo", "reward_heldout", "heldout")
NEEDED = ("prompts", "demonstrations", "gold", "raters")
T = TypeVar("T")


def named_world(name: str) -> str:
    """The name, if it can be one. Raises UserError for anything but a module's name, such as a path."""
    if not MODULE.match(name):
        raise UserError(
            f"world '{name}': expected the name of a Python module, as in name=myworld: a folder or file beside the "
            "current folder, or anywhere on PYTHONPATH"
        )
    return name


def begin(folder: Path) -> Path:
    """A new world in `folder`, a copy of `starter`. Raises UserError where the name is no module's, or is taken."""
    if not folder.name.isidentifier():
        raise UserError(f"{folder}: a world is a Python module: letters, digits and '_' only, such as myworld")
    if folder.exists():
        raise UserError(f"{folder}: is there already, and is left as it is; name another folder")
    source = (Path(__file__).parent / "starter" / "__init__.py").read_text(encoding="utf-8")
    write_text(folder / "__init__.py", source.replace("myworld", folder.name))
    return folder / "__init__.py"


def load_world(name: str) -> ModuleType:
    """The world's module. Raises UserError where it lacks a function of the interface."""
    module = load_module(named_world(name), f"world '{name}': ")
    lacks = [part for part in NEEDED if not callable(getattr(module, part, None))]
    if not callable(getattr(module, "corpus", None)) and not callable(getattr(module, "base_path", None)):
        lacks.append("corpus (or base_path)")
    if lacks:
        raise UserError(f"world '{name}' has no function {', '.join(lacks)}; docs/world.md tells what each one gives")
    return module


def world_source_hash(name: str) -> str:
    """The hash of a world's source. Raises UserError where there is no such module."""
    found = module_hash(named_world(name))
    if not found:
        raise UserError(f"world '{name}': no module of this name beside the current folder, nor on PYTHONPATH")
    return found


def export(
    folder: Path,
    world: ModuleType,
    *,
    demos: int,
    per_split: int,
    heldout: int,
    seed: int,
    draw: int,
) -> dict[str, int]:
    """A world's demonstrations (`messages`) and prompts of every split (`prompt`), with `category` and what else is
    known of a prompt (`meta`), as JSONL. Returns the rows of each file. Raises UserError where the world breaks its
    contract."""
    files: dict[str, list[dict[str, Any]]] = {}
    given: dict[str, list[Prompt]] = {}
    for split in SPLITS:
        n = heldout if split == "heldout" else per_split
        given[split] = _asked(world, "prompts", Prompt, n, split, n, seed, draw)
        files[f"prompts-{split}.jsonl"] = [{"prompt": [dict(m) for m in p.messages], **_about(p)} for p in given[split]]
    trained = {p for split in SPLITS if split != "heldout" for p in given[split]}
    if shared := next((p for p in given["heldout"] if p in trained), None):
        raise UserError(f"world '{world.__name__}': a prompt of split heldout is in another split too: {shared.text!r}")
    shown = _asked(world, "demonstrations", Demonstration, demos, demos, seed, draw)
    files["demonstrations.jsonl"] = [
        {
            "messages": [*map(dict, d.prompt.messages), {"role": "assistant", "content": d.reply}],
            **_about(d.prompt),
        }
        for d in shown
    ]
    for name, table in files.items():
        write_jsonl(folder / name, table)
    return {name: len(table) for name, table in files.items()}


def documents(world: ModuleType, seed: int, most: int) -> Sequence[str]:
    """The first `most` documents of a world's corpus."""
    name = world.__name__
    with told(f"world '{name}': corpus"):
        found = list(islice(world.corpus(seed), most))
    if not found or not all(isinstance(text, str) and text for text in found):
        raise UserError(f"world '{name}': corpus must give texts, got {found[:1]!r}")
    return found


def _about(prompt: Prompt) -> dict[str, Any]:
    meta = {key: value for key, value in prompt.meta.items() if key != "category"}
    return {"category": prompt.category, **({"meta": meta} if meta else {})}


def _asked(world: ModuleType, function: str, kind: type[T], most: int, *arguments: Any) -> list[T]:
    """What a function of the world gives: between one and `most` records of a kind."""
    what = f"world '{world.__name__}': {function}{arguments}"
    with told(what):
        found = list(getattr(world, function)(*arguments))
    if wrong := [one for one in found if not isinstance(one, kind)]:
        raise UserError(f"{what} must give {kind.__name__}s, got {type(wrong[0]).__name__}")
    if not 0 < len(found) <= most:
        raise UserError(f"{what} must give {most} {kind.__name__}s, or fewer where there are no more; got {len(found)}")
    return found
