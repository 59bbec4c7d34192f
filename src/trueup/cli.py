"""The command line. It composes; nothing else does. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from trueup.records import CheckFailed, UserError, Waiting

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="RLHF whole, and the proof that it worked. Start with [bold]trueup demo[/bold].",
)
world_app = typer.Typer(
    no_args_is_help=True, help="Worlds: tasks with a known gold score. The built-in one, and your own."
)
app.add_typer(world_app, name="world")
store_app = typer.Typer(no_args_is_help=True, help="The preference store: what people are asked, and what they said.")
app.add_typer(store_app, name="store")
data_app = typer.Typer(no_args_is_help=True, help="Data, looked at before anything is trained on it.")
app.add_typer(data_app, name="data")

Keys = Annotated[
    list[str] | None,
    typer.Argument(help="key=value, dotted for nested keys: optim.lr=1e-4; device=cpu", show_default=False),
]
Runs = Annotated[Path, typer.Option(help="Where runs are kept.")]
Name = Annotated[str, typer.Option(help="Name of the run.")]
RUNS = Path("runs")
Place = Annotated[str, typer.Argument(metavar="STORE", help="A file (SQLite), or postgresql://host/database.")]


@app.command()
def demo(assignments: Keys = None, runs: Runs = RUNS) -> None:
    """The whole pipeline on the built-in world: SFT, reward model, PPO, measured. No download."""
    _run("world", assignments or [], runs)


@app.command()
def run(
    recipe: Annotated[
        str, typer.Argument(help="A YAML file, or a built-in recipe: world, dpo, refresh, constitution, loop, own.")
    ],
    assignments: Keys = None,
    runs: Runs = RUNS,
    dry: Annotated[bool, typer.Option("--dry-run", help="Only say what would run.")] = False,
) -> None:
    """Run a recipe's stages in order: trueup run RECIPE.yaml ppo.kl_coef=0.1. What is done and unchanged is skipped."""
    _run(recipe, assignments or [], runs, dry)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a built-in recipe: world, own.")],
    assignments: Keys = None,
    runs: Runs = RUNS,
    memory: Annotated[str | None, typer.Option(help="Such as 24GB: the largest micro-batch that fits.")] = None,
    rate: Annotated[
        float | None, typer.Option(min=0, help="TFLOP/s to estimate time by; without it this machine's, measured.")
    ] = None,
) -> None:
    """What a recipe will take: stages, done or due, time, disk, memory by part. Reads configs and data, no weights."""
    from trueup.plan import lines, memory_of
    from trueup.plan import plan as look
    from trueup.recipe import load_recipe

    size = memory_of(memory) if memory else None
    planned = look(load_recipe(recipe, assignments or []), runs, memory=size, rate=rate * 1e12 if rate else None)
    print("\n".join(lines(planned, size)))


