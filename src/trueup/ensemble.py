"""The phase `ensemble`: several reward models of the same comparisons, to be used as one scorer.

In order: say what each member is (seed, and by choice its bootstrap, raters, start); train the members one after
another, each a stage `reward` in a folder of its own that is resumed by itself; gather them into `final/` with
`ensemble.json`; measure them together on the held-out pairs; with `average`, write beside them one reward model whose
weights are the members' mean (WARM, Rame et al. 2024). Composes; nothing below imports it but `recipe`.

Not in it: how a reward model is trained (phases/reward.py), how members are combined (scorers/ensemble.py).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from trueup.config import Config
from trueup.data.chat import Chat, describe
from trueup.data.prepare import Pair, Prepared
from trueup.engine.mesh import Mesh
from trueup.math.ensemble import Combine
from trueup.models.net import Net
from trueup.models.roles import average_weights, models_of, recorded, save_checked
from trueup.phases import reward
from trueup.phases.reward import RewardConfig
from trueup.records import Preference, UserError, write_json
from trueup.run import Run, read_lines
from trueup.scorers import make_scorer
from trueup.scorers.ensemble import FILE, Ensemble

WHAT = "learns several scores from the comparisons: where they disagree, one of them alone should not be believed"
VERSION = 1


class EnsembleConfig(Config):
    """Several reward models as one scorer."""

    member: RewardConfig
    """What all members share: `member.model`, `member.data` and whatever else `trueup keys reward` lists."""
    members: int | list[str] = 5
    """How many to train; or reward models that there are already, which are only gathered."""
    seed: int = 0
    """Member i has the seed 1000 x seed + i: its head, the order of its data, its bootstrap."""
    starts: tuple[str, ...] = ()
    """Models that the members start from in turn, where not all start from `member.model`: what helps most is that
    they were pretrained apart (Eisenstein et al. 2023)."""
    bootstrap: bool = False
    """Each member learns from a draw of its own, with replacement, of the pairs to train on."""
    raters: float = Field(1.0, gt=0, le=1)
    """Each member hears this share of the raters; shares are disjoint as far as they go."""
    combine: Combine = "mean"
    """mean, median, wco (worst case: the lowest) or uwo (mean less `penalty` x variance); a scorer may overrule it."""
    penalty: float = Field(0.5, ge=0)
    """Of uwo, in 1 / s.d. of the SFT model's scores."""
    average: bool = False
    """Also write `average/`, one reward model of the members' mean weights (WARM). Members then share their start, the
    head too."""


