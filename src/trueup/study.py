"""A study of over-optimization: one recipe, many seeds and conditions, as stages that are run once and kept.

In order: for each seed the recipe's own stages up to the reward model; samples of the start, scored by gold, for best
of n; reward models from fewer comparisons and from turned labels; PPO at each KL coefficient and, the control, on
gold; DPO at each beta, on the proxy's comparisons; every kept version of each policy scored on the same prompts. Then
the rows of all seeds as one Parquet file, the gates, and a report. Stages of a seed share what they have in common,
their keys say what is done, and processes of one thread each work side by side. Composes, as `recipe` does; only `cli`
imports it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from trueup.config import Config, numbers, override, parse, read_yaml
from trueup.evaluate.overoptimization import Gates
from trueup.named import CALLABLE, load_object
from trueup.recipe import Recipe, Stage, finished, load_recipe, manifest, resolve, run_stage
from trueup.records import UserError, write_json
from trueup.run import console

BUILT_IN = Path(__file__).parent / "studies"
ABOUT = b"trueup"
"""Where data.parquet says what it was measured with, and how long each stage took."""
Cell = tuple[int, str]
"""Seed and stage."""


class BestOf(Config):
    """Best of n by the proxy."""

    prompts: int = Field(64, gt=1)
    samples: int = Field(512, gt=0)
    """Answers to each prompt."""
    ns: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class Versions(Config):
    """Versions of the policy, scored."""

    steps: tuple[int, ...] = (5, 10, 15, 20, 25, 30, 40, 50, 60, 70, 85, 100)
    """The steps after which PPO's policy is kept; the last is also how long PPO runs."""
    prompts: int = Field(512, gt=1)
    samples: int = Field(4, gt=0)
    """Answers to each prompt; prompts x samples should be 2048 or more."""