def _run(source: str | dict[str, Any], assignments: list[str], runs: Path, dry: bool = False) -> None:
    from trueup.recipe import load_recipe, resolve, run_recipe
    from trueup.run import console

    recipe = load_recipe(source, assignments)
    if dry:
        for stage in resolve(recipe, runs):
            state = "done" if stage.done else "due "
            console.print(f"{state:4}  {stage.name:12} {stage.phase:9} {stage.folder}", markup=False)
        return
    try:
        stages = run_recipe(recipe, runs)
    except KeyboardInterrupt:  # typer would leave without a word
        print("\ntrueup: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
    if int(os.environ.get("RANK", 0)) == 0:
        console.print(f"made: {stages[-1].folder}", markup=False)
        _close(runs / recipe.name, [s.folder for s in stages if s.phase == "evaluate"], bool(recipe.rounds))


def _close(folder: Path, evaluations: list[Path], rounds: bool) -> None:
    """The closing tables and the report's place."""
    import json

    from trueup.report import write_report
    from trueup.report.closing import closing_table, examples_table, rounds_table
    from trueup.report.read import read_run
    from trueup.run import console

    if rounds and (table := rounds_table(read_run(folder))):
        console.print(table)
    for evaluation in evaluations:
        results = json.loads((evaluation / "results.json").read_text(encoding="utf-8"))
        console.print(closing_table(results))
        console.print(examples_table(results))
    console.print(f"report: {write_report(folder)}", markup=False)


def _stage(phase: str, assignments: list[str] | None, name: str, runs: Path, dry: bool = False) -> None:
    """One stage alone is a recipe of one stage; `device` and `track` are the recipe's. `dry`: what it would ask."""
    from trueup.config import numbers, override

    if not assignments:
        raise UserError(f"trueup {phase} needs keys, such as model=... ; trueup keys {phase} lists them all")
    keys = numbers(override({}, assignments))
    of_recipe = {key: keys.pop(key) for key in ("device", "track") if key in keys}
    recipe = {"name": name, **of_recipe, "stages": {phase: {"phase": phase, **keys}}}
    if dry:
        from trueup.recipe import load_recipe, resolve

        [stage] = resolve(load_recipe(recipe), runs)
        print(stage.module.estimate(stage.config))
    else:
        _run(recipe, [], runs)


@app.command()
def sft(assignments: Keys = None, name: Name = "sft", runs: Runs = RUNS) -> None:
    """Supervised fine-tuning: model=BASE data=DEMONSTRATIONS.jsonl"""
    _stage("sft", assignments, name, runs)


@app.command()
def reward(assignments: Keys = None, name: Name = "reward", runs: Runs = RUNS) -> None:
    """Train a reward model: model=SFT data=COMPARISONS.jsonl"""
    _stage("reward", assignments, name, runs)


@app.command()
def ensemble(assignments: Keys = None, name: Name = "ensemble", runs: Runs = RUNS) -> None:
    """Train several reward models as one scorer: member.model=SFT member.data=COMPARISONS.jsonl members=5"""
    _stage("ensemble", assignments, name, runs)


@app.command()
def ppo(assignments: Keys = None, name: Name = "ppo", runs: Runs = RUNS) -> None:
    """PPO under a KL penalty: model=SFT scorer=REWARD_MODEL prompts=PROMPTS.jsonl"""
    _stage("ppo", assignments, name, runs)


@app.command()
def dpo(assignments: Keys = None, name: Name = "dpo", runs: Runs = RUNS) -> None:
    """Learn from comparisons without a reward model: model=SFT data=COMPARISONS.jsonl"""
    _stage("dpo", assignments, name, runs)


@app.command()
def generate(assignments: Keys = None, name: Name = "generate", runs: Runs = RUNS) -> None:
    """Sample answers: model=MODEL prompts=PROMPTS.jsonl n=2"""
    _stage("generate", assignments, name, runs)


@app.command("best-of-n")
def best_of_n(assignments: Keys = None, name: Name = "best-of-n", runs: Runs = RUNS) -> None:
    """Keep the best of many answers: model=SFT scorer=REWARD_MODEL prompts=PROMPTS.jsonl n=16"""
    _stage("best-of-n", assignments, name, runs)


@app.command()
def judge(
    assignments: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE] KEYS", help="A file to measure a judge on; key=value.")
    ] = None,
    name: Name = "judge",
    runs: Runs = RUNS,
    dry: Annotated[bool, typer.Option("--dry-run", help="Only say how many requests, and their cost at most.")] = False,
) -> None:
    """Measure a judge on a file: FILE judge=JUDGE against=OTHER; or label: completions=COMPLETIONS.jsonl judge=JUDGE"""
    given = list(assignments or [])
    file = given.pop(0) if given and "=" not in given[0] else None
    phase, keys = ("judged", [f"data={file}", *given]) if file else ("judge", given)
    _stage(phase, keys, name, runs, dry)


@app.command()
def critique(assignments: Keys = None, name: Name = "critique", runs: Runs = RUNS) -> None:
    """Critique and revise answers under a constitution: model=SFT prompts=PROMPTS.jsonl constitution=mine.yaml"""
    _stage("critique", assignments, name, runs)


@app.command("ai-feedback")
def ai_feedback(assignments: Keys = None, name: Name = "ai-feedback", runs: Runs = RUNS) -> None:
    """Compare a model's answers by a constitution: model=SFT prompts=PROMPTS.jsonl constitution=mine.yaml"""
    _stage("ai-feedback", assignments, name, runs)


@app.command()
def route(
    assignments: Keys = None,
    name: Name = "route",
    runs: Runs = RUNS,
    dry: Annotated[bool, typer.Option("--dry-run", help="Only say what people and the judge would be asked.")] = False,
) -> None:
    """Hard pairs to people, the rest to a judge: completions=COMPLETIONS.jsonl judge=JUDGE people=people budget=200"""
    _stage("route", assignments, name, runs, dry)