def run_phase(config: EnsembleConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    refuse(config)
    data, rows = reward.read_pairs(config.member, Chat.load(config.member.model))
    run.begin()
    if isinstance(config.members, int):
        configs = member_configs(config, sorted({p.rater for p in data.found.records}))
        results = [train(one, run.folder / f"member-{i}", mesh, run) for i, one in enumerate(configs)]
        made = [str(run.folder / f"member-{i}" / "final") for i in range(len(configs))]
        merge_metrics(run, [run.folder / f"member-{i}" for i in range(len(configs))])
    else:
        results, made = [], list(config.members)
    names = [f"member-{i}" for i in range(len(made))]
    losses = [loss for r in results if (loss := r.get("best_validation_loss")) is not None]
    best = int(np.argmin(losses)) if losses else 0  # all members have held-out pairs, or none has
    about = {"members": names, "combine": config.combine, "penalty": config.penalty, "best": names[best]}
    run.write("final", partial(gather, made, about))
    mesh.barrier()

    figures = measure(config, data, run, mesh) if data.held else {}
    if figures:
        run.say(
            f"held-out accuracy of the {config.combine} {figures['accuracy']:.3f}; of its members "
            + ", ".join(f"{a:.3f}" for a in figures["members_accuracy"])
        )
    average = write_average(config, data, rows, run, mesh) if config.average else None
    return {
        "members": len(made),
        "best": names[best],
        "of": [{k: r.get(k) for k in ("rows", "best_validation_loss", "accuracy")} for r in results],
        **figures,
        **({"average": average} if average else {}),
    }


def refuse(config: EnsembleConfig) -> None:
    """What cannot be, said before anything is trained."""
    count = config.members if isinstance(config.members, int) else len(config.members)
    if count < 1:
        raise UserError(f"members must be 1 or more, or a list of reward models; got {config.members}")
    for key in ("seed", "bootstrap", "raters"):
        if key in config.member.model_fields_set and getattr(config.member, key):
            raise UserError(f"member.{key}: each member has its own; set '{key}' itself")
    if isinstance(config.members, list):
        for folder in config.members:
            if not (Path(folder) / "config.json").is_file():
                raise UserError(f"{folder}: no reward model (no config.json here)")
    if config.average and len(set(config.starts)) > 1:
        raise UserError("average: weights can be averaged only of members of one start; 'starts' names several")


def member_configs(config: EnsembleConfig, raters: Sequence[str]) -> list[RewardConfig]:
    """The members' own configs. `raters`: who judged the comparisons."""
    assert isinstance(config.members, int)
    heard = shares_of_raters(config, raters)
    out = []
    for i in range(config.members):
        own: dict[str, Any] = {"seed": 1000 * config.seed + i, "bootstrap": config.bootstrap, "raters": heard[i]}
        if config.starts:
            own["model"] = config.starts[i % len(config.starts)]
        if config.average and config.member.head_seed is None:
            own["head_seed"] = 1000 * config.seed
        out.append(config.member.model_copy(update=own))
    return out


def shares_of_raters(config: EnsembleConfig, known: Sequence[str]) -> list[tuple[str, ...] | None]:
    """The raters that each member hears: the raters in a random order, dealt out round and round."""
    assert isinstance(config.members, int)
    if config.raters == 1:
        return [None] * config.members
    if len(known) < 2:
        raise UserError(
            f"{config.member.data}: raters={config.raters:g} needs pairs by two or more raters (column 'rater'), found "
            f"{len(known)}"
        )
    order = np.random.default_rng([config.seed, 3]).permutation(known)
    size = max(1, round(config.raters * len(known)))
    return [tuple(sorted(str(order[(i * size + j) % len(known)]) for j in range(size))) for i in range(config.members)]


def train(config: RewardConfig, folder: Path, mesh: Mesh, run: Run) -> dict[str, Any]:
    """A member's results: trained now, or before. Cut off, it goes on from its own last checkpoint."""
    done = folder / "results.json"
    if mesh.from_main(done.exists):
        return json.loads(done.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    own = [f"seed {config.seed}", *(["bootstrap"] if config.bootstrap else []), f"from {config.model}"]
    run.say(f"{folder.name}: {', '.join(own)}" + (f", raters {', '.join(config.raters)}" if config.raters else ""))
    with Run(folder, name=folder.name, main=mesh.is_main) as member:
        mesh.barrier()  # the others read what the main process has tidied up
        results = reward.run_phase(config, member, mesh)
        member.results(results)
        member.clear_checkpoints()
    mesh.barrier()
    return results


def merge_metrics(run: Run, folders: Sequence[Path]) -> None:
    """The members' training curves as their mean, a step at a time, over the members that took it."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for folder in folders:
        for row in read_lines(folder / "metrics.jsonl"):
            by_step.setdefault(row["step"], []).append(row)
    for step, rows in sorted(by_step.items()):
        names = [n for n in rows[0] if n != "step"]
        run.log(step, **{n: float(np.mean([r[n] for r in rows if r.get(n) is not None])) for n in names})


def gather(made: Sequence[str], about: dict[str, Any], folder: Path) -> None:
    for i, one in enumerate(made):
        shutil.copytree(one, folder / f"member-{i}")
    write_json(folder / FILE, about)


def measure(config: EnsembleConfig, data: Prepared[Preference, Pair], run: Run, mesh: Mesh) -> dict[str, Any]:
    """What the held-out pairs say of the whole, as of any reward model, and of its members side by side. Shows those
    that the members disagree on most."""
    folder = run.folder / "final"
    scorer = make_scorer(str(folder), mesh)
    assert isinstance(scorer, Ensemble)
    sides = [(p.preference.prompt, c) for p in data.held for c in (p.preference.chosen, p.preference.rejected)]
    found = scorer.score([p for p, _ in sides], [c for _, c in sides])
    assert found.disagreement is not None
    # Normalized scores are in s.d.; the members' own logits, on which they are calibrated, are that many times larger.
    std = float(np.mean([recorded(folder / name).get("score_std", 1.0) for name in scorer.members]))
    scores = torch.from_numpy(found.value).view(-1, 2) * std
    gaps = torch.stack(
        [torch.from_numpy(v).view(-1, 2) @ torch.tensor([1.0, -1.0]).double() for v in found.parts.values()]
    )
    doubt = found.disagreement.reshape(-1, 2).mean(1)
    for i in np.argsort(-doubt)[: config.member.samples]:
        shown = [
            {
                **describe(prompt),
                "completion": c.text,
                "stop": c.stop,
                "side": side,
                "pair": int(i),
                "score": float(found.value[2 * i + j]),
                "disagreement": float(found.disagreement[2 * i + j]),
            }
            for j, ((prompt, c), side) in enumerate(zip(sides[2 * i : 2 * i + 2], ("chosen", "rejected"), strict=True))
        ]
        run.show(0, shown)
    label = torch.tensor([p.preference.label for p in data.held], dtype=torch.float64)
    wrong = (gaps * (label - 0.5) <= 0).double()
    return {
        **reward.evaluate(data.held, scores, std, data.records),
        "members_accuracy": [reward.right(gap, label) for gap in gaps],
        "disagreement": float(found.disagreement.mean()),
        # Members that erred by themselves would all be wrong about a pair as often as the product of their error
        # rates says; what is beyond it they share, and no way of combining them mends it.
        "all_wrong": float(wrong.prod(0).mean()),
        "all_wrong_if_independent": float(math.prod(wrong.mean(1).tolist())),
    }


def write_average(
    config: EnsembleConfig, data: Prepared[Preference, Pair], rows: list[Pair], run: Run, mesh: Mesh
) -> dict[str, Any]:
    """`average/`: an ordinary reward model of the members' mean weights, normalized and measured as one."""
    member, final = config.member, run.folder / "final"
    folders = sorted(final.glob("member-*"), key=lambda folder: int(folder.name.partition("-")[2]))
    chat = Chat.load(str(folders[0]))
    net = Net(average_weights(folders, mesh.device), "reward")
    models = models_of(member.model, None, precision="fp32", device=mesh.device)
    normalization = reward.normalize(member, net, mesh, chat, rows, models)
    about = {"trueup": {**normalization, "start": recorded(folders[0])["start"]}}
    run.write("average", partial(save_checked, net.model, chat=chat, extra_config=about))
    out: dict[str, Any] = {"normalization": normalization}
    if data.held:
        scores = reward.pair_scores(net, mesh, data.held, chat.pad_id)
        found = reward.evaluate(data.held, scores, normalization["score_std"], data.records)
        out |= {k: found[k] for k in ("accuracy", "calibration_error", "clean")}
        run.say(f"held-out accuracy of the averaged weights {out['accuracy']:.3f}")
    return out
