"""Critique and revision: a model says what is wrong with its answers under a constitution, and writes better ones.

In order (Bai et al. 2022, Constitutional AI, section 3): sample answers; draw one of the principles that concern the
prompt; let a model criticize the answer as the principle asks, and then revise it; again on the revision, `rounds`
times, each with a draw of its own. Supervised fine-tuning on the revisions of all rounds, together with answers to
helpful prompts as they are, makes a model that needs no person's label for what the constitution says. A revision that
is empty or was cut by length is left out and counted, and the answer before it stands. Not in it: the fine-tuning
(`sft`), and verdicts by the same constitution (`judge`, `ai-feedback`).

    critiques.jsonl       each answer with its critiques and revisions, round by round
    demonstrations.jsonl  prompt and completion: the revisions of all rounds
    comparisons.jsonl     prompt, chosen and rejected: an answer's last revision, and the answer
    helpful.jsonl         prompt and completion: answers to the `helpful` prompts, as they are
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import Field

from trueup.config import Config, Seed, display
from trueup.data.chat import Chat, describe
from trueup.data.files import Data
from trueup.data.prepare import prompts_to_answer
from trueup.engine.answers import answers
from trueup.engine.mesh import Mesh
from trueup.engine.sampler import Sampling
from trueup.judges import make_answerer
from trueup.judges.asking import Answerer, Written
from trueup.judges.constitution import Constitution, conversation, read_constitution
from trueup.models.load import context_length
from trueup.records import Completion, Prompt, Scorer, UserError, write_jsonl
from trueup.run import Run
from trueup.scorers import Spec, make_scorer

WHAT = "lets a model criticize and revise its answers under a constitution: better demonstrations without people"
VERSION = 2
Row = dict[str, Any]


class CritiqueConfig(Config):
    """Critique and revision."""

    model: str
    """Whose answers are mended."""
    prompts: Data
    """Prompts; preference and demonstration files serve too. Several data sets: [a.jsonl, {path: b, weight: 0.5}]."""
    helpful: Data | None = None
    """Prompts whose answers are kept as they are: fine-tuned on revisions alone, a model forgets how to help."""
    constitution: str = "default"
    """A YAML file, or a built-in one by its name."""
    by: dict[str, Any] | None = None
    """Who criticizes and revises: {model: MODEL}, {model: MODEL, chat: true} for an assistant, or {endpoint: URL,
    model: NAME}; `model` itself, as an assistant, where not said."""
    rounds: int = Field(1, ge=1)
    n: int = Field(1, gt=0)
    """Answers a prompt."""
    limit: int = Field(0, ge=0)
    """Only the first so many prompts; 0 takes all."""
    max_prompt: int = Field(512, gt=0)
    """Prompts with more tokens are dropped, and counted."""
    sampling: Sampling = Sampling(max_tokens=64)
    """Of the answers."""
    max_tokens: int = Field(64, gt=0)
    """Of a critique, and of a revision."""
    audit: Spec | None = None
    """A known gold score, only measured: of the first answers and of each round's."""
    seed: Seed = 0
    chunk: int = display(256, gt=0)
    """Answers worked on at once: no more than these are lost to a kill."""
    show: int = display(24, ge=0)
    """Answers shown with what became of them."""


def run_phase(config: CritiqueConfig, run: Run, mesh: Mesh) -> dict[str, Any]:
    told = read_constitution(config.constitution)
    if not any(p.critique for p in told.principles):
        raise UserError(f"constitution {config.constitution}: no principle has a critique and a revision request")
    chat = Chat.load(config.model)
    limit = min(config.max_prompt, context_length(config.model) - 1)
    found = [
        prompts_to_answer(data, chat.prompt_length, limit, run.say, seed=config.seed)
        for data in (config.prompts, config.helpful)
        if data
    ]
    parts = [part.train[: config.limit or None] for part in found]
    due, prompts = len(parts[0]) * config.n, [p for part in parts for p in part]
    answered = answers(
        {config.model: chat},
        prompts,
        config.n,
        config.sampling,
        run,
        mesh,
        scorers={},
        seed=config.seed,
        chunk=config.chunk,
    )
    asked = [p for p in prompts for _ in range(config.n)]
    first = [Completion(a["text"].strip(), a["stop"]) for row in answered for a in row]
    writer = make_answerer(config.by or {"model": config.model, "chat": True}, mesh, config.seed)
    versions, rounds = [first], []
    for number in range(config.rounds):
        work = partial(mend, config, told, writer, asked, [c.text for c in versions[-1]], number)
        rows = run.journaled(f"revisions-{number + 1}", due, config.chunk, work)
        rounds.append(rows)
        versions.append(
            [Completion(row["revision"]) if row["usable"] else c for row, c in zip(rows, versions[-1], strict=False)]
            + first[due:]
        )
    files = tables(asked, first, rounds)
    if mesh.is_main:
        for name, table in files.items():
            write_jsonl(run.folder / f"{name}.jsonl", table)
    run.show(0, [row for i in range(min(config.show, due)) for row in shown(asked[i], first[i], i, rounds)])
    mesh.barrier()
    results = {
        "prompts": len(parts[0]),
        "answers": due,
        **found[0].results(),
        **({"helpful_prompts": {"prompts": len(parts[1]), **found[1].results()}} if config.helpful else {}),
        "constitution": told.name,
        "by": writer.name,
        "cost": sum(row["cost"] for rows in rounds for row in rows),
        "rounds": [became(rows) for rows in rounds],
        "demonstrations": len(files["demonstrations"]),
        "comparisons": len(files["comparisons"]),
        "helpful": len(files["helpful"]),
    }
    for text in lines(results):
        run.say(text)
    if config.audit is not None:
        results["audit"] = measure(make_scorer(config.audit, mesh), asked, versions)
        run.say("audit, from the first answers on: " + ", ".join(f"{one['mean']:.3f}" for one in results["audit"]))
    return results