@app.command()
def score(assignments: Keys = None, name: Name = "score", runs: Runs = RUNS) -> None:
    """Score answers: completions=COMPLETIONS.jsonl scorer=REWARD_MODEL"""
    _stage("score", assignments, name, runs)


@app.command()
def evaluate(assignments: Keys = None, name: Name = "evaluate", runs: Runs = RUNS) -> None:
    """Compare models: models.sft=A models.ppo=B prompts=PROMPTS.jsonl judge=HELD_OUT_REWARD_MODEL"""
    _stage("evaluate", assignments, name, runs)


@app.command()
def init(
    out: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.yaml"),
    model: Annotated[str, typer.Option(help="The model to start from: a folder or Hub name.")] = "",
    demonstrations: Annotated[str | None, typer.Option(help="Prompts with ideal replies, for SFT.")] = None,
    comparisons: Annotated[str | None, typer.Option(help="prompt, chosen, rejected, for the reward model.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Prompts for PPO; those of the comparisons without it.")] = None,
    heldout: Annotated[str | None, typer.Option(help="Prompts that no stage trains on, to evaluate with.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; without it the recipe's.")] = None,
) -> None:
    """Write a commented recipe for your model and data, after a look at them."""
    import yaml

    from trueup.init import look, starter
    from trueup.recipe import load_recipe, resolve
    from trueup.records import write_text

    given = {"demonstrations": demonstrations, "comparisons": comparisons, "prompts": prompts, "heldout": heldout}
    if out.exists():
        raise UserError(f"{out}: is there already, and is left as it is; name another file")
    if not model:
        raise UserError("name the model to start from: --model FOLDER, or a Hub name")
    from trueup.data.chat import Chat
    from trueup.run import console

    chat = Chat.load(model)
    found = {kind: look(kind, path, chat) for kind, path in given.items() if path}
    text = starter(name or out.stem, model, found)
    stages = resolve(load_recipe(yaml.safe_load(text)), RUNS)  # what it writes must run
    write_text(out, text)
    for one in found.values():
        console.print(str(one), markup=False)
    console.print(f"wrote {out}: {' -> '.join(s.name for s in stages)}", markup=False)
    console.print(f"next: trueup run {out}", markup=False)


@app.command()
def overoptimize(
    recipe: Annotated[str, typer.Argument(help="A YAML file with a PPO stage, or a built-in recipe: world.")],
    assignments: Annotated[
        list[str] | None,
        typer.Argument(help="key=value of the study: seeds=[0,1] kl_coefs=[0,0.25] gold=module:function"),
    ] = None,
    study: Annotated[
        Path | None, typer.Option(help="The study's YAML; for `world` the built-in one where none is named.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Stages side by side, a thread each.")] = 1,
    measured: Annotated[
        list[Path] | None, typer.Option("--with", help="data.parquet of this study's other seeds, run elsewhere.")
    ] = None,
    runs: Runs = RUNS,
    dry: Annotated[bool, typer.Option("--dry-run", help="Only say what would run.")] = False,
) -> None:
    """Measure over-optimization: best of n and PPO, seeds and KL coefficients; proxy against gold, gates, a report."""
    from trueup.run import console
    from trueup.study import due, load_study, run_study

    config = load_study(recipe, study, assignments or [])
    if dry:
        for line in due(recipe, config, runs, measured or []):
            console.print(line, markup=False)
        return
    try:
        run_study(recipe, config, runs, jobs, measured or [])
    except KeyboardInterrupt:
        print("\ntrueup: stopped; the same command goes on with what is not done", file=sys.stderr)
        raise SystemExit(130) from None


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/world.")]) -> None:
    """Write RUN/report.html again."""
    if (folder / "study.json").exists():
        from trueup.report.study import write_study_report

        print(f"report: {write_study_report(folder)}")
        return
    if not (folder / "recipe.json").exists():
        raise UserError(f"{folder}: not a run (no recipe.json here)")
    from trueup.report import write_report

    print(f"report: {write_report(folder)}")


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Runs' folders: two to eight.")],
    out: Annotated[Path, typer.Option(help="The page with the curves.")] = Path("compare.html"),
) -> None:
    """Runs side by side: closing figures and config differences here, curves in one HTML page."""
    from trueup.report.versus import compare as read
    from trueup.report.versus import tables, write_page
    from trueup.run import console

    found = read(folders)
    console.print(tables(found))
    console.print(f"page: {write_page(found, out)}", markup=False)


