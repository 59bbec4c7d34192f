"""A run's model as a folder for others: merged weights, tokenizer, chat template, generation config, and a card.

The card is written from what the run recorded, of the stages that led to this model and of the evaluations that it
took part in, and says what is not known. Not in it: any new measurement, any weight that is not in `final/`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from trueup import __version__
from trueup.chat import find_model
from trueup.records import UserError
from trueup.report.figures import bracket, num, percent, title_of
from trueup.report.headline import headline, models_of
from trueup.report.read import RunData, Stage, number, pair, read_run
from trueup.run import write_folder

TAG = "trueup"
FILES = ("data", "prompts", "completions")
"""The keys by which stages name data."""
COUNTS = {
    "rows": "rows to train on",
    "pairs": "pairs held out",
    "comparisons": "comparisons",
    "completions": "completions",
    "prompts": "prompts",
}
HUB = re.compile(r"[\w.-]+/[\w.-]+")


def export(run: Path, out: Path | None = None) -> Path:
    """`run` is a run, a stage or a model's folder in one. Writes `out`, by default `export` beside what was named."""
    final = find_model(run, scorers=True)
    if (made := _made_by(final)) is None:
        raise UserError(f"{final}: no record of how it was made; export takes a run, or a stage of one")
    history, stage = made
    if stage.status != "done":
        raise UserError(f"{stage.folder}: this stage is not done; run it to its end first")
    out = out or (run.parent if run == final else run) / "export"
    if out.exists() and any(out.iterdir()) and not _ours(out):
        raise UserError(f"{out}: holds other files, and would be replaced; name an empty folder with --out")
    stages = list(_lineage(history, stage))
    evaluations = [s for s in history.of("evaluate") if any(map(stage.holds, s.config.get("models", {}).values()))]
    told = RunData(history.folder, history.name, history.recipe, [*stages, *evaluations], [])
    text = card(told, stage, _root(history, stage))
    write_folder(out, lambda folder: _fill(folder, final, text))
    return out


def push(folder: Path, name: str) -> str:
    """The folder to the Hub as `name`; a repository that is not there yet is made, and is private. Returns its
    address."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Exported by Trueup {__version__}")
    except Exception as error:  # its client raises what its transport raises
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"--push {name}: {said}; the export is in {folder}") from None
    return str(address)


def _fill(folder: Path, final: Path, text: str) -> None:
    for file in final.iterdir():
        if file.is_file():  # not the adapter's folder: its weights are in these
            shutil.copy2(file, folder / file.name)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _ours(folder: Path) -> bool:
    readme = folder / "README.md"
    return readme.is_file() and f"- {TAG}\n" in readme.read_text(encoding="utf-8", errors="replace")


# where a model comes from


def _made_by(path: Path) -> tuple[RunData, Stage] | None:
    """The run and the stage in whose folder `path` lies."""
    path = path.resolve()
    folder = next((f for f in (path, *path.parents) if (f / "manifest.json").is_file()), None)
    if folder is None or not (folder.parent / "recipe.json").is_file():
        return None
    run = read_run(folder.parent)
    stage = run.stage_of(str(folder))
    return (run, stage) if stage else None


def _lineage(run: RunData, stage: Stage, seen: set[Path] | None = None) -> Iterator[Stage]:
    """The stages that led to `stage`, those first that others stand on, and `stage` itself; also of other runs."""
    seen = set() if seen is None else seen
    if stage.folder in seen:
        return
    seen.add(stage.folder)
    for value in _strings(stage.config):
        if found := _maker(run, stage, value):
            yield from _lineage(*found, seen)
    yield stage


def _maker(run: RunData, stage: Stage, value: str) -> tuple[RunData, Stage] | None:
    """Who made what a stage's config names: a stage of its run, wherever that lies by now, or of another run."""
    if parent := run.stage_of(value):
        return run, parent
    path = _local(stage, value)
    return _made_by(path) if path else None


def _local(stage: Stage, value: str) -> Path | None:
    """A path of a stage's config, seen from here or from a folder that holds the stage; None where it is none."""
    bases = (Path(), *stage.folder.resolve().parents)
    return next((path for base in bases if (path := base / value).exists()), None)


def _strings(value: Any) -> Iterator[str]:
    """The strings in a config, also the names in a weighted sum."""
    if isinstance(value, str):
        yield value
    for part in [*value, *value.values()] if isinstance(value, Mapping) else value if isinstance(value, list) else []:
        yield from _strings(part)


def _root(run: RunData, stage: Stage) -> str:
    """What the first stage of the chain of models started from: a Hub's name, or the last part of a path."""
    model = str(stage.config.get("model"))
    if found := _maker(run, stage, model):
        return _world(found[1]) if found[1].phase == "world" else _root(*found)
    return model if HUB.fullmatch(model) and not _local(stage, model) else Path(model).name


def _world(stage: Stage) -> str:
    name = stage.config.get("name", "trueup.world")
    return "that of Trueup's built-in world" if name == "trueup.world" else f"that of the world `{name}`"


# the card


