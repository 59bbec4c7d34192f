"""Talk to a model in the terminal, or to two side by side."""

from __future__ import annotations

import json
from pathlib import Path

from rich.columns import Columns
from rich.panel import Panel
from rich.text import Text

from trueup.data.chat import Chat
from trueup.engine.mesh import Mesh
from trueup.engine.sampler import Sampler, Sampling
from trueup.models.load import load_policy
from trueup.records import Message, UserError
from trueup.run import console

POLICIES = ("ppo", "dpo", "sft")


def find_model(folder: Path, *, scorers: bool = False) -> Path:
    """The model that a path means: a model's own folder, a stage's `final/`, or a run's last trained policy; with
    `scorers` the last reward model of a run that trained no policy."""
    if (folder / "model.safetensors").exists() or list(folder.glob("model-*.safetensors")):
        return folder
    if (folder / "final").is_dir():
        return folder / "final"
    if (folder / "recipe.json").exists():
        stages = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["stages"]
        made: dict[str, Path] = {}
        for stage in stages.values():
            record, final = folder / stage / "manifest.json", folder / stage / "final"
            if record.exists() and final.is_dir():
                phase = json.loads(record.read_text(encoding="utf-8"))["phase"]
                made["policy" if phase in POLICIES else phase] = final
        if found := made.get("policy") or (made.get("reward") if scorers else None):
            return found
        raise UserError(f"{folder}: no {'model' if scorers else 'policy'} has been trained in this run yet")
    raise UserError(f"{folder}: neither a run, a stage nor a model's folder")


def talk(folders: list[Path], *, temperature: float, max_tokens: int, seed: int, device: str) -> None:
    """Reads questions until an empty line or the end of input; /new starts a new conversation."""
    mesh = Mesh.from_env(device)
    paths = [find_model(f) for f in folders]
    chats = [Chat.load(p) for p in paths]
    samplers = [
        Sampler.speaking(c, load_policy(str(p), device=mesh.device), mesh) for p, c in zip(paths, chats, strict=True)
    ]
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature or 1.0, greedy=temperature == 0)
    histories: list[list[Message]] = [[] for _ in folders]
    console.print("An empty line ends; /new starts a new conversation.", style="dim")
    turn = 0
    while True:
        try:
            question = console.input("[bold]you[/bold]  ").strip()
        except (EOFError, KeyboardInterrupt):
            question = ""
        if not question:
            return
        if question == "/new":
            histories = [[] for _ in folders]
            continue
        panels = []
        for path, chat, sampler, history in zip(paths, chats, samplers, histories, strict=True):
            history.append({"role": "user", "content": question})
            answer = sampler.sample([chat.prompt_ids(history)], sampling, seed=seed, step=turn)[0]
            history.append({"role": "assistant", "content": answer.text})
            note = "" if answer.ended else f" [cut at {max_tokens} tokens]"
            panels.append(Panel(Text(answer.text + note), title=Text(str(path)), title_align="left"))
        console.print(Columns(panels, equal=True, expand=True) if len(panels) > 1 else panels[0])
        turn += 1
