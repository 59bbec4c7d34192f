"""Checkpoints: which ones stay, what they may cost, and a disk that is full."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from tests.test_recipe import SFT, count, finished, killed, made_by, same_end, start
from tests.toy import run as run_stages
from trueup.records import UserError
from trueup.run import Keep, Run

KEEP = {"last": 2, "best": True, "every": 5, "share": 1}


def write(folder: Path) -> None:
    (folder / "state").write_text("state")


def names(folder: Path) -> list[int]:
    return sorted(int(p.name.partition("-")[2]) for p in folder.glob("checkpoint-*"))


def test_the_last_ones_the_best_one_and_each_so_many_steps_stay(tmp_path):
    with Run(tmp_path / "r", name="r") as run:
        run.reserve(Keep(last=2, best=True, every=5, share=1), state=0, model=0)
        for done in range(1, 15):
            run.checkpoint(done, write, every=3, best=done in (2, 7))
    # written: 3, 6, 9, 12 by `every=3`; 2, 7 as the best; 5, 10 by `keep.every`
    assert names(tmp_path / "r") == [5, 7, 10, 12]
    with Run(tmp_path / "r", name="r") as run:
        run.reserve(Keep(last=2, best=True, every=5, share=1), state=0, model=0)
        assert run.resume() == tmp_path / "r" / "checkpoint-12"
        run.checkpoint(13, write, best=True)
        assert names(tmp_path / "r") == [5, 10, 12, 13]
        run.clear_checkpoints()
    assert names(tmp_path / "r") == [5, 10, 13]


def test_checkpoints_take_no_more_than_their_share_of_the_time_and_wait_for_it(tmp_path):
    took: list[float] = []

    def slow(folder: Path) -> None:
        began = time.monotonic()
        time.sleep(0.03)
        took.append(time.monotonic() - began)

    with Run(tmp_path / "r", name="r") as run:
        run.reserve(Keep(last=1000, share=0.1), state=10_000_000, model=0)  # a first one is thought to take 0.02 s
        began = time.monotonic()
        for done in range(1, 1000):
            run.checkpoint(done, slow, every=10)
            if not took:
                assert time.monotonic() - began < 0.25
            time.sleep(0.005)
            if time.monotonic() - began > 2:
                break
        spent = time.monotonic() - began
    assert sum(took) <= 0.1 * spent + 0.03  # the last one may take longer than the one before
    assert len(took) >= 3 and names(tmp_path / "r")[0] > 10
    assert any(step % 10 for step in names(tmp_path / "r"))  # what is due is written as soon as it may be


def test_the_rule_changes_no_result_and_a_kept_checkpoint_leads_to_the_same_end(toy):
    plain = run_stages(toy, {"sft": SFT}, name="keep-plain")["sft"]
    kept = run_stages(toy, {"sft": {**SFT, "train": {**SFT["train"], "keep": KEEP}}}, name="keep-all")["sft"]
    assert kept.key == plain.key
    stays = names(kept.folder)
    assert {5, 10} <= set(stays) and len(stays) > 3
    for step in stays:
        (kept.folder / f"checkpoint-{step}").rename(toy / f"aside-{step}")
    same_end(plain.folder, kept.folder)

    (toy / "aside-5").rename(kept.folder / "checkpoint-5")
    for name in ("final", "best"):
        shutil.rmtree(kept.folder / name)
    record = json.loads((kept.folder / "manifest.json").read_text())
    (kept.folder / "manifest.json").write_text(json.dumps({**record, "status": "stopped"}))
    run_stages(toy, {"sft": SFT}, name="keep-all")
    same_end(plain.folder, kept.folder)


@pytest.mark.parametrize("call", ["reserve", "checkpoint", "write"])
def test_a_disk_without_room_is_found_before_anything_is_written(tmp_path, call):
    with Run(tmp_path / "r", name="sft") as run:
        run.checkpoint(4, write)
        run.reserve(Keep(share=1), state=0, model=0)
        if call != "reserve":
            run._state = run._model = 1 << 60
        with pytest.raises(UserError) as told:
            if call == "reserve":
                run.reserve(Keep(share=1), state=1 << 58, model=1 << 58)
            elif call == "checkpoint":
                run.checkpoint(5, write)
            else:
                run.write("final", write)
        assert "are free; checkpoint-4 is kept, and the same command goes on from it" in str(told.value)
        assert {p.name for p in (tmp_path / "r").iterdir()} == {"lock", "checkpoint-4"}


def test_a_disk_that_fills_up_ends_in_one_line_and_the_last_checkpoint_is_kept(toy):
    """The system's own refusal: no file may grow beyond 300 KiB, and a checkpoint of the toy has more."""
    keys = {**SFT, "seed": 21, "train": {**SFT["train"], "epochs": 2}}
    whole = run_stages(toy, {"sft": keys}, name="room")["sft"].folder
    assert killed(toy, "sft", keys, "no-room", lambda made: count(made / "metrics.jsonl") >= 5)
    made = made_by(toy, "sft", "no-room")
    (before,) = names(made)
    code, said = start(toy, "sft", keys, "no-room", largest=300).wait()
    (line,) = [text for text in said.splitlines() if text.startswith("trueup: ")]
    assert code == 2 and "Traceback" not in said, said
    assert f"File too large; checkpoint-{before} is kept, and the same command goes on from it" in line
    assert names(made) == [before] and not list(made.glob(".*"))
    same_end(whole, finished(toy, "sft", keys, "no-room"))
