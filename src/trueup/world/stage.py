"""A world as a recipe's first stage: its base model, demonstrations and prompts as ordinary files.

After it, the pipeline knows the world only by those files, and by its gold score and its raters where a recipe names
them (`@world:gold`, `@world:raters`): the same door as anyone's data. A world that gives a corpus and no base model
has one pretrained here.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import Field

from trueup.config import Config, display
from trueup.engine.mesh import Mesh
from trueup.faults import told
from trueup.records import UserError
from trueup.run import Run
from trueup.world.build import Pretrain, pretrain_on, save, shape
from trueup.world.interface import BUILT_IN, documents, load_world, world_source_hash

WHAT = "writes the world's model, demonstrations and prompts as files: the same door as your own data"
VERSION = 1


class WorldConfig(Config):
    """A world, exported."""

    name: str = display(BUILT_IN)
    """The world's module; one that others wrote lies beside the current folder, or on PYTHONPATH."""
    seed: int = 0
    """Which draw of demonstrations and prompts."""
    world: int = 0
    """The generator seed: which of the world's own draws of entities, operands and wordings."""
    demonstrations: int = Field(3000, gt=0)
    prompts: int = Field(3000, gt=0)
    """Prompts of each split but the held-out one."""
    heldout: int = Field(560, gt=0)
    pretrain: Pretrain = display(Pretrain())
    """The base model of a world that gives a corpus and no base model."""
    hash: str = ""
    """The world's hash, filled in: a stage made from another world, or from another base model, is made again."""

    def model_post_init(self, _: Any) -> None:
        from trueup.world import world_hash

        object.__setattr__(self, "hash", world_hash() if self.name == BUILT_IN else self._other())

    def _other(self) -> str:
        known = f"{self.name} {world_source_hash(self.name)} {self.pretrain.model_dump_json()}"
        return hashlib.sha256(known.encode()).hexdigest()[:16]


def run_phase(config: WorldConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    from trueup.world import export

    rows = {}
    world = load_world(config.name)
    if mesh.is_main:
        rows = export(
            run.folder,
            demos=config.demonstrations,
            per_split=config.prompts,
            heldout=config.heldout,
            seed=config.seed,
            world=config.world,
            name=config.name,
        )
        run.write("base", lambda folder: base(world, folder, config.pretrain, run.say))
    mesh.barrier()
    return {"rows": rows, "hash": config.hash}


def base(world: ModuleType, folder: Path, settings: Pretrain = Pretrain(), say: Callable[[str], None] = print) -> None:
    """The world's base model, copied or pretrained."""
    if made := base_folder(world):
        shutil.copytree(made, folder, dirs_exist_ok=True)
    else:
        pretrained(world, folder, settings, say)


def pretrained(world: ModuleType, folder: Path, settings: Pretrain, say: Callable[[str], None] = print) -> Path:
    """A base model made from the world's corpus, in `folder`."""
    documents(world, settings.seed, 10)  # a wrong corpus is told now
    said = itertools.count()

    def some(line: str) -> None:
        if next(said) % 10 == 0:
            say(line)

    model, tokenizer = pretrain_on(world.corpus, settings, some)
    save(model, tokenizer, folder)
    return folder


def base_folder(world: ModuleType) -> Path | None:
    """The folder of the world's own base model; None of a world that has its one pretrained."""
    if not hasattr(world, "base_path"):
        return None
    with told(f"world '{world.__name__}': base_path"):
        made = Path(world.base_path())
    if not (made / "config.json").exists():
        raise UserError(f"world '{world.__name__}': base_path gives {made}, which holds no model (no config.json)")
    return made


def base_shape(config: WorldConfig) -> tuple[Any, str | None]:
    """The base model's config, and its folder where it is made already."""
    from transformers import AutoConfig

    made = base_folder(load_world(config.name))
    if made:
        return AutoConfig.from_pretrained(str(made)), str(made)
    return shape(config.pretrain.build, config.pretrain.vocab), None
