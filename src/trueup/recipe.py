"""A recipe: stages in order, joined by files, each skipped when it is done and its inputs are unchanged.

    name: demo
    seed: 0
    stages:
      sft:    {phase: sft, model: "@data/base", data: "@data/demonstrations.jsonl"}
      reward: {phase: reward, model: "@sft/final", data: comparisons.jsonl}

`@stage/path` names what an earlier stage made, `@run/path` a file of the whole run, `@world:gold` a function of the
world that stage `world` exports. A stage's key is the hash of its
phase and version, its resolved config without display keys, the contents of its input files, and its parents' keys; it
works in `runs/NAME/STAGE-KEY/`. A changed key is a new folder; the code's version is recorded, never keyed.

A stage of phase `rounds` stands for stages that come again. In round k they are named `answers-k`, begin with the keys
of the stage `answers`, and have a seed of their own; from then on `@ppo` is the latest, `@ppo-1` the first, and
`@comparisons*` a list of all:

      refresh:
        phase: rounds
        times: 3                                        # rounds 2, 3 and 4
        stages: {answers: {model: "@ppo/final", against: "@sft/final"}, comparisons: {}, reward: {}, ppo: {}}

Composes; nothing below imports it but `cli`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from rich.markup import escape

from trueup.config import Config, Seed, key_fields, numbers, override, parse, read_yaml
from trueup.named import CALLABLE, hash_path
from trueup.records import UserError, Waiting, write_json
from trueup.run import UNMADE, Run, console, no_room, now, versions
from trueup.track import Kind, check, start
from trueup.world import source_hash

if TYPE_CHECKING:
    from trueup.engine.mesh import Mesh

PHASES = {
    "world": ("trueup.world.stage", "WorldConfig"),
    "sft": ("trueup.phases.sft", "SFTConfig"),
    "generate": ("trueup.phases.generate", "GenerateConfig"),
    "critique": ("trueup.phases.critique", "CritiqueConfig"),
    "judge": ("trueup.phases.judge", "JudgeConfig"),
    "ai-feedback": ("trueup.ai_feedback", "AIFeedbackConfig"),
    "route": ("trueup.phases.route", "RouteConfig"),
    "reward": ("trueup.phases.reward", "RewardConfig"),
    "dpo": ("trueup.phases.dpo", "DPOConfig"),
    "ensemble": ("trueup.ensemble", "EnsembleConfig"),
    "ppo": ("trueup.phases.ppo", "PPOConfig"),
    "best-of-n": ("trueup.phases.best_of_n", "BestOfNConfig"),
    "score": ("trueup.phases.score", "ScoreConfig"),
    "evaluate": ("trueup.evaluate.compare", "EvaluateConfig"),
    "judged": ("trueup.evaluate.judged", "JudgedConfig"),
    "trace": ("trueup.evaluate.trace", "TraceConfig"),
    "best_of": ("trueup.evaluate.best_of", "BestOfConfig"),
}
BUILT_IN = Path(__file__).parent / "recipes"


class Recipe(Config):
    """Stages in order."""

    name: str
    """The run: everything goes into `runs/NAME/`."""
    seed: Seed = 0
    """Given to every stage that names none of its own."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    track: Kind | None = None
    """tensorboard, trackio or wandb: where figures and samples go beside the run's own files."""
    stages: dict[str, dict[str, Any]]
    """Stage name -> its phase and the phase's keys; the phase is the stage's name where none is given."""
    rounds: dict[str, list[str]] = Field(default_factory=dict)
    """Of stages that come again: name -> the names of all, in order. Filled in where rounds are laid out."""


class Rounds(Config):
    """Stages that come again."""

    times: int = Field(gt=0)
    """How many rounds follow the first, which is the stages before."""
    stages: dict[str, dict[str, Any]]
    """In order; each begins with the keys of the stage of its name that came before, and lays these over them."""


@dataclass
class Stage:
    """A stage ready to run: its config parsed, its key known."""

    name: str
    phase: str
    module: Any
    config: Config
    key: str
    folder: Path
    parents: dict[str, str]

    @property
    def done(self) -> bool:
        """Whether it is done, and all that it made is still there."""
        record = manifest(self.folder)
        return record.get("status") == "done" and all((self.folder / name).exists() for name in record.get("made", []))