def card(told: RunData, stage: Stage, root: str) -> str:
    """The model card, Markdown with the Hub's header. `told` has the stages to tell of, `stage` made the model from
    `root`."""
    policy = stage.phase != "reward"
    header = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation" if policy else "text-classification",
        **({"base_model": root} if "/" in root else {}),
        "tags": [TAG, *dict.fromkeys(["rlhf", stage.phase])],
    }
    chain = " -> ".join(s.name for s in told.stages if s.phase != "evaluate")
    head = headline(told)
    load = "AutoModelForCausalLM" if policy else "AutoModelForSequenceClassification"
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {told.name}: {stage.name}",
        f"{'A language model' if policy else 'A reward model'} made by Trueup {__version__}: {chain}. "
        f"Base model: {root}.",
        "## Use",
        _use(load, policy),
        "## Data",
        _list([line for s in told.stages if (line := _data(s))]) or "The run names no data.",
        "## What was measured",
        "\n\n".join([head.claim, *_tables(told)]),
        _list(head.points),
        "## Limits",
        _list([*head.warnings, *_limits(told, stage)]),
        "## Recipe",
        *(_recipe(told, s) for s in told.stages if s.phase != "evaluate"),
        "Made with " + ", ".join(f"{k} {v}" for k, v in stage.manifest.get("versions", {}).items()) + ".",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _use(load: str, policy: bool) -> str:
    answer = "" if policy else ', {"role": "assistant", "content": "..."}'
    lines = [
        "```python",
        f"from transformers import {load}, AutoTokenizer",
        "",
        f'model, tokenizer = {load}.from_pretrained("."), AutoTokenizer.from_pretrained(".")',
        f'messages = [{{"role": "user", "content": "..."}}{answer}]',
    ]
    if policy:
        lines += [
            'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0]))",
        ]
    else:
        lines += [
            "text = tokenizer.apply_chat_template(messages, tokenize=False)",
            "end = tokenizer.decode(model.config.eos_token_id)",
            "text = text[: text.rindex(end) + len(end)]  # a score is read at the last token: the end token",
            'raw = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0].item()',
            'score = (raw - model.config.trueup["score_mean"]) / model.config.trueup["score_std"]',
        ]
    return "\n".join([*lines, "```"])


def _data(stage: Stage) -> str:
    """What a stage read, and what it left out."""
    files = [Path(path).name for key in FILES for path, _ in stage.data(key)]
    if not files or stage.phase == "world":
        return ""
    result = stage.results
    counts = [f"{num(number(result, key), 0)} {what}" for key, what in COUNTS.items() if key in result]
    left = [f"{num(float(n), 0)} left out: {why}" for why, n in (result.get("dropped") or {}).items() if n]
    if result.get("too_long"):
        left.append(f"{num(number(result, 'too_long'), 0)} too long")
    return f"{title_of(stage.name)}: {', '.join(dict.fromkeys(files))}" + "".join(f"; {t}" for t in counts + left)


def _tables(told: RunData) -> Iterator[str]:
    """For each evaluation its models side by side."""
    for stage in told.of("evaluate"):
        baseline, gold = stage.results.get("baseline"), bool(stage.results.get("gold"))
        columns = ["model", *(["gold"] if gold else []), f"win rate against {baseline}", "KL (nats)", "tokens", "ends"]
        rows = []
        for name, modes in models_of(stage.results).items():
            s = modes.get("sampled", {})
            won = f"{percent(number(s, 'win_rate'))} {bracket(pair(s, 'win_rate_interval'), 0, scale=100)}".strip()
            rows.append(
                [
                    name,
                    *([f"{num(number(s, 'gold'))} {bracket(pair(s, 'gold_interval'))}".strip()] if gold else []),
                    "baseline" if name == baseline else won,
                    num(number(s, "kl"), 1),
                    num(number(s, "length"), 0),
                    percent(number(s, "end_rate")),
                ]
            )
        yield "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows])
        yield "Brackets hold 95% intervals, by bootstrap over prompts."


def _limits(told: RunData, stage: Stage) -> Iterator[str]:
    """What the records do not show, or show to be weak."""
    if not told.of("evaluate"):
        yield "This model was not compared with another one on held-out prompts."
    elif not any(s.results.get("gold") for s in told.of("evaluate")):
        yield "No true score is known; the win rates are another model's opinion, which has its own errors."
    for reward in told.of("reward"):
        accuracy = number(reward.results, "accuracy")
        if accuracy is not None:
            share = percent(1 - accuracy)
            yield f"{title_of(reward.name)} orders {share} of its held-out pairs otherwise than their raters."
    ends = number(stage.results, "end_rate")
    if ends is not None and ends < 1:
        most = stage.config.get("sampling", {}).get("max_tokens")
        yield f"{percent(1 - ends, 1)} of its last answers in training did not end by themselves within {most} tokens."
    yield "The records hold no test of safety, of facts beyond the table above, or of languages; and no license."


def _recipe(told: RunData, stage: Stage) -> str:
    """A stage's resolved config, its paths without what is this machine's alone."""

    def public(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {public(k): public(v) for k, v in value.items()}
        if isinstance(value, list):
            return [public(v) for v in value]
        if isinstance(value, str) and (made := told.stage_of(value)):
            rest = Path(value).parts[Path(value).parts.index(made.folder.name) + 1 :]
            return "/".join([f"@{made.name}", *rest])
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    keys = {"phase": stage.phase, **public(stage.config)}
    return f"```yaml\n{yaml.safe_dump({stage.name: keys}, sort_keys=False, width=118, allow_unicode=True)}```"


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
