"""The run directory under a kill or a loss of power: nothing half-written, nothing lost, nothing known too early."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from trueup.records import UserError
from trueup.run import Run, write_folder

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc tells which file was synced")


def writer(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "weights").write_text(text)


@needs_proc
def test_a_checkpoint_is_on_the_disk_after_its_logs_and_before_the_older_one_goes(tmp_path, monkeypatch):
    order: list[str] = []
    sync, rename, remove = os.fsync, os.rename, shutil.rmtree

    def note(kind: str, path: object) -> None:
        order.append(f"{kind} {Path(str(path)).relative_to(tmp_path)}")

    with Run(tmp_path / "r", name="r") as run:
        run.log(0, loss=1.0)
        run.show(0, [{"prompt": "p"}])
        run.checkpoint(1, writer("one"))
        run.log(1, loss=0.5)
        monkeypatch.setattr(os, "fsync", lambda fd: (note("sync", os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
        monkeypatch.setattr(os, "rename", lambda a, b: (note("rename", b), rename(a, b)))
        monkeypatch.setattr(shutil, "rmtree", lambda p, **k: (note("remove", p), remove(p, **k)))
        run.checkpoint(2, writer("two"))
    order = [line for line in order if line != "remove r/.checkpoint-2.tmp" and not line.endswith(".old")]
    assert order == [
        "sync r/metrics.jsonl",
        "sync r/samples.jsonl",
        "sync r/.checkpoint-2.tmp/weights",
        "sync r/.checkpoint-2.tmp",
        "rename r/checkpoint-2",
        "sync r",
        "remove r/checkpoint-1",
    ]


@needs_proc
def test_logs_that_are_cut_back_are_on_the_disk_before_they_take_their_name(tmp_path, monkeypatch):
    with Run(tmp_path / "r", name="r") as run:
        run.log(0, loss=1.0)
        run.checkpoint(1, writer("one"))
        run.log(1, loss=0.5)
    synced: list[str] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    with Run(tmp_path / "r", name="r") as run:
        run.resume()
        assert [row["step"] for row in run.metrics()] == [0]
    assert synced == [f"{tmp_path}/r/metrics.jsonl.tmp", f"{tmp_path}/r"]


@pytest.mark.parametrize("fails", [1, 2])
def test_a_replacement_that_is_cut_off_between_its_renames_loses_nothing(tmp_path, monkeypatch, fails):
    run = Run(tmp_path / "r", name="r")
    with run:
        run.write("best", writer("old"))
    rename, calls = os.rename, []

    def cut_off(a: Path, b: Path) -> None:
        calls.append(b)
        if len(calls) == fails:
            raise KeyboardInterrupt
        rename(a, b)

    with monkeypatch.context() as patch, run, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", cut_off)
        run.write("best", writer("new"))
    with run:
        assert (tmp_path / "r" / "best" / "weights").read_text() == "old"
        assert {p.name for p in (tmp_path / "r").iterdir()} == {"best", "lock"}


def test_the_old_folder_comes_back_before_a_new_one_is_written_and_goes_after(tmp_path):
    write_folder(tmp_path / ".best.old", writer("old"))
    with pytest.raises(UserError):
        write_folder(tmp_path / "best", no_room)
    assert (tmp_path / "best" / "weights").read_text() == "old"
    write_folder(tmp_path / ".best.old", writer("older"))
    write_folder(tmp_path / "best", writer("new"))
    assert [(p.name, (p / "weights").read_text()) for p in tmp_path.iterdir()] == [("best", "new")]


def no_room(folder: Path) -> None:
    raise UserError("no room")


def test_a_journal_goes_on_after_its_last_whole_chunk_in_chunks_of_any_size(tmp_path):
    def answer(which: range) -> list[dict]:
        asked.append([*which])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return [{"square": i * i} for i in which]

    asked: list[list[int]] = []
    with Run(tmp_path / "r", name="r") as run, pytest.raises(KeyboardInterrupt):
        run.journaled("squares", 10, 3, answer)
    with open(tmp_path / "r" / "journal-squares.jsonl", "a") as file:
        file.write('{"rows": [{"square": 36}, {"squ')
    with Run(tmp_path / "r", name="r") as run:
        assert run.journaled("squares", 10, 2, answer) == [{"square": i * i} for i in range(10)]
        assert run.journaled("squares", 10, 2, answer) == [{"square": i * i} for i in range(10)]
    assert asked == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [6, 7], [8, 9]]