def load_recipe(source: str | Path | Mapping[str, Any], assignments: Sequence[str] = ()) -> Recipe:
    """A recipe from a file, the name of a built-in one, or data; `stage.key=value` and `seed=1` laid over it."""
    if isinstance(source, Mapping):
        where, data = "recipe", dict(source)
    else:
        path = Path(source)
        if not path.exists() and (BUILT_IN / f"{source}.yaml").exists():
            path = BUILT_IN / f"{source}.yaml"
        if not path.exists():
            built_in = ", ".join(sorted(p.stem for p in BUILT_IN.glob("*.yaml")))
            raise UserError(
                f"{source}: no such recipe; expected a YAML file or one of the built-in recipes: {built_in}"
            )
        where, data = str(path), read_yaml(path)
    stages = data.get("stages")
    if not isinstance(stages, dict) or not stages:
        raise UserError(f"{where}: key 'stages' is missing; expected a mapping of stage names to their keys")
    known = {*Recipe.model_fields}
    full = []
    for text in assignments:
        head = text.split("=")[0].split(".")[0]
        if head not in known and head not in stages:
            raise UserError(
                f"'{text}': no stage or key '{head}'; stages: {', '.join(stages)}; keys: {', '.join(known)}"
            )
        full.append(f"stages.{text}" if head in stages else text)
    recipe = parse(Recipe, numbers(override(data, full)), where)
    if recipe.name in (".", "..") or not re.fullmatch(r"[^/\\\x00-\x1f]+", recipe.name):
        raise UserError(f"{where}: name {recipe.name!r}: expected the name of a folder, without '/'")
    return lay_out(recipe)


def lay_out(recipe: Recipe) -> Recipe:
    """The recipe with its rounds as stages, and references to what comes again made definite."""
    stages: dict[str, dict[str, Any]] = {}
    families: dict[str, list[str]] = {}
    raw: dict[str, dict[str, Any]] = {}
    for name, keys in recipe.stages.items():
        if (keys or {}).get("phase") != "rounds":
            stages[name], raw[name] = _definite(keys, families), dict(keys or {})
            continue
        rounds = parse(Rounds, {k: v for k, v in keys.items() if k != "phase"}, f"stage '{name}'")
        for number in range(2, rounds.times + 2):
            for own, over in rounds.stages.items():
                merged = {"phase": own, **raw.get(own, {}), **(over or {})}
                full = f"{own}-{number}"
                if full in recipe.stages:
                    raise UserError(
                        f"stage '{name}': round {number} of '{own}' would be named '{full}', which is taken"
                    )
                stages[full] = _definite(merged, families)
                families.setdefault(own, [own] if own in raw else []).append(full)
    return recipe.model_copy(update={"stages": stages, "rounds": families})


def _round(name: str, recipe: Recipe) -> int:
    """0 for a stage of the first round, or of none."""
    return next((names.index(name) for names in recipe.rounds.values() if name in names), 0)


def _definite(value: Any, families: Mapping[str, Sequence[str]]) -> Any:
    """`@ppo`, `@ppo-1` and `@comparisons*` as the names of stages; the last becomes a list."""
    if isinstance(value, Mapping):
        return {_definite(k, families): _definite(v, families) for k, v in value.items()}
    if isinstance(value, list):
        laid = [_definite(v, families) for v in value]
        return [x for v in laid for x in (v if isinstance(v, list) else [v])]
    if not isinstance(value, str) or not value.startswith("@"):
        return value
    head, slash, path = value[1:].partition("/")
    if head.endswith("*"):
        return [f"@{name}{slash}{path}" for name in families.get(head[:-1], [head[:-1]])]
    if head.endswith("-1") and head[:-2] in families:
        return f"@{families[head[:-2]][0]}{slash}{path}"
    return f"@{families[head][-1]}{slash}{path}" if head in families else value