class StudyConfig(Config):
    """A study of over-optimization."""

    name: str = "overoptimization"
    """Everything goes into `runs/NAME/`."""
    gold: str
    """The true score, a scorer: it is watched, and optimized in the control alone."""
    prompts: str
    """Frozen prompts on which everything is scored; `@stage/file` names what a stage of the recipe makes."""
    ppo: str = ""
    """The recipe's PPO stage: it says the start, the proxy, the prompts and every setting; the only one where empty."""
    set: dict[str, dict[str, Any]] = Field({})
    """Keys of the recipe's stages, laid over them: {ppo: {optim: {lr: 2.0e-4}}}."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    """Development on 0 to 7; others confirm what was committed before."""
    kl_coefs: tuple[float, ...] = (0.0, 0.05, 0.25)
    """PPO is run at each; 0 is the one that over-optimizes."""
    default: float | None = 0.25
    """The coefficient at which gold should keep its peak."""
    control: bool = True
    """PPO on gold itself, without a penalty."""
    comparisons: tuple[int, ...] = ()
    """Reward models from so many comparisons, beside the one from all; best of n by each."""
    flips: tuple[float, ...] = ()
    """Reward models from all comparisons, with this share of the labels turned; best of n by each."""
    betas: tuple[float, ...] = ()
    """DPO at each, from the same start on the comparisons that the proxy learned from."""
    dpo: dict[str, Any] = Field({})
    """Keys of these DPO stages: {train: {optim: {lr: 3.0e-4}}}."""
    best_of: BestOf = BestOf()
    versions: Versions = Versions()
    gates: Gates = Gates()


def load_study(recipe: str, path: Path | None, assignments: Sequence[str]) -> StudyConfig:
    """From a file, or the built-in study of a built-in recipe; `key=value` laid over it."""
    if path is None and (BUILT_IN / f"{recipe}.yaml").exists():
        path = BUILT_IN / f"{recipe}.yaml"
    where = str(path) if path else "study"
    study = parse(StudyConfig, numbers(override(read_yaml(path) if path else {}, assignments)), where)
    for key in ("seeds", "kl_coefs", "comparisons", "flips", "betas"):
        if len(set(getattr(study, key))) < len(getattr(study, key)):
            raise UserError(f"{where}: key '{key}': the same value twice: {list(getattr(study, key))}")
    if not study.seeds or not study.kl_coefs or not study.versions.steps:
        raise UserError(f"{where}: seeds, kl_coefs and versions.steps each need a value")
    if 1 not in study.best_of.ns:
        raise UserError(f"{where}: key 'best_of.ns': 1 must be among them, the start itself")
    if study.default is not None and study.default not in study.kl_coefs:
        raise UserError(f"{where}: default ({study.default:g}) is not among kl_coefs {list(study.kl_coefs)}")
    if study.gates.fewer and study.gates.fewer not in study.comparisons:
        raise UserError(
            f"{where}: gates.fewer ({study.gates.fewer}) is not among comparisons {list(study.comparisons)}"
        )
    return study


def name_of(kind: str, value: float) -> str:
    return f"{kind}-{value:g}".replace(".", "_")


def compose(source: str, study: StudyConfig, seed: int) -> Recipe:
    """One seed's recipe: every stage that the study measures for it."""
    recipe = load_recipe(source)
    if unknown := [name for name in study.set if name not in recipe.stages]:
        raise UserError(f"set.{unknown[0]}: no such stage; stages of {source}: {', '.join(recipe.stages)}")
    stages = {name: _laid_over(raw or {}, study.set.get(name, {})) for name, raw in recipe.stages.items()}
    phases = {name: raw.get("phase", name) for name, raw in stages.items()}
    found = [study.ppo] if study.ppo else [name for name, phase in phases.items() if phase == "ppo"]
    if len(found) != 1 or phases.get(found[0]) != "ppo":
        raise UserError(f"{source}: the study needs one PPO stage, named by key 'ppo'; stages: {', '.join(stages)}")
    ends_early = ("held_out", "patience", "watch")
    ppo = {key: value for key, value in stages[found[0]].items() if key not in ("phase", *ends_early)}
    if missing := [key for key in ("model", "scorer", "prompts") if key not in ppo]:
        raise UserError(f"{source}: stage '{found[0]}': key '{missing[0]}' is missing")
    shared = {"sampling": ppo["sampling"]} if "sampling" in ppo else {}
    scored = {"proxy": ppo["scorer"], "gold": study.gold, "prompts": study.prompts, "start": ppo["model"], **shared}
    scored |= {"limit": study.versions.prompts, "samples": study.versions.samples}
    scored |= {"lora": ppo["lora"]} if "lora" in ppo else {}
    best = {"phase": "best_of", "completions": "@gold/completions.jsonl", "ns": list(study.best_of.ns)}
    out: dict[str, dict[str, Any]] = {
        "samples": {"phase": "generate", "model": ppo["model"], "prompts": study.prompts, **shared}
        | {"limit": study.best_of.prompts, "n": study.best_of.samples, "chunk": 4096},
        "gold": {"phase": "score", "completions": "@samples/completions.jsonl", "scorer": study.gold},
        "best_of": {**best, "proxy": ppo["scorer"]},
    }
    for kind, values in (("comparisons", study.comparisons), ("flips", study.flips)):
        for value in values:
            name = name_of(kind, value)
            reward = stages[_reward_stage(source, stages, ppo["scorer"], kind)]
            out[f"reward-{name}"] = {
                **reward,
                "phase": "reward",
                **{"limit" if kind == "comparisons" else "flips": value},
            }
            out[f"best_of-{name}"] = {**best, "proxy": f"@reward-{name}/final"}
    out["versions-start"] = {"phase": "trace", **scored}
    kept = {"phase": "ppo", "steps": max(study.versions.steps), "snapshots": list(study.versions.steps)}
    runs: dict[str, dict[str, Any]] = {
        name_of("kl", coef): {"kl_coef": coef, "adaptive_kl": None} for coef in study.kl_coefs
    }
    if study.control:
        # The critic starts from the proxy, as in the other runs, where PPO has one and the proxy is a reward model.
        model = isinstance(ppo["scorer"], str) and ppo.get("advantage", "gae") == "gae" and ":" not in ppo["scorer"]
        critic = {"critic": ppo.get("critic") or ppo["scorer"]} if model else {}
        runs["on_gold"] = {"kl_coef": 0.0, "adaptive_kl": None, "scorer": study.gold, **critic}
    for name, changes in runs.items():
        out[f"ppo-{name}"] = {**ppo, **kept, **changes}
        out[f"versions-{name}"] = {"phase": "trace", **scored, "training": f"@ppo-{name}"}
    for beta in study.betas:
        data = stages[_reward_stage(source, stages, ppo["scorer"], "betas")].get("data")
        own = {"model": ppo["model"], "data": data, "beta": beta, **shared}
        own |= {"lora": ppo["lora"]} if "lora" in ppo else {}
        out[f"dpo-{name_of('beta', beta)}"] = {"phase": "dpo", **own, **study.dpo}
        out[f"versions-{name_of('beta', beta)}"] = {
            "phase": "trace",
            **scored,
            "training": f"@dpo-{name_of('beta', beta)}",
        }
    if clash := stages.keys() & out.keys():
        raise UserError(f"{source}: the study names a stage of its own '{min(clash)}'; call the recipe's another name")
    needed = _needed(stages, out)
    return recipe.model_copy(
        update={"name": f"{study.name}/seed-{seed}", "seed": seed, "stages": {n: stages[n] for n in needed} | out}
    )


