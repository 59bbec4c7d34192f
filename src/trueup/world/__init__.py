"""The built-in world: questions whose answers have a known, true ("gold") score, and a small base model.

    prompts(split, n, seed)       sft, preference, ppo, reward_heldout, heldout
    demonstrations(n, seed)       imperfect, for SFT
    gold()                        the true score, a Scorer
    raters(name, seed)            simulated people, Judges
    base_path()                   the folder of the shipped base model
    export(folder)                ordinary JSONL files
    world_hash()                  what the committed FROZEN file must hold

Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from trueup.records import Preference, UserError, write_jsonl
from trueup.world.demos import demonstrations
from trueup.world.gold import GoldScorer, gold, gold_of
from trueup.world.raters import RATERS, raters
from trueup.world.tasks import CATEGORIES, SPLITS, prompts

if TYPE_CHECKING:
    from trueup.records import Prompt

__all__ = [
    "ASSETS",
    "CATEGORIES",
    "FROZEN",
    "RATERS",
    "SPLITS",
    "GoldScorer",
    "base_path",
    "demonstrations",
    "export",
    "gold",
    "gold_of",
    "prompts",
    "raters",
    "sources_hash",
    "world_hash",
]

HERE = Path(__file__).parent
ASSETS = HERE / "assets"
FROZEN = HERE / "FROZEN"
# What decides the world's prompts, answers, labels and gold; build.py only makes the weights.
SOURCES = ("vocab.py", "tasks.py", "answers.py", "demos.py", "gold.py", "raters.py", "corpus.py")


def base_path() -> Path:
    """The folder of the shipped base model (Hugging Face layout, tokenizer and chat template beside)."""
    folder = ASSETS / "base"
    if not (folder / "model.safetensors").exists():
        raise UserError(f"the built-in base model is not at {folder}; make it with: trueup world build")
    return folder


def sources_hash() -> str:
    """Sixteen hex digits over the sources that decide the world."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(name.encode() + b"\0" + (HERE / name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def world_hash() -> str:
    """Hash of the sources and of every file of the shipped base model."""
    digest = hashlib.sha256(sources_hash().encode())
    for path in sorted(base_path().iterdir()):
        if path.name != "build.json":
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _prompt_row(prompt: Prompt) -> dict[str, object]:
    return {"prompt": [dict(m) for m in prompt.messages], "category": prompt.category}


def export(
    folder: str | Path,
    *,
    demos: int = 3000,
    per_split: int = 1000,
    heldout: int = 500,
    preferences: Iterable[Preference] | None = None,
    seed: int = 0,
    world: int = 0,
) -> dict[str, int]:
    """Writes the world as ordinary JSONL: demonstrations (`messages`), prompts of every split (`prompt`, `category`),
    and the given preferences (`prompt`, `chosen`, `rejected`). Returns the rows of each file."""
    folder = Path(folder)
    files: dict[str, list[dict[str, object]]] = {
        "demonstrations.jsonl": [
            {
                "messages": [*map(dict, d.prompt.messages), {"role": "assistant", "content": d.reply}],
                "category": d.prompt.category,
            }
            for d in demonstrations(demos, seed, world)
        ]
    }
    for split in SPLITS:
        n = heldout if split == "heldout" else per_split
        files[f"prompts-{split}.jsonl"] = [_prompt_row(p) for p in prompts(split, n, seed, world)]
    if preferences is not None:
        files["comparisons.jsonl"] = [
            {
                **_prompt_row(p.prompt),
                "chosen": [{"role": "assistant", "content": p.chosen.text}],
                "rejected": [{"role": "assistant", "content": p.rejected.text}],
                "label": p.label,
                "rater": p.rater,
            }
            for p in preferences
        ]
    for name, table in files.items():
        write_jsonl(folder / name, table)
    return {name: len(table) for name, table in files.items()}