def resolve(recipe: Recipe, runs: Path) -> list[Stage]:
    """Every stage with its config, key and folder. Raises UserError before anything runs."""
    stages: dict[str, Stage] = {}
    first = [(name, raw) for name, raw in recipe.stages.items() if not _round(name, recipe)]
    if empty := [key for name, raw in first for key in _unfilled(raw or {}, name)]:
        raise UserError(f"the recipe leaves keys to be filled in: {', '.join(f'{k}=...' for k in empty)}")
    for name, raw in recipe.stages.items():
        if not re.fullmatch(r"[A-Za-z][\w-]*", name) or name == "run":
            raise UserError(f"stage '{name}': a name is letters, digits, '-' and '_', and not 'run'")
        keys = dict(raw or {})
        phase = keys.pop("phase", name)
        if phase not in PHASES:
            raise UserError(f"stage '{name}': unknown phase '{phase}'; known phases: {', '.join(PHASES)}")
        module = importlib.import_module(PHASES[phase][0])
        cls: type[Config] = getattr(module, PHASES[phase][1])
        if "seed" in cls.model_fields:
            keys.setdefault("seed", recipe.seed + _round(name, recipe))
        parents: dict[str, str] = {}
        config = parse(cls, _references(keys, name, stages, parents, runs / recipe.name), f"stage '{name}'")
        key = stage_key(phase, module.VERSION, config, stages)
        stages[name] = Stage(name, phase, module, config, key, runs / recipe.name / f"{name}-{key}", parents)
    return list(stages.values())


def _unfilled(value: Any, path: str) -> list[str]:
    """The dotted keys that still hold '???'."""
    if isinstance(value, Mapping):
        return [found for k, v in value.items() for found in _unfilled(v, f"{path}.{k}")]
    return [path] if value == "???" else []


def _references(value: Any, name: str, stages: Mapping[str, Stage], parents: dict[str, str], run: Path) -> Any:
    """`@stage/path` turned into a path of that stage's folder, in values and in the keys of weighted sums."""

    def refer(inner: Any) -> Any:
        return _references(inner, name, stages, parents, run)

    if isinstance(value, Mapping):
        return {refer(k): refer(v) for k, v in value.items()}
    if isinstance(value, list):
        return [refer(v) for v in value]
    if not isinstance(value, str) or not value.startswith("@"):
        return value
    parent, _, path = value[1:].partition("/")
    if ":" in parent:
        return _of_world(value, name, stages)
    if parent == "run":
        return str(run / path)
    if parent not in stages:
        raise UserError(f"stage '{name}': '{value}' names no earlier stage; earlier: {', '.join(stages) or 'none'}")
    parents[parent] = stages[parent].key
    return str(stages[parent].folder / path) if path else str(stages[parent].folder)


def _of_world(value: str, name: str, stages: Mapping[str, Stage]) -> str:
    """`@world:gold`, a function of the world that a stage exports, as `module:gold`."""
    stage, _, function = value[1:].partition(":")
    worlds = [other for other in stages.values() if other.phase == "world"]
    if stage not in {other.name for other in worlds}:
        known = ", ".join(other.name for other in worlds) or "none"
        raise UserError(f"stage '{name}': '{value}' names no earlier stage of phase world; of that phase: {known}")
    return f"{stages[stage].config.name}:{function}"  # type: ignore[attr-defined]