def _laid_over(under: Any, over: Any) -> Any:
    if not isinstance(under, Mapping) or not isinstance(over, Mapping):
        return over
    return {**under, **{k: _laid_over(under.get(k), v) for k, v in over.items()}}


def _reward_stage(source: str, stages: Mapping[str, Any], scorer: Any, kind: str) -> str:
    name = str(scorer)[1:].partition("/")[0] if str(scorer).startswith("@") else ""
    if stages.get(name, {}).get("phase", name) != "reward":
        raise UserError(
            f"{source}: key '{kind}' needs a proxy that a reward stage of the recipe makes; it is {scorer!r}"
        )
    return name


def _needed(stages: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The recipe's stages that `wanted` or its parents refer to, in the recipe's order."""

    def named(value: Any) -> set[str]:
        if isinstance(value, Mapping):
            return {n for pair in value.items() for one in pair for n in named(one)}
        if isinstance(value, list):
            return {n for one in value for n in named(one)}
        return {re.split("[/:]", value[1:])[0]} if isinstance(value, str) and value.startswith("@") else set()

    found, new = set(), named(wanted)
    while new:
        found |= new
        new = {n for name in new for n in named(stages.get(name, {}))} - found
    return [name for name in stages if name in found]


# running


def run_study(source: str, study: StudyConfig, runs: Path, jobs: int, measured: Sequence[Path] = ()) -> Path:
    """Runs what is not done yet, `jobs` stages at a time; writes data, gates and report. The study's folder.
    `measured`: data.parquet of the same study's other seeds, run elsewhere; those seeds are not run here."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("a study shares its stages out itself: start it without torchrun, with --jobs")
    if not study.prompts.startswith("@") and not Path(study.prompts).is_file():
        raise UserError(f"key 'prompts': {study.prompts}: no such file")
    elsewhere, recipes = _split(source, study, measured)
    stages = {seed: {s.name: s for s in resolve(recipe, runs)} for seed, recipe in recipes.items()}
    for of in list(stages.values())[:1]:
        gold = of["gold"].config.scorer  # type: ignore[attr-defined]
        if isinstance(gold, str) and CALLABLE.match(gold):
            load_object(gold)  # a wrong name is told now, not after the reward models
    folder = runs / study.name
    write_json(folder / "study.json", {"recipe": source, "study": study.model_dump(mode="json")})
    for seed, recipe in recipes.items():
        run = runs / recipe.name
        record = {"recipe": recipe.model_dump(), "stages": finished(run, list(stages[seed].values()))}
        write_json(run / "recipe.json", record)
    work(recipes, stages, runs, folder / "logs", jobs)
    here = Measured(rows_of(study, stages), seconds_of(stages)) if stages else None
    conclude(source, study, [*elsewhere, *([here] if here else [])], folder)
    return folder


def _split(source: str, study: StudyConfig, measured: Sequence[Path]) -> tuple[list[Measured], dict[int, Recipe]]:
    """What was measured elsewhere, and the recipe of each seed that was not."""
    elsewhere = read_measured(measured, source, study)
    there = {seed for one in elsewhere for seed in one.seconds}
    return elsewhere, {seed: compose(source, study, seed) for seed in study.seeds if seed not in there}


def due(source: str, study: StudyConfig, runs: Path, measured: Sequence[Path] = ()) -> list[str]:
    """A line for each stage that `run_study` would look at: done or due, and where."""
    lines = []
    for seed, recipe in _split(source, study, measured)[1].items():
        for stage in resolve(recipe, runs):
            lines.append(f"{'done' if stage.done else 'due '}  seed {seed:<5} {stage.name:28} {stage.folder}")
    return lines


def work(
    recipes: Mapping[int, Recipe], stages: Mapping[int, Mapping[str, Stage]], runs: Path, logs: Path, jobs: int
) -> None:
    """Every stage that is not done, as soon as its parents are; in worker processes, each with one thread."""
    todo: list[Cell] = [(seed, name) for seed, of in stages.items() for name, stage in of.items() if not stage.done]
    total = sum(map(len, stages.values()))
    console.print(f"{total} stages, {total - len(todo)} done before", markup=False)
    if not todo:
        return
    logs.mkdir(parents=True, exist_ok=True)
    waiting, running, spent = list(todo), dict[Future[float], Cell](), 0.0
    took: dict[str, list[float]] = {}
    for seed, of in seconds_of(stages).items():
        for name, seconds in of.items():
            if stages[seed][name].done:
                took.setdefault(name, []).append(seconds)
    with workers(jobs) as pool:
        while waiting or running:
            ready = [c for c in waiting if all(stages[c[0]][p].done for p in stages[c[0]][c[1]].parents)]
            for seed, name in ready[: jobs - len(running)]:
                waiting.remove((seed, name))
                log = logs / f"seed-{seed}-{name}.txt"
                running[pool.submit(work_one, recipes[seed], name, runs, log)] = seed, name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                seed, name = running.pop(future)
                try:
                    took.setdefault(name, []).append(future.result())
                except UserError as error:
                    raise UserError(f"seed {seed}, stage '{name}': {error}") from None
                spent += future.result()
                coming = [of for _, of in (*waiting, *running.values())]
                console.print(
                    f"{total - len(coming)}/{total}  seed {seed}  {name:24} {future.result():5.0f} s"
                    f"   {left(coming, took, jobs)}",
                    markup=False,
                )
    console.print(f"{spent / 3600:.2f} core-hours", markup=False)


def left(coming: Sequence[str], took: Mapping[str, Sequence[float]], jobs: int) -> str:
    """How long the stages to come will take: as long as those of their names have. What never ran yet is not known."""
    known = [sum(took[name]) / len(took[name]) for name in coming if name in took]
    return f"{'about' if len(known) == len(coming) else 'at least'} {sum(known) / jobs / 60:.0f} min left"


@contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each. Where the block fails or is interrupted they end at once: stages go on from their
    checkpoints."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in threads}
    os.environ.update(threads)  # what the workers start with: torch reads it when it is loaded
    try:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_alone) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in multiprocessing.active_children():
                    worker.terminate()
                raise
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _alone() -> None:
    """A worker: one thread, and no longer than whoever started it."""
    import torch

    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def work_one(recipe: Recipe, name: str, runs: Path, log: Path) -> float:
    """One stage of a recipe whose parents are done, what it says in a file; seconds."""
    from trueup.engine.mesh import Mesh

    began = time.monotonic()
    sys.stdout.flush()
    with open(log, "a", encoding="utf-8") as file:
        kept = {number: os.dup(number) for number in (1, 2)}
        try:
            for number in kept:
                os.dup2(file.fileno(), number)
            [stage] = [s for s in resolve(recipe, runs) if s.name == name]
            run_stage(stage, Mesh.from_env(recipe.device), record=lambda: None)
        finally:
            sys.stdout.flush()
            for number, copy in kept.items():
                os.dup2(copy, number)
                os.close(copy)
    return time.monotonic() - began