@app.command()
def diagnose(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/world.")],
) -> None:
    """The result is bad: which stage is at fault, by the run's own records, and what to change."""
    from trueup.report.diagnosis import diagnose as find
    from trueup.report.diagnosis import diagnosis_table
    from trueup.report.read import read_run
    from trueup.run import console

    run = read_run(folder)
    console.print(diagnosis_table(run, find(run)))


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run, or one of its stages.")],
    out: Annotated[Path | None, typer.Option(help="Where it goes; RUN/export where none is named.")] = None,
    push: Annotated[str | None, typer.Option(help="Also to the Hub: NAME or USER/NAME, private at first.")] = None,
) -> None:
    """A run's model as a folder to share: merged weights, tokenizer, template, a card from the run's own records."""
    from trueup.export import export as write
    from trueup.export import push as send

    made = write(folder, out)
    print(f"model: {made}")
    if push:
        print(f"pushed: {send(made, push)}")


@app.command()
def chat(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run, one of its stages, or a model's folder.")],
    beside: Annotated[Path | None, typer.Option(help="A second model, answered side by side.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 answers greedily.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
) -> None:
    """Talk to a trained model; with --beside, to two at once."""
    from trueup.chat import talk

    folders = [folder] if beside is None else [folder, beside]
    talk(folders, temperature=temperature, max_tokens=max_tokens, seed=seed, device=device)


@app.command()
def label(
    store: Place,
    assignments: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN RUN ...] KEYS", help="key=value; with --arena models, too.")
    ] = None,
    arena: Annotated[bool, typer.Option("--arena", help="Compare the models of these runs, blindly.")] = False,
    device: Annotated[str, typer.Option(help="Where the models answer: auto, cpu, cuda.")] = "auto",
    runs: Runs = RUNS,
) -> None:
    """The labelling page: people compare answers in a browser. Prints a link; trueup keys label lists the keys."""
    from trueup.config import numbers, override, parse
    from trueup.label.app import LabelConfig
    from trueup.label.server import serve

    given = assignments or []
    models = [Path(word) for word in given if arena and "=" not in word]
    keys = numbers(override({}, [word for word in given if not arena or "=" in word]))
    how = keys.pop("arena", {}) if arena else {}
    config = parse(LabelConfig, keys, "trueup label")
    if arena:
        from trueup.arena.asked import ArenaConfig, answers_of, ask_arena
        from trueup.store import Store

        asked = parse(ArenaConfig, how, "trueup label --arena, arena")
        print(ask_arena(Store(store), answers_of(models, asked, store, device, runs), asked), flush=True)
    serve(store, config)


@app.command()
def simulate(
    given: Annotated[
        list[str], typer.Argument(metavar="LINK [LINK ...] KEYS", help="Links that trueup label prints; judge=JUDGE")
    ],
) -> None:
    """Simulated raters answer the labelling page as people do: LINK judge='{use: trueup.world:raters, name: pool}'"""
    from trueup.config import numbers, override, parse
    from trueup.simulate import SimulateConfig, answer

    links = [word for word in given if word.startswith(("http://", "https://"))]
    words = [word for word in given if word not in links]
    config = parse(SimulateConfig, numbers(override({}, words)), "trueup simulate")
    if not links:
        raise UserError("trueup simulate needs a link that trueup label prints, or with name=ACCOUNT the address")
    answer(links, config, sys.stdin.readline().rstrip("\n") if config.name else "")


@app.command()
def arena(
    store: Place,
    assignments: Annotated[
        list[str] | None, typer.Argument(metavar="KEYS", help="judge=JUDGE asks it first; seed=0", show_default=False)
    ] = None,
    origin: Annotated[str | None, typer.Option(help="Which arena, where there are several: its models.")] = None,
    by: Annotated[str | None, typer.Option(help="Whose verdicts narrow the intervals, of several judges.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write all figures there, as JSON.")] = None,
    device: Annotated[str, typer.Option(help="Where a judge's model works: auto, cpu, cuda.")] = "auto",
) -> None:
    """Which model people prefer, of those that trueup label --arena compares; a judge may narrow the intervals."""
    from trueup.arena.standings import report

    report(store, assignments or [], origin=origin, by=by, out=out, device=device)


