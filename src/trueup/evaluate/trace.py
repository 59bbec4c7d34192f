"""Versions of a policy along its training, each scored by proxy and gold on fresh samples of a frozen set of prompts.

In order: for the start, for every snapshot that a PPO stage kept, or for what another stage made, answer each prompt
several times at the training temperature; the exact KL from the start, a sum over the vocabulary at every token,
beside its estimates k1 and k3; the proxy's and the gold scorer's number; length and endings. Written as
`trace.parquet`, one row a version and prompt (means over its samples). Nothing here goes back into training. Not in
it: what the curves mean (overoptimization).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from pydantic import Field

from trueup.config import Config, display
from trueup.data.batches import completion_batch
from trueup.data.chat import Chat, describe
from trueup.data.prepare import prompts as prepare_prompts
from trueup.engine.mesh import Mesh
from trueup.engine.rows import compare
from trueup.engine.sampler import Sampler, Sampling
from trueup.math import kl_estimate
from trueup.models.load import context_length, load_policy
from trueup.models.lora import Lora
from trueup.models.net import Net
from trueup.models.roles import load_weights, models_of
from trueup.records import Prompt, UserError
from trueup.run import Run
from trueup.scorers import Spec, make_scorer

WHAT = "scores every kept version of the policy by proxy and by gold, on the same prompts"
VERSION = 1
MEASURES = ("gold", "proxy", "kl", "kl_k1", "kl_k3", "length", "ended")
FRESH = 1 << 20
"""Added to the seed: no sample here shares its random numbers with one that PPO learned from."""


class TraceConfig(Config):
    """Versions of a policy, scored."""

    start: str
    """The policy at step 0, from which KL is measured."""
    training: str | None = None
    """A stage's folder with `snapshots/`, or with `final/` alone; where none is named, the start itself is scored."""
    prompts: str
    proxy: Spec
    gold: Spec
    limit: int = Field(0, ge=0)
    """At most so many prompts; 0 takes all."""
    samples: int = Field(4, gt=0)
    """Answers to each prompt, of each version."""
    sampling: Sampling = Sampling(max_tokens=64)
    lora: Lora | None = None
    """As in the PPO stage."""
    seed: int = 0
    shown: int = display(20, ge=0)
    """Prompts of which an answer by each version is kept, to be read."""


def run_phase(config: TraceConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    chat = Chat.load(config.start)
    prompts = frozen_prompts(config.prompts, chat, config.start, config.limit)
    versions = snapshots(config.training) if config.training else {0: None}
    proxy, gold = make_scorer(config.proxy, mesh), make_scorer(config.gold, mesh)
    temperature = config.sampling.temperature
    models = models_of(config.start, config.lora, precision="fp32", device=mesh.device)
    reference = Net(load_policy(config.start, device=mesh.device), "policy", temperature)
    policy = Net(models.policy(config.seed), "policy", temperature)
    asked = [p for p in prompts for _ in range(config.samples)]
    ids = [chat.prompt_ids(p.messages) for p in asked]

    def answer(index: range) -> list[dict[str, Any]]:
        [step] = [list(versions)[i] for i in index]
        if folder := versions[step]:
            load_weights(policy.model, folder)
        answers = Sampler.speaking(chat, policy.model, mesh).sample(
            ids, config.sampling, seed=config.seed + FRESH, step=step
        )
        batch = completion_batch(ids, [a.ids for a in answers], chat.pad_id)
        found = {name: value.double().cpu() for name, value in compare(policy, reference, batch, mesh).items()}
        new, old = found["logprobs"], found["ref_logprobs"]
        columns = {
            "gold": gold.score(asked, answers).value,
            "proxy": proxy.score(asked, answers).value,
            "kl": found["kl"].sum(1).numpy(),
            **{f"kl_{k}": kl_estimate(new, old, kind=k).sum(1).numpy() for k in ("k1", "k3")},
            "length": np.array([float(len(a.ids)) for a in answers]),
            "ended": np.array([float(a.ended) for a in answers]),
        }
        run.live.update({name: float(columns[name].mean()) for name in MEASURES})
        shown = [
            {**describe(asked[i]), "completion": answers[i].text, "stop": answers[i].stop}
            | {name: float(columns[name][i]) for name in ("gold", "proxy", "kl")}
            for i in range(0, len(asked), config.samples)[: config.shown]
        ]
        means = {name: columns[name].reshape(len(prompts), -1).mean(1).tolist() for name in MEASURES}
        return [{"step": step, "means": means, "shown": shown}]

    found = run.journaled("versions", len(versions), 1, answer)
    table: dict[str, list[Any]] = {name: [] for name in ("step", "prompt", *MEASURES)}
    for version in found:
        table["step"] += [version["step"]] * len(prompts)
        table["prompt"] += range(len(prompts))
        for name in MEASURES:
            table[name] += version["means"][name]
    if mesh.is_main:
        parquet.write_table(pa.table(table), run.folder / "trace.parquet")
        for version in found:
            run.show(version["step"], version["shown"])
            run.log(version["step"], **{k: float(np.mean(v)) for k, v in version["means"].items()})
    mesh.barrier()
    last = found[-1]["means"]
    return {"prompts": len(prompts), "samples": config.samples, **{k: float(np.mean(v)) for k, v in last.items()}}


def frozen_prompts(path: str, chat: Chat, model: str, limit: int) -> list[Prompt]:
    """The distinct prompts of a file that fit into the model's context, in its order."""
    found = prepare_prompts(path, chat.prompt_length, context_length(model) - 1)
    if not found.train:
        raise UserError(f"{path}: no prompt fits into the model's context")
    return found.train[: limit or None]


def snapshots(training: str) -> dict[int, Path | None]:
    """Step -> folder, in order."""
    found: dict[int, Path | None] = {int(p.name): p for p in Path(training).glob("snapshots/*") if p.name.isdigit()}
    if not found and (final := Path(training) / "final").is_dir():
        results = json.loads((Path(training) / "results.json").read_text(encoding="utf-8"))
        return {int(results["steps"]): final}
    if not found:
        raise UserError(
            f"{training}: holds no snapshots/ and no final/; PPO keeps the first with snapshots=[10, 20], say"
        )
    return dict(sorted(found.items()))