def stage_key(phase: str, version: int, config: Config, stages: Mapping[str, Stage]) -> str:
    """Ten hex digits of the hash of what decides the stage's result."""

    def content(value: str) -> str:
        for stage in stages.values():  # what another stage made is known by that stage's key
            if value == str(stage.folder) or value.startswith(f"{stage.folder}/"):
                return f"@{stage.key}{value[len(str(stage.folder)) :]}"
        if CALLABLE.match(value):
            return f"{value} {source_hash(value.partition(':')[0])}"
        if value.endswith(".sqlite"):  # a cache that the stage itself adds to: known by its name
            return value
        return hash_path(Path(value)) if value and Path(value).exists() else value

    text = json.dumps([phase, version, key_fields(config, content)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def run_recipe(recipe: Recipe, runs: Path) -> list[Stage]:
    """Runs what is not done yet, in order. Interrupted, the same call goes on from the last checkpoint."""
    from trueup.engine.mesh import Mesh

    mesh = Mesh.from_env(recipe.device)
    stages = resolve(recipe, runs)
    if recipe.track and mesh.is_main:
        check(recipe.track)

    def record() -> None:
        write_json(
            runs / recipe.name / "recipe.json",
            {"recipe": recipe.model_dump(), "stages": finished(runs / recipe.name, stages)},
        )

    for number, stage in enumerate(stages, 1):
        if mesh.is_main:
            head = f"[bold]{number}/{len(stages)} {stage.name}[/bold]"
            if stage.done:
                console.print(f"{head}  done before, unchanged: [dim]{escape(str(stage.folder))}[/dim]")
                record()
            else:
                again = " (done before, but what it made is gone)" if manifest(stage.folder).get("made") else ""
                console.print(f"{head}  {stage.module.WHAT}{again}")
        if not stage.done:
            run_stage(stage, mesh, record, recipe.track)
        mesh.barrier()
    return stages


def finished(run: Path, stages: Sequence[Stage]) -> dict[str, str]:
    """Stage name -> folder: what earlier recipes of this name have finished, and these stages. So stages that are run
    one by one under a name make one run, and one that fails hides none."""
    path = run / "recipe.json"
    before = json.loads(path.read_text(encoding="utf-8"))["stages"] if path.exists() else {}
    new = {stage.name: stage.folder.name for stage in stages}
    kept = {n: f for n, f in before.items() if n not in new and manifest(run / f).get("status") == "done"}
    return kept | new


def run_stage(stage: Stage, mesh: Mesh, record: Callable[[], None], track: Kind | None = None) -> None:
    """Runs it in its folder. Nothing is written, nor `record` called, before its inputs are read: a mistake in them
    leaves no trace, and hides nothing that was made before."""
    before = manifest(stage.folder)
    now_running = {
        "phase": stage.phase,
        "name": stage.name,
        "key": stage.key,
        "status": "running",
        "parents": stage.parents,
        "started": before.get("started", now()),
        "seconds": before.get("seconds", 0.0),
        "versions": versions(),
        "processes": mesh.world,
        "device": str(mesh.device),
    }

    def begin() -> None:
        write_json(
            stage.folder / "config.json",
            {
                "phase": stage.phase,
                "name": stage.name,
                "key": stage.key,
                "directory": str(Path.cwd()),  # where the paths in the config begin
                "config": json.loads(stage.config.model_dump_json()),
            },
        )
        write_json(stage.folder / "manifest.json", now_running)
        record()
        if track:
            config = stage.config.model_dump(mode="json")
            run.tracker = start(track, stage.folder, stage=stage.name, config=config, first=run.first)

    with Run(stage.folder, name=stage.name, main=mesh.is_main, begin=begin) as run:
        mesh.barrier()  # the others read what the main process has tidied up
        began = time.monotonic()
        try:
            results = stage.module.run_phase(stage.config, run, mesh)
        except BaseException as error:
            if mesh.is_main and run.begun:
                now_running["seconds"] += time.monotonic() - began
                stopped = {"status": "stopped", "error": f"{type(error).__name__}: {error}"}
                how = {"status": "waiting", "for": str(error)} if isinstance(error, Waiting) else stopped
                with contextlib.suppress(OSError):  # on a full disk the record stays as it was, "running"
                    write_json(stage.folder / "manifest.json", {**now_running, **how})
            if isinstance(error, FloatingPointError):
                raise UserError(f"stage '{stage.name}', step {run.step}: {error}; {run.stands()}") from None
            if number := no_room(error):
                raise UserError(f"{stage.folder}: {os.strerror(number)}; {run.stands()}") from None
            raise
        now_running["seconds"] += time.monotonic() - began
        run.results(results)
        if mesh.is_main:
            made = sorted(p.name for p in stage.folder.iterdir() if not UNMADE.match(p.name))
            done = {**now_running, "status": "done", "finished": now(), "made": made}
            write_json(stage.folder / "manifest.json", done)
        run.clear_checkpoints()