@store_app.command("ask")
def store_ask(
    store: Place,
    file: Annotated[Path, typer.Argument(help="prompt, first, second a row; or a completions.jsonl of generate.")],
    origin: Annotated[str | None, typer.Option(help="What to call the batch; without it the file's name.")] = None,
    overlap: Annotated[int, typer.Option(min=1, help="Raters that a share of the comparisons is asked of.")] = 3,
    share: Annotated[float, typer.Option(min=0, max=1, help="That share; the rest is asked of one rater.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Draws the share.")] = 0,
) -> None:
    """Put a file's comparisons into the queue for people."""
    from trueup.label.files import ask_file
    from trueup.store import Store

    print(ask_file(Store(store), file, origin=origin or file.name, overlap=overlap, share=share, seed=seed))


@store_app.command("import")
def store_import(
    store: Place,
    file: Annotated[Path, typer.Argument(help="prompt, chosen, rejected; or an export of Argilla or Label Studio.")],
    origin: Annotated[str | None, typer.Option(help="What to call the batch; without it the file's name.")] = None,
    kind: Annotated[str, typer.Option(help="What the raters are: human, ai, gold, simulated.")] = "human",
) -> None:
    """Add verdicts that were given elsewhere."""
    from typing import get_args

    from trueup.label.files import import_file
    from trueup.store import Kind, Store

    if kind not in get_args(Kind):
        raise UserError(f"--kind '{kind}': expected {', '.join(get_args(Kind))}")
    print(import_file(Store(store), file, origin=origin or file.name, kind=kind))  # type: ignore[arg-type]


@store_app.command("export")
def store_export(
    store: Place,
    out: Annotated[Path, typer.Argument(help="A .jsonl or .parquet file.")],
    what: Annotated[str, typer.Option(help="labels, preferences (a row a comparison), or demonstrations.")] = "labels",
) -> None:
    """Write what was said as a file."""
    from trueup.label.files import FORMATS, export_file
    from trueup.store import Store

    if what not in FORMATS:
        raise UserError(f"--what '{what}': expected {', '.join(FORMATS)}")
    print(f"{out}: {export_file(Store(store), what, out)} rows")