# what was found


@dataclass(frozen=True)
class Measured:
    """`rows`: a row for each seed, kind, condition, point and prompt. `seconds`: of each seed's stages."""

    rows: Any
    seconds: dict[int, dict[str, float]]


def settings_of(source: str, study: StudyConfig) -> dict[str, Any]:
    """What must agree for seeds to be of one study: all but its name, its seeds and its thresholds."""
    return {"recipe": source, **study.model_dump(mode="json", exclude={"name", "seeds", "gates"})}


def read_measured(paths: Sequence[Path], source: str, study: StudyConfig) -> list[Measured]:
    """What other runs of this study wrote as data.parquet. UserError where one is of another study, or holds a seed
    that is not wanted or that another one holds."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    wanted, out = settings_of(source, study), list[Measured]()
    for path in paths:
        try:
            rows = parquet.read_table(path)
            about = json.loads(rows.schema.metadata[ABOUT])
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (pa.ArrowInvalid, KeyError, TypeError):
            raise UserError(f"{path}: not what trueup overoptimize writes as data.parquet") from None
        if differ := [key for key in wanted if about["settings"].get(key) != wanted[key]]:
            there, here = about["settings"].get(differ[0]), wanted[differ[0]]
            raise UserError(f"{path}: measured with another '{differ[0]}': {there} there, {here} here")
        seconds = {int(seed): of for seed, of in about["seconds"].items()}
        for seed in seconds:
            if seed not in study.seeds:
                raise UserError(f"{path}: seed {seed} is not among the study's seeds {list(study.seeds)}")
            if any(seed in one.seconds for one in out):
                raise UserError(f"{path}: seed {seed} is in another file too")
        out.append(Measured(single(rows), seconds))
    return out


def conclude(source: str, study: StudyConfig, found: Sequence[Measured], folder: Path) -> dict[str, Any]:
    """data.parquet, gates.json, curves.json and report.html."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    from trueup.evaluate.overoptimization import analyze
    from trueup.report.study import write_study_report

    seconds = {seed: of for one in found for seed, of in one.seconds.items()}
    rows = pa.concat_tables([one.rows for one in found], promote_options="default")
    about = {"settings": settings_of(source, study), "seconds": seconds}
    path = folder / "data.parquet"
    floats = [f.name for f in rows.schema if pa.types.is_floating(f.type)]
    parquet.write_table(
        rows.replace_schema_metadata({ABOUT: json.dumps(about)}),
        path,
        compression="zstd",
        use_dictionary=["kind", "condition"],
        use_byte_stream_split=floats,
    )
    analysis = analyze(tables_of(rows, study.seeds), study.gates, plan_of(study))
    gates = {key: analysis[key] for key in ("gates", "level", "seeds", "reach", "fits")}
    write_json(folder / "gates.json", {**gates, "cost": costs(seconds)})
    write_json(folder / "curves.json", analysis["curves"])
    for name, gate in analysis["gates"].items():
        console.print(f"{name}  {gate['outcome']}{' (void: G1 does not hold)' if gate['void'] else ''}", markup=False)
        for check in gate["checks"]:
            if "missing" in check:
                console.print(f"    not measured: {check['name']} ({check['missing']})", markup=False)
    console.print(f"report: {write_study_report(folder)}", markup=False)
    return analysis


