"""The world as a recipe's first stage: its base model, demonstrations and prompts as ordinary files.

After it, the pipeline knows the world only by those files, and by `trueup.world:gold` and its raters where a recipe
names them: the same door as anyone's data.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from trueup.config import Config
from trueup.engine.mesh import Mesh
from trueup.run import Run

WHAT = "writes the built-in world's base model, demonstrations and prompts as ordinary files"
VERSION = 1


class WorldConfig(Config):
    """The built-in world, exported."""

    seed: int = 0
    """Which draw of demonstrations and prompts."""
    demonstrations: int = Field(3000, gt=0)
    preference_prompts: int = Field(3000, gt=0)
    ppo_prompts: int = Field(3000, gt=0)
    heldout_prompts: int = Field(560, gt=0)
    world: str = ""
    """The world's hash; filled in, so that a stage made from another world is made again."""

    def model_post_init(self, _: Any) -> None:
        from trueup.world import world_hash

        object.__setattr__(self, "world", world_hash())


def run_phase(config: WorldConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    from trueup.world import export

    written = {}
    if mesh.is_main:
        written = export(run.folder, seed=config.seed, demonstrations=config.demonstrations,
                         preference_prompts=config.preference_prompts, ppo_prompts=config.ppo_prompts,
                         heldout_prompts=config.heldout_prompts)
    mesh.barrier()
    return {"files": {name: path.name for name, path in written.items()}, "world": config.world}
