"""What the scripts of the gates G7, G9 and G10 share: which world, which seeds, what was measured elsewhere, intervals.

Seeds are paired and independent of each other, so they may be run side by side (`--jobs`), in several goes, and on
several machines: what each measured is written as RUNS/GATE-WORLD.json, and `--with` takes such files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trueup.evaluate.overoptimization import interval
from trueup.math import bootstrap_interval
from trueup.records import write_json
from trueup.study import workers


def parser_of(doc: str | None, worlds: Sequence[str], seeds: int) -> argparse.ArgumentParser:
    """The options that they share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=worlds)
    parser.add_argument(
        "--world", dest="name", default="", help="its module, as in docs/world.md; else the built-in one"
    )
    parser.add_argument("--draw", type=int, default=0, help="its generator seed: 1000 confirms what was developed on 0")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)))
    parser.add_argument("--jobs", type=int, default=1, help="seeds side by side, a thread each")
    parser.add_argument("--with", dest="files", type=Path, nargs="+", default=[], help="seeds measured elsewhere")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--table", action="store_true", help="run nothing")
    return parser


def given_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[str]:
    """What was said of the world, as keys of a recipe."""
    given = [f"world.name={arguments.name}"] * bool(arguments.name) + [f"world.world={arguments.draw}"] * bool(
        arguments.draw
    )
    if arguments.world != "world" and (given or arguments.files):
        parser.error(f"--world, --draw and --with go with `world`, not with `{arguments.world}`")
    return given


def label(world: str, given: Sequence[str]) -> str:
    """What its runs are called: `world`, `world-myworld-1000`."""
    return "-".join([world, *(text.partition("=")[2] for text in given)])


def over_all(
    arguments: argparse.Namespace,
    path: Path,
    settings: Mapping[str, Any],
    one: Callable[[int], Mapping[str, Any]],
) -> dict[int, Any]:
    """Seed -> what `one` says of it, or what one of `--with` does. Written into `path`, with the `settings` that all
    seeds share; a file of others is refused. `one` is pickled where there are several jobs."""
    elsewhere = read(arguments.files, settings, arguments.seeds)
    here = [seed for seed in arguments.seeds if seed not in elsewhere]
    if arguments.jobs > 1 and not arguments.table:
        with workers(arguments.jobs) as pool:
            said = list(pool.map(one, here))
    else:
        said = [one(seed) for seed in here]
    everything = {**elsewhere, **dict(zip(here, said, strict=True))}
    found = {seed: everything[seed] for seed in arguments.seeds if everything[seed]}
    if found:
        write_json(path, {"settings": settings, "seeds": found})
    return found


def read(paths: Sequence[Path], settings: Mapping[str, Any], seeds: Sequence[int]) -> dict[int, Any]:
    """What such files say. SystemExit where one is not of these settings, or holds a seed that is not wanted or that
    another one holds."""
    out: dict[int, Any] = {}
    for path in paths:
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            there, found = said["settings"], {int(seed): of for seed, of in said["seeds"].items()}
        except FileNotFoundError:
            raise SystemExit(f"{path}: no such file") from None
        except (ValueError, KeyError, TypeError):
            raise SystemExit(f"{path}: not what this script writes into RUNS") from None
        wanted = json.loads(json.dumps(settings))
        if differ := sorted(key for key in wanted.keys() | there.keys() if there.get(key) != wanted.get(key)):
            key = differ[0]
            raise SystemExit(f"{path}: measured with another '{key}': {there.get(key)} there, {wanted.get(key)} here")
        for seed in found:
            if seed not in seeds or seed in out:
                why = "is in another file too" if seed in out else f"is not among the seeds {list(seeds)}"
                raise SystemExit(f"{path}: seed {seed} {why}")
        out |= found
    return out


def over_seeds(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of the mean over seeds; None for a single one."""
    drawn = torch.tensor(values, dtype=torch.float64)
    if len(values) < 6:
        return interval(drawn, torch.empty(0), 0.95)
    low, high = bootstrap_interval(drawn, seed=0)
    return float(low), float(high)


def shown(found: tuple[float, float] | None) -> str:
    return f"{found[0]:+.3f} to {found[1]:+.3f}" if found else "one seed"