def plan_of(study: StudyConfig) -> dict[str, Any]:
    """The names of the conditions that the gates ask for."""
    sizes = [name_of("comparisons", n) for n in sorted(study.comparisons)]
    fewer = name_of("comparisons", study.gates.fewer) if study.gates.fewer else next(iter(sizes), None)
    return {
        "reference": "all",
        "sizes": [*sizes, "all"],
        "fewer": fewer,
        "noisy": name_of("flips", max(study.flips)) if study.flips else None,
        "control": "on_gold" if study.control else None,
        "free": name_of("kl", 0.0) if 0.0 in study.kl_coefs else None,
        "default": None if study.default is None else name_of("kl", study.default),
        "held": [name_of("kl", coef) for coef in sorted(study.kl_coefs)],
    }


def rows_of(study: StudyConfig, stages: Mapping[int, Mapping[str, Stage]]) -> Any:
    """The rows of all seeds, from stages that are all done; scores as they are and in s.d. of the start's samples."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as parquet

    def results(stage: Stage) -> Any:
        return json.loads((stage.folder / "results.json").read_text(encoding="utf-8"))

    rows = []
    sweep = [
        name_of(k, v) for k, values in (("comparisons", study.comparisons), ("flips", study.flips)) for v in values
    ]
    for seed, of in stages.items():
        seen: dict[tuple[str, str], dict[str, Any]] = {}
        units = results(of["best_of"])["units"]
        for condition in ["all", *sweep]:
            stage = of["best_of" if condition == "all" else f"best_of-{condition}"]
            data = columns(parquet.read_table(stage.folder / "best_of.parquet"))
            own = results(stage)["units"]
            seen["best_of", condition] = in_units(data, own["gold"]["std"], own["proxy"]["std"])
        start = columns(parquet.read_table(of["versions-start"].folder / "trace.parquet"))
        for name in [name_of("kl", coef) for coef in study.kl_coefs] + ["on_gold"] * study.control:
            after = columns(parquet.read_table(of[f"versions-{name}"].folder / "trace.parquet"))
            both = {key: np.concatenate([start[key], after[key]]) for key in start}
            seen["trace", name] = in_units(both, units["gold"]["std"], units["proxy"]["std"])
        for beta in study.betas:
            data = columns(parquet.read_table(of[f"versions-{name_of('beta', beta)}"].folder / "trace.parquet"))
            data["step"] = np.ones_like(data["step"])  # trained; how many steps that were differs from seed to seed
            both = {key: np.concatenate([start[key], data[key]]) for key in start}
            seen["dpo", name_of("beta", beta)] = in_units(both, units["gold"]["std"], units["proxy"]["std"])
        for condition in ["all", *sweep]:
            reward = of.get(f"reward-{condition}") or of.get(_maker(of, of["best_of"]))
            if reward and "accuracy" in (found := results(reward)):
                clean = found.get("clean") or {}
                seen["reward", condition] = {
                    "rows": np.array([0]),
                    "prompt": np.array([0]),
                    "accuracy": np.array([found["accuracy"]]),
                    "loss": np.array([found["best_validation_loss"]]),
                    "ceiling": np.array([known(found["ceiling"])]),
                    "gold_accuracy": np.array([known(clean.get("accuracy"))]),
                    "comparisons": np.array([float(found["rows"])]),
                }
        for (kind, condition), data in seen.items():
            size = len(data["prompt"])
            about = {"seed": [seed] * size, "kind": [kind] * size, "condition": [condition] * size}
            rows.append(pa.table({**about, **data}))
    return single(pa.concat_tables(rows, promote_options="default"))


def single(rows: Any) -> Any:
    """The rows in single precision, which a mean over four answers does not reach: half of the bytes."""
    import pyarrow as pa

    return rows.cast(pa.schema([f.with_type(pa.float32()) if pa.types.is_floating(f.type) else f for f in rows.schema]))


def tables_of(rows: Any, seeds: Sequence[int]) -> dict[str, Any]:
    """The rows as the analysis reads them; no table of reward models where a seed has none."""
    import pyarrow.compute as compute

    from trueup.evaluate import best_of, trace
    from trueup.evaluate.overoptimization import table_of

    scaled = ("gold_sd", "proxy_sd")
    measures = {
        "trace": ("step", [*trace.MEASURES, *scaled]),
        "dpo": ("step", [*trace.MEASURES, *scaled]),
        "best_of": ("n", [*best_of.MEASURES, *scaled]),
        "reward": ("rows", ["accuracy", "loss", "ceiling", "gold_accuracy", "comparisons"]),
    }
    out = {}
    for kind, (point, names) in measures.items():
        kept = rows.filter(compute.equal(rows["kind"], kind))
        groups = []
        for seed in seeds:
            own = kept.filter(compute.equal(kept["seed"], seed))
            of = {c: own.filter(compute.equal(own["condition"], c)) for c in own["condition"].unique().to_pylist()}
            groups.append({c: columns(part.select([point, "prompt", *names])) for c, part in of.items()})
        if all(groups):
            out[kind] = table_of(groups, point, names, halves=1 if kind == "reward" else 2)
    return out


def known(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _maker(of: Mapping[str, Stage], best: Stage) -> str:
    """The reward stage whose model `best` chose by."""
    return next((name for name in best.parents if of[name].phase == "reward"), "")


def columns(table: Any) -> dict[str, Any]:
    return {name: table[name].to_numpy() for name in table.column_names}


def in_units(data: dict[str, Any], gold: float, proxy: float) -> dict[str, Any]:
    return {**data, "gold_sd": data["gold"] / max(gold, 1e-9), "proxy_sd": data["proxy"] / max(proxy, 1e-9)}


def seconds_of(stages: Mapping[int, Mapping[str, Stage]]) -> dict[int, dict[str, float]]:
    return {
        seed: {name: float(manifest(stage.folder).get("seconds", 0.0)) for name, stage in of.items()}
        for seed, of in stages.items()
    }


def costs(seconds: Mapping[int, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Stage -> mean and longest seconds over the seeds, and the hours of all."""
    out = {}
    for name in next(iter(seconds.values())):
        each = [of[name] for of in seconds.values()]
        out[name] = {"mean": sum(each) / len(each), "longest": max(each), "hours": sum(each) / 3600}
    return out