def became(rows: Sequence[Row]) -> dict[str, Any]:
    """What became of a round's answers."""
    return {
        "principles": dict(Counter(row["principle"] for row in rows if row["principle"])),
        "revised": sum(row["usable"] for row in rows),
        "unusable": sum(bool(row["principle"]) and not row["usable"] for row in rows),
        "too_long": sum(not row["fits"] for row in rows),
        "no_principle": sum(not row["principle"] for row in rows),
    }


def lines(found: Mapping[str, Any]) -> list[str]:
    """The results for the person who watches."""
    out = []
    for number, told in enumerate(found["rounds"], 1):
        lost = f"{told['unusable']} empty or cut by length, {told['no_principle']} without a principle"
        if told["too_long"]:
            lost += f"; {told['too_long']} times examples, conversation and answer filled the model's context"
        out.append(f"round {number}: {told['revised']} revisions, {lost}")
    made = f"{found['demonstrations']} demonstrations and {found['comparisons']} comparisons"
    return [*out, f"{made}; {found['helpful']} answers kept as they are"]


def mend(
    config: CritiqueConfig,
    told: Constitution,
    writer: Answerer,
    asked: Sequence[Prompt],
    replies: Sequence[str],
    number: int,
    index: range,
) -> list[Row]:
    """A round's rows for the answers in `index`: principle, critique, revision, and whether that is of use."""
    drawn = {i: told.mending(asked[i], replies[i], config.seed + number) for i in index}
    due = {i: principle for i, principle in drawn.items() if principle}

    def follow(texts: Sequence[str], part: int) -> list[Written]:
        places = [(2 * number + part) * len(asked) + i for i in due]  # no two draws share random numbers
        return writer.write(texts, max_tokens=config.max_tokens, stop=told.stop, seed=config.seed, index=places)

    examples = told.revised()
    heads = [
        examples + told.criticism(conversation(asked[i].messages), replies[i], principle)
        for i, principle in due.items()
    ]
    critiques = follow(heads, 0)
    revisions = follow(
        [
            f"{head} {critique.text}{told.revising(principle)}"
            for head, critique, principle in zip(heads, critiques, due.values(), strict=True)
        ],
        1,
    )
    mended: dict[int, Row] = {
        i: {
            "principle": due[i].name,
            "critique": critique.text,
            "revision": revision.text,
            "usable": revision.ended and bool(revision.text),
            "fits": critique.fits and revision.fits,
            "cost": critique.cost + revision.cost,
        }
        for i, critique, revision in zip(due, critiques, revisions, strict=True)
    }
    nothing = {"principle": None, "critique": "", "revision": "", "usable": False, "fits": True, "cost": 0.0}
    return [mended.get(i, nothing) for i in index]


def tables(asked: Sequence[Prompt], first: Sequence[Completion], rounds: Sequence[list[Row]]) -> dict[str, list[Row]]:
    """File -> its rows. A text that comes twice among an answer's revisions teaches once."""
    out: dict[str, list[Row]] = {"critiques": [], "demonstrations": [], "comparisons": [], "helpful": []}
    for i, (prompt, answer) in enumerate(zip(asked, first, strict=True)):
        head = {"prompt": [dict(m) for m in prompt.messages], "category": prompt.category}
        if i >= len(rounds[0]):
            out["helpful"] += [{**head, "completion": answer.text}] * (answer.ended and bool(answer.text))
            continue
        history = [rows[i] for rows in rounds if rows[i]["principle"]]
        out["critiques"].append({**head, "completion": answer.text, "stop": answer.stop, "rounds": history})
        texts = [row["revision"] for row in history if row["usable"]]
        out["demonstrations"] += [{**head, "completion": text} for text in dict.fromkeys(texts)]
        if texts and texts[-1] != answer.text:
            pair = {"chosen": texts[-1], "rejected": answer.text, "rejected_ended": answer.ended}
            out["comparisons"].append({**head, **pair, "rater": "revision"})
    return out


def shown(prompt: Prompt, answer: Completion, i: int, rounds: Sequence[list[Row]]) -> list[Row]:
    """What samples.jsonl shows of an answer: itself, and what was said and made of it."""
    sides = [("answer", answer.text)]
    for number, rows in enumerate(rounds, 1):
        if rows[i]["principle"]:
            sides += [(f"critique {number}, {rows[i]['principle']}", rows[i]["critique"])]
            sides += [(f"revision {number}", rows[i]["revision"])]
    return [{**describe(prompt), "completion": text, "side": side, "pair": i} for side, text in sides]


def measure(scorer: Scorer, asked: Sequence[Prompt], versions: Sequence[list[Completion]]) -> list[dict[str, Any]]:
    """The scorer's mean, whole and by category, of the first answers and of those after each round."""
    out = []
    for version in versions:
        values = scorer.score(asked, version).value
        by: dict[str, list[float]] = defaultdict(list)
        for prompt, value in zip(asked, values, strict=True):
            by[prompt.category or "all"].append(float(value))
        out.append({"mean": float(values.mean()), "by_category": {k: sum(v) / len(v) for k, v in sorted(by.items())}})
    return out
