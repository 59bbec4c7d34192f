"""The run directory of one stage: config, manifest, metrics, samples, checkpoints, results. No torch.

    config.json     the resolved config          manifest.json  key, status, parents, versions, seconds
    metrics.jsonl   {"step": n, ...} a line      samples.jsonl  what the model said, with scores
    checkpoint-N/   state after N steps          results.json   closing figures        final/  what it made
    journal-X.jsonl answers as they came, of a stage whose state is its answers

A checkpoint is only to go on from; what others load is `final/` and `best/`. `Keep` says which ones stay. A run replays
from its last checkpoint: `resume` cuts metrics and samples back to it, so that nothing is counted twice. Directories
appear whole (written under a temporary name, then renamed), and what a checkpoint counts on is on the disk before it. A
run is locked while it is written.
Under several processes only the main one writes; the others read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import trueup
from trueup.config import Config
from trueup.records import UserError, sync, write_json, write_jsonl
from trueup.track import Tracker, numbers

Answer = Callable[[range], list[dict[str, Any]]]
LOGS = ("metrics.jsonl", "samples.jsonl")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNMADE = re.compile(
    r"\.|(lock|checkpoint-\d+|best|tensorboard|wandb|(config|manifest)\.json|(metrics|samples|journal-.*)\.jsonl)$"
)
"""What a stage does without once it is done; the rest is what it made."""
TRAINED = {"sft", "reward", "ensemble", "ppo", "dpo"}
"""The phases that train on what their keys `data` and `prompts` name."""
LOGS_NEED = 16 << 20
"""Bytes that must be free before any stage: its logs, samples and records."""
DISK_SPEED = 500e6
"""Bytes a second: what a first checkpoint is thought to cost. Of later ones it is known."""

console = Console(stderr=False, highlight=False, soft_wrap=True, emoji=False)


class Keep(Config):
    """Which checkpoints stay, and what they may cost. Nothing here changes a result: from whichever checkpoint a run
    goes on, it ends in the same."""

    last: int = Field(1, ge=1)
    """So many of the newest."""
    best: bool = False
    """Also the one after the best validation so far, where `share` let it be written then."""
    every: int = Field(0, ge=0)
    """Also the first at or after each multiple of so many steps; 0 keeps none."""
    share: float = Field(0.02, gt=0, le=1)
    """At most this share of the time goes into writing checkpoints: one that would pass it waits. 1: never wait."""


class Run:
    """A stage's folder while it is being worked on. Use as a context manager: it takes and frees the lock."""

    def __init__(
        self, folder: Path, *, name: str, main: bool = True, begin: Callable[[], object] = lambda: None
    ) -> None:
        """`begin` is called in the main process once, before the first step or the first thing that is written."""
        self.folder, self.name, self.main = folder, name, main
        self.begun = False
        self.tracker: Tracker | None = None
        self._begin = begin
        self.live: dict[str, float] = {}
        self.keep = Keep(share=1)
        self.step = 0  # the one at work
        self._lock: IO[str] | None = None
        self._start = 0  # the first step that is not done yet
        self._waiting = False  # a checkpoint is due, but `keep.share` did not allow it yet
        self._began, self._writing = time.monotonic(), 0.0
        self._cost: float | None = None
        self._state = self._model = 0  # bytes, where `reserve` was told

    def __enter__(self) -> Run:
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / "lock", "w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.folder}: another process is writing this run") from None
            for aside in self.folder.glob(".*.old"):
                recover(self.folder / aside.name[1:-4])
            for half in self.folder.glob(".*.tmp"):
                shutil.rmtree(half, ignore_errors=True)
            if not self._checkpoints():  # nothing to go on from: what a stopped attempt wrote would count twice
                for name in LOGS:
                    (self.folder / name).unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.tracker:
            self.tracker.close()
        if self._lock:
            self._lock.close()
            if not self.begun and {p.name for p in self.folder.iterdir()} == {"lock"}:
                shutil.rmtree(self.folder)
                with contextlib.suppress(OSError):  # other stages lie there
                    self.folder.parent.rmdir()

    @property
    def first(self) -> int:
        """The first step that is still to do."""
        return self._start

    def begin(self) -> None:
        """The inputs are read: from here on the stage leaves a trace."""
        if self.main and not self.begun:
            self.begun = True
            self._begin()

    # what was measured and what was said

    def log(self, step: int, **metrics: float | int | None) -> None:
        """One line of metrics for `step`; the progress bar shows `live`."""
        self.live.update({k: v for k, v in metrics.items() if isinstance(v, int | float)})
        self._append("metrics.jsonl", [{"step": step, **metrics}])
        if self.tracker:
            self.tracker.figures(step, numbers(metrics))

    def show(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Samples for `step`: prompt, completion, score and whatever else is known of each."""
        self._append("samples.jsonl", [{"step": step, **row} for row in rows])
        if self.tracker and rows:
            self.tracker.samples(step, rows)

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self.main:
            console.print(f"  {text}", markup=False)

    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "metrics.jsonl")

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.main and rows:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    # steps, checkpoints, resume

    def steps(self, total: int, *, watch: Sequence[str] = ()) -> Iterator[int]:
        """The steps still to do, under a progress bar with time left and the watched metrics."""
        self.begin()
        with _bar(self.name, total, self._start, self.main) as advance:
            for step in range(self._start, total):
                self.step = step
                yield step
                advance("  ".join(f"{k} {self.live[k]:.3g}" for k in watch if k in self.live))

    def reserve(self, keep: Keep, *, state: int, model: int) -> None:
        """Before the work: how checkpoints are kept, and the bytes of one and of a written model. Raises UserError
        where the disk cannot hold what the stage will write: the checkpoints, one of them twice for a moment, the best
        model and the last one."""
        self.keep, self._state, self._model = keep, state, model
        if self.main:
            have = sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())
            self._room((keep.last + 1) * state + 2 * model + LOGS_NEED - have, f"stage '{self.name}'")

    def checkpoint(self, done: int, save: Callable[[Path], object], *, every: int = 1, best: bool = False) -> None:
        """Called after each step. Where one is due (every so many steps, or by `keep`) and may cost the time, writes
        `checkpoint-{done}` (the state after `done` steps) whole, then drops those that `keep` does not name. `best`:
        this state has the best validation so far. The logs go to the disk first: a checkpoint never knows of steps
        that they lack."""
        if not self.main:
            return
        keep, began = self.keep, time.monotonic()
        self._waiting |= done % every == 0 or (best and keep.best) or (keep.every > 0 and done % keep.every == 0)
        cost = self._state / DISK_SPEED if self._cost is None else self._cost
        if not self._waiting or (keep.share < 1 and self._writing + cost > keep.share * (began - self._began)):
            return
        self._waiting = False
        self._room(self._state, f"checkpoint-{done}")
        for name in LOGS:
            if (self.folder / name).exists():
                sync(self.folder / name)

        def marked(folder: Path) -> None:
            save(folder)
            if best and keep.best:
                (folder / "best").touch()

        write_folder(self.folder / f"checkpoint-{done}", marked)
        found = self._checkpoints()
        for _, folder in found[: -keep.last]:
            if folder not in self._kept():
                shutil.rmtree(folder)
        self._cost = time.monotonic() - began
        self._writing += self._cost

    def _kept(self) -> list[Path]:
        """The checkpoints that stay however old they are, also when the stage is done: the best one, and the first of
        each `keep.every` steps."""
        found = self._checkpoints()
        best = [folder for _, folder in found if (folder / "best").exists()][-1:]
        first: dict[int, Path] = {}
        for step, folder in found if self.keep.every else []:
            first.setdefault(step // self.keep.every, folder)
        return best + [folder for part, folder in first.items() if part]

    def _room(self, need: int, what: str) -> None:
        """Raises UserError where the disk has no `need` bytes left for `what`."""
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise UserError(
                f"{self.folder}: {what} needs {size_of(need)} on the disk, {size_of(free)} are free; {self.stands()}"
            )

    def stands(self) -> str:
        """What a run that stops here can go on from."""
        found = self._checkpoints()
        return f"{found[-1][1].name} is kept, and the same command goes on from it" if found else "no checkpoint yet"

    def resume(self) -> Path | None:
        """The last whole checkpoint, if any; metrics and samples are cut back to it."""
        found = self._checkpoints()
        self._start = found[-1][0] if found else 0
        if self.main:
            for name in LOGS:
                cut_back(self.folder / name, self._start)
            if found:
                self.say(f"goes on after step {self._start}, from {found[-1][1].name}")
        return found[-1][1] if found else None

    def journaled(self, name: str, total: int, chunk: int, answer: Answer) -> list[dict[str, Any]]:
        """A row for each of `total` questions, from `answer(which)` a chunk at a time. Each chunk is on the disk before
        the next is asked; a run that was cut off asks on after them."""
        journal = self.folder / f"journal-{name}.jsonl"
        kept = read_lines(journal)  # a line is a chunk, so that one that was cut off counts for nothing
        rows = [row for line in kept for row in line["rows"]]
        if self.main:
            write_jsonl(journal, kept)
            if kept:
                self.say(f"goes on after {len(rows)} of {total} {name}, from {journal.name}")
        starts = range(len(rows), total, chunk)
        self._start = len(kept)
        for _, start in zip(self.steps(len(kept) + len(starts)), starts, strict=True):
            new = answer(range(start, min(start + chunk, total)))
            self._append(journal.name, [{"rows": new}])
            if self.main:
                sync(journal)
            rows += new
        return rows

    def once(self, name: str, key: str, ask: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """What `ask()` says to the question `key`, on the disk before this returns; one that was asked before, by a run
        that was cut off, is not asked again. In the main process alone."""
        journal = self.folder / f"journal-{name}.jsonl"
        for line in read_lines(journal):
            if line["key"] == key:
                return list(line["rows"])
        rows = ask()
        append_line(journal, {"key": key, "rows": rows})
        return rows

    def _checkpoints(self) -> list[tuple[int, Path]]:
        folders = [p for p in self.folder.glob("checkpoint-*") if p.name.partition("-")[2].isdigit()]
        return sorted((int(p.name.partition("-")[2]), p) for p in folders)

    def clear_checkpoints(self) -> None:
        """A stage that is done needs no state to go on from; what `keep` names beside the last ones stays."""
        if self.main:
            for _, folder in self._checkpoints():
                if folder not in self._kept():
                    shutil.rmtree(folder)
            for journal in self.folder.glob("journal-*.jsonl"):
                journal.unlink()

    # outputs

    def write(self, name: str, save: Callable[[Path], object]) -> Path:
        """A model's folder in this run, written whole by `save(temporary_folder)`."""
        if self.main:
            self.begin()
            self._room(self._model, name)
            write_folder(self.folder / name, save)
        return self.folder / name

    def results(self, data: Mapping[str, Any]) -> None:
        if self.main:
            self.begin()
            write_json(self.folder / "results.json", data)


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """One more line of a JSONL file of ours, on the disk before this returns; it begins a line whatever was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(row))
    sync(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file of ours; a last line that was cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):  # splitlines also splits at U+2028 in a text
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def cut_back(path: Path, start: int) -> None:
    """Keep the rows of steps before `start`: those after it will be written again."""
    if path.exists():
        write_jsonl(path, [row for row in read_lines(path) if row.get("step", 0) < start])


def write_folder(target: Path, save: Callable[[Path], object]) -> None:
    """`save` fills a temporary folder beside `target`, which then takes its name; nothing half-written stays. A folder
    cannot be renamed over one with content, so the one that is replaced steps aside for a moment."""
    temporary, aside = (target.with_name(f".{target.name}.{end}") for end in ("tmp", "old"))
    recover(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save(temporary)
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if number := no_room(error):
            raise OSError(number, os.strerror(number), str(target)) from None
        raise
    if target.exists():
        os.rename(target, aside)
    os.rename(temporary, target)
    sync(target.parent)
    recover(target)


def no_room(error: BaseException | None) -> int | None:
    """The system's number where an error came from a disk, a quota or a file that is full: also under what torch
    raises over it, and in the text of safetensors, which says `os error 28`."""
    while error is not None:
        said = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
        if number in NO_ROOM:
            return number
        error = error.__cause__ or error.__context__
    return None


def size_of(size: float) -> str:
    """1.2 GB, 34 GB, 340 MB, 12 KB."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def recover(target: Path) -> None:
    """Ends a replacement that a kill may have cut off: the old folder goes, or takes its name again where the new one
    has not come."""
    aside = target.with_name(f".{target.name}.old")
    if aside.exists() and not target.exists():
        os.rename(aside, target)
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _bar(name: str, total: int, start: int, main: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar on a terminal; elsewhere a line every ten seconds."""
    if not main:
        yield lambda text: None
    elif console.is_terminal:
        columns = (
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[live]}", markup=False),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(name, total=total, completed=start, live="")
            yield lambda text: progress.update(task, advance=1, live=text)
    else:
        begun = said = time.monotonic()
        done = start

        def advance(text: str) -> None:
            nonlocal said, done
            done += 1
            now = time.monotonic()
            if now - said >= 10 or done == total:
                left = (now - begun) / max(done - start, 1) * (total - done)
                console.print(f"  {name} {done}/{total}  {left:.0f} s left  {text}", markup=False)
                said = now

        yield advance


def versions() -> dict[str, str]:
    """What ran: ours, Python's, the libraries that shape results, and the commit where there is one."""
    out = {"trueup": trueup.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            out[package] = metadata.version(package)
    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if git.returncode == 0:
        out["commit"] = git.stdout.strip()
    return out


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def peak_memory() -> int:
    """This process's highest resident size so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Best:
    """Keeps the best of a run by a validation figure, and says when to stop. State goes into the checkpoint."""

    def __init__(self, run: Run, *, patience: int = 0) -> None:
        """`patience`: how many validations without a better one before `stop` turns True; 0 never stops."""
        self.run, self.patience = run, patience
        self.value: float | None = None
        self.step: int | None = None
        self.since = 0

    def offer(self, step: int, value: float, save: Callable[[Path], object]) -> bool:
        """Lower is better. Writes `best/` where `value` is the lowest so far; returns whether it was. Raises
        FloatingPointError where it is no number."""
        if not math.isfinite(value):
            raise FloatingPointError(f"the validation figure is {value}, the best weights so far are kept")
        if self.value is not None and value >= self.value:
            self.since += 1
            return False
        self.value, self.step, self.since = value, step, 0
        self.run.write("best", save)
        return True

    @property
    def stop(self) -> bool:
        return 0 < self.patience <= self.since

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step, "since": self.since}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.value, self.step, self.since = state["value"], state["step"], state["since"]
