"""The world as a recipe's first stage: its base model, demonstrations and prompts as ordinary files.

After it, the pipeline knows the world only by those files, and by `trueup.world:gold` and its raters where a recipe
names them: the same door as anyone's data.
"""

from __future__ import annotations

import shutil
from typing import Any

from pydantic import Field

from trueup.config import Config
from trueup.engine.mesh import Mesh
from trueup.run import Run

WHAT = "writes the built-in world's model, demonstrations and prompts as files: the same door as your own data"
VERSION = 1


class WorldConfig(Config):
    """The built-in world, exported."""

    seed: int = 0
    """Which draw of demonstrations and prompts."""
    world: int = 0
    """The generator seed: which of the world's own draws of entities, operands and wordings."""
    demonstrations: int = Field(3000, gt=0)
    prompts: int = Field(3000, gt=0)
    """Prompts of each split but the held-out one."""
    heldout: int = Field(560, gt=0)
    hash: str = ""
    """The world's hash, filled in: a stage made from another world is made again."""

    def model_post_init(self, _: Any) -> None:
        from trueup.world import world_hash

        object.__setattr__(self, "hash", world_hash())


def run_phase(config: WorldConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    from trueup.world import base_path, export

    rows = {}
    if mesh.is_main:
        run.write("base", lambda folder: shutil.copytree(base_path(), folder, dirs_exist_ok=True))
        rows = export(
            run.folder,
            demos=config.demonstrations,
            per_split=config.prompts,
            heldout=config.heldout,
            seed=config.seed,
            world=config.world,
        )
    mesh.barrier()
    return {"rows": rows, "hash": config.hash}
