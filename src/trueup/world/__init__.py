"""The built-in world: questions whose answers have a known, true ("gold") score, and a small base model.
`interface` says what a world is made of, and reads those that others wrote; `starter` is a small one to begin from.

    prompts(split, n, seed)       sft, preference, ppo, reward_heldout, heldout
    demonstrations(n, seed)       imperfect, for SFT
    gold()                        the true score, a Scorer
    raters(name, seed)            simulated people, Judges
    auditors(n, seed)             others of the same kind, to audit what was trained on the raters' comparisons
    base_path()                   the folder of the shipped base model
    export(folder)                ordinary JSONL files
    source_hash(module)           of any module that a config names
    world_hash()                  what the committed FROZEN file must hold

Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from trueup.named import module_hash
from trueup.records import Preference, UserError, write_jsonl
from trueup.world import interface
from trueup.world.auditors import auditors
from trueup.world.demos import demonstrations
from trueup.world.gold import GoldScorer, gold, gold_of
from trueup.world.raters import RATERS, raters
from trueup.world.tasks import CATEGORIES, SPLITS, prompts

__all__ = [
    "ASSETS",
    "CATEGORIES",
    "FROZEN",
    "RATERS",
    "SPLITS",
    "GoldScorer",
    "auditors",
    "base_path",
    "demonstrations",
    "export",
    "gold",
    "gold_of",
    "prompts",
    "raters",
    "source_hash",
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


def source_hash(module: str) -> str:
    """The hash of a module's source; of the whole built-in world, its weights included, for that and its modules."""
    return world_hash() if module.startswith(interface.BUILT_IN) else module_hash(module)


def export(
    folder: str | Path,
    *,
    demos: int = 3000,
    per_split: int = 1000,
    heldout: int = 500,
    preferences: Iterable[Preference] | None = None,
    seed: int = 0,
    world: int = 0,
    name: str = interface.BUILT_IN,
) -> dict[str, int]:
    """Writes a world as ordinary JSONL: demonstrations, prompts of every split (see `interface.export`), and the given
    preferences (`prompt`, `chosen`, `rejected`). Returns the rows of each file."""
    folder = Path(folder)
    found = interface.load_world(name)
    rows = interface.export(folder, found, demos=demos, per_split=per_split, heldout=heldout, seed=seed, draw=world)
    if preferences is not None:
        table = [
            {
                "prompt": [dict(m) for m in p.prompt.messages],
                "category": p.prompt.category,
                "chosen": [{"role": "assistant", "content": p.chosen.text}],
                "rejected": [{"role": "assistant", "content": p.rejected.text}],
                "label": p.label,
                "rater": p.rater,
            }
            for p in preferences
        ]
        write_jsonl(folder / "comparisons.jsonl", table)
        rows["comparisons.jsonl"] = len(table)
    return rows
