"""Trackers: what they hold is what the run logged; off by default; a missing package is one line; a key of no stage."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.commands import Command
from tests.test_recipe import SFT
from tests.toy import metrics
from trueup.recipe import load_recipe, resolve, run_recipe
from trueup.records import UserError

KEYS = {**SFT, "seed": 31, "samples": 4}


def track(toy: Path, monkeypatch, kind: str | None, name: str):
    monkeypatch.chdir(toy)
    recipe = {"name": name, "device": "cpu", "stages": {"sft": KEYS}} | ({"track": kind} if kind else {})
    return run_recipe(load_recipe(recipe), Path("runs"))[0]


def test_tensorboard_holds_the_figures_and_the_samples(toy, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed; it is in the extra `dev`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = track(toy, monkeypatch, None, "untracked")
    assert not (plain.folder / "tensorboard").exists()
    stage = track(toy, monkeypatch, "tensorboard", "tracked")
    assert stage.key == plain.key and stage.done
    events = EventAccumulator(str(stage.folder / "tensorboard")).Reload()
    for name in ("loss", "validation_loss", "grad_norm"):
        told = [(e.step, e.value) for e in events.Scalars(name)]
        logged = [(row["step"], row[name]) for row in metrics(stage) if name in row]
        assert [s for s, _ in told] == [s for s, _ in logged]
        assert [v for _, v in told] == pytest.approx([v for _, v in logged], rel=1e-6)
    said = [json.loads(line) for line in (stage.folder / "samples.jsonl").open()]
    (text,) = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("samples/text_summary")]
    assert len(text.splitlines()) == 2 + len(said) > 3 and all(row["prompt"] in text for row in said)
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| train.optim.lr | 0.003 |" in config


def test_a_run_that_goes_on_tells_each_step_once(toy, monkeypatch):
    """What it had told after its last checkpoint is taken back."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed; it is in the extra `dev`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from trueup.run import Run

    log = Run.log

    def stops(self, step, **figures):
        log(self, step, **figures)
        if step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "log", stops)
        track(toy, monkeypatch, "tensorboard", "tracked-twice")
    stage = track(toy, monkeypatch, "tensorboard", "tracked-twice")
    events = EventAccumulator(str(stage.folder / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [row["step"] for row in metrics(stage)]


def test_wandb_offline_holds_them(toy, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed; it is in the extra `dev`")
    monkeypatch.setenv("WANDB_MODE", "offline")
    stage = track(toy, monkeypatch, "wandb", "wandb-run")
    (kept,) = (stage.folder / "wandb").glob("offline-run-*")
    (table,) = (kept / "files" / "media" / "table").glob("samples_*.table.json")
    found = json.loads(table.read_text())
    said = [json.loads(line) for line in (stage.folder / "samples.jsonl").open()]
    assert [row[found["columns"].index("prompt")] for row in found["data"]] == [row["prompt"] for row in said]
    (file,) = kept.glob("run-*.wandb")
    deadline = time.monotonic() + 60  # a process of wandb's own writes it
    while b"validation_loss" not in file.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert file.stat().st_size > 1000 and b"validation_loss" in file.read_bytes()


def test_trackio_holds_them(toy, monkeypatch, tmp_path):
    """In a process of its own: trackio reads where its files go when it is imported."""
    pytest.importorskip("trackio", reason="trackio is not installed; it is in the extra `dev`")
    (toy / "trackio.yaml").write_text(
        json.dumps({"name": "trackio-run", "device": "cpu", "track": "trackio", "stages": {"sft": KEYS}})
    )
    code, said = Command(toy, "run", "trackio.yaml", env={"TRACKIO_DIR": str(tmp_path)}).wait()
    assert code == 0, said
    import sqlite3

    (base,) = tmp_path.glob("trackio-run*.db")
    rows = [
        (step, json.loads(text)) for step, text in sqlite3.connect(base).execute("select step, metrics from metrics")
    ]
    (stage,) = (toy / "runs" / "trackio-run").glob("sft-*")
    logged = [json.loads(line) for line in (stage / "metrics.jsonl").open()]
    assert [(s, r["loss"]) for s, r in sorted(rows, key=lambda r: r[0]) if "loss" in r] == [
        (r["step"], pytest.approx(r["loss"])) for r in logged
    ]
    assert [r["samples"] for _, r in rows if "samples" in r]


def test_a_tracker_that_is_not_installed_is_one_line_and_nothing_runs(toy, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="track: wandb is not installed; pip install wandb"):
        track(toy, monkeypatch, "wandb", "untold")
    assert not (toy / "runs" / "untold").exists()


def test_an_unknown_tracker_is_refused(toy):
    with pytest.raises(UserError, match="key 'track': Input should be 'tensorboard', 'trackio' or 'wandb'"):
        resolve(load_recipe({"name": "n", "track": "mlflow", "stages": {"sft": KEYS}}), toy)