@store_app.command("account")
def store_account(
    store: Place,
    name: Annotated[str, typer.Argument(help="Letters, digits, and . _ - @")],
    role: Annotated[str, typer.Option(help="rater, or manager.")] = "rater",
    simulated: Annotated[bool, typer.Option("--simulated", help="A program; its answers are marked so.")] = False,
    sensitive: Annotated[bool, typer.Option("--sensitive", help="Agreed to see harmful content.")] = False,
) -> None:
    """A rater's account, new or changed. Asks for the password, or reads it from standard input."""
    import getpass

    from trueup.label.accounts import Accounts
    from trueup.store import Store

    accounts = Accounts(Store(store))
    password = getpass.getpass(f"Password of {name}: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    kind = "simulated" if simulated else "human"
    accounts.add(name, role=role, kind=kind, password=password, sensitive=sensitive)
    print(f"{name}: {role}")


@app.command()
def keys(phase: Annotated[str, typer.Argument(help="A phase, such as ppo; or overoptimize.")]) -> None:
    """Every key of a phase, with its default and what it means."""
    import importlib

    from trueup.recipe import PHASES
    from trueup.run import console

    known = {
        **PHASES,
        "overoptimize": ("trueup.study", "StudyConfig"),
        "label": ("trueup.label.app", "LabelConfig"),
        "arena": ("trueup.arena.asked", "ArenaConfig"),
        "simulate": ("trueup.simulate", "SimulateConfig"),
    }
    if phase not in known:
        raise UserError(f"unknown phase '{phase}'; known phases: {', '.join(known)}")
    module, cls = known[phase]
    _print_keys(getattr(importlib.import_module(module), cls), None, "", console)


def _print_keys(cls: Any, values: Any, prefix: str, console: Any) -> None:
    """`values`: a config whose values are the defaults here; None where the class's own are."""
    from pydantic import BaseModel

    from trueup.config import nested

    for name, field in cls.model_fields.items():
        default = field.default if values is None else getattr(values, name)
        inner = nested(field.annotation)
        if isinstance(default, BaseModel):
            _print_keys(type(default), default, f"{prefix}{name}.", console)
        else:
            shown = "required" if values is None and field.is_required() else repr(default)
            console.print(f"{prefix}{name} = {shown}", markup=False, style="bold")
            if field.description:
                console.print(f"    {' '.join(field.description.split())}", markup=False)
            if inner:
                _print_keys(inner, None, f"{prefix}{name}.", console)


@data_app.command("check")
def data_check(
    data: Annotated[str, typer.Argument(metavar="FILE", help="A file, a folder, a Hub name; or [a, {path: b, ...}].")],
    model: Annotated[str, typer.Option(help="The model whose tokenizer, template and context count.")],
    kind: Annotated[
        str | None, typer.Option("--as", help="demonstrations, comparisons or prompts; found out where not said.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens that a row may have.")] = None,
    held_out: Annotated[float, typer.Option(min=0, max=0.99, help="Share of the prompts to hold out.")] = 0.0,
    rows: Annotated[int, typer.Option(min=0, help="How many rows to show token by token.")] = 3,
) -> None:
    """What the data holds, what would be dropped and why, and what the model sees of it."""
    if kind not in (None, "demonstrations", "comparisons", "prompts"):
        raise UserError(f"--as '{kind}': expected demonstrations, comparisons or prompts")
    from trueup.check import check
    from trueup.config import scalar
    from trueup.data.files import sources

    given = scalar(data) if data.startswith(("[", "{")) else data
    check(tuple(sources(given)), model, kind=kind, longest=max_length, held_out=held_out, rows=rows)  # type: ignore[arg-type]


World = Annotated[str, typer.Option(help="The world's module; the built-in one where none is named.")]


@world_app.command("new")
def world_new(folder: Annotated[Path, typer.Argument(help="The new world's folder; its name is the world's.")]) -> None:
    """Start a world of your own: a small one, whole and commented, to change."""
    from trueup.world.interface import begin

    print(f"wrote {begin(folder)}")
    print(f"next: trueup run world name={folder.name} world.name={folder.name}    (from the folder that holds it)")


@world_app.command("export")
def world_export(
    folder: Annotated[Path, typer.Argument(help="Where the JSONL files go.")],
    demonstrations: Annotated[int, typer.Option(min=1)] = 3000,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each split but the held-out one.")] = 1000,
    heldout: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 500,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    world: World = "trueup.world",
) -> None:
    """Write a world's base model, demonstrations and prompts as ordinary files; the built-in one's comparisons too."""
    from trueup.world import export
    from trueup.world.interface import BUILT_IN, load_world
    from trueup.world.stage import base

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already and not empty; name a new folder")
    from trueup.world.raters import demo_preferences

    base(load_world(world), folder / "base")
    rows = export(
        folder,
        demos=demonstrations,
        per_split=prompts,
        heldout=heldout,
        preferences=demo_preferences(3000, seed) if world == BUILT_IN else None,
        seed=seed,
        name=world,
    )
    print(f"{folder / 'base'}: the base model")
    for name, count in rows.items():
        print(f"{folder / name}: {count} rows")


@world_app.command("build")
def world_build(
    out: Annotated[Path, typer.Option(help="Where the base model goes.")] = Path("world-base"),
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to pretrain on; without it the shipped model's number.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    world: World = "trueup.world",
) -> None:
    """Train the tokenizer and the base model from a world's own corpus; the built-in one's are measured, too."""
    import json

    from trueup.world.build import Pretrain, build
    from trueup.world.interface import BUILT_IN, load_world
    from trueup.world.stage import pretrained

    if world != BUILT_IN:
        settings = Pretrain(seed=seed, **({"tokens": tokens} if tokens else {}))
        print(f"base model: {pretrained(load_world(world), out, settings)}")
        return
    print(json.dumps(build(out, seed=seed, tokens=tokens), indent=2))


@world_app.command("judge")
def world_judge(
    completions: Annotated[
        Path | None, typer.Argument(help="A completions.jsonl of stage generate, two or more answers a prompt.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Who judges; the shipped base model where none is named.")] = None,
) -> None:
    """Whether a model's verdicts are right: on templated pairs, and on pairs of sampled answers."""
    import json

    from trueup.world.build import judge_model

    print(json.dumps(judge_model(model, completions), indent=2))


@world_app.command("freeze", hidden=True)
def world_freeze() -> None:
    """Write the world's hash, as it stands, to the FROZEN file: for who changes the world."""
    from trueup.world.build import freeze

    print(freeze())


def main() -> None:
    """Bad input ends in one line and exit code 2; a run that waits for somebody, in 75 (EX_TEMPFAIL of sysexits.h)."""
    try:
        app()
    except UserError as error:
        print(f"trueup: {error}", file=sys.stderr)
        sys.exit(2)
    except Waiting as error:
        print(f"trueup: waits for {error}; then the same command goes on", file=sys.stderr)
        sys.exit(75)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"trueup: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except CheckFailed as error:
        print(f"trueup: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
