"""What the gates' scripts share: seeds side by side and measured elsewhere, and their intervals."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch

from scripts import refresh
from scripts.seeds import over_all, over_seeds, parser_of
from trueup.math import bootstrap_interval

SETTINGS = {"ppo": {"steps": 100, "coefs": (0.0, 0.25)}}


def measure(folder, seed):
    """A seed's figures; and a file that tells that it was measured."""
    import os

    (folder / f"measured-{seed}").write_text(os.environ.get("OMP_NUM_THREADS", "many"))
    return {"gold": seed / 10} if seed < 9 else {}


def run(folder, *said, settings=SETTINGS):
    parser = parser_of(None, ["world"], seeds=3)
    return over_all(parser.parse_args(["world", *said]), folder / "gate.json", settings, partial(measure, folder))


def test_seeds_measured_elsewhere_are_not_run_and_are_written_with_the_others(tmp_path, monkeypatch):
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir(), here.mkdir()
    assert run(there, "--seeds", "1", "2", "9") == {1: {"gold": 0.1}, 2: {"gold": 0.2}}  # 9 has nothing to say yet
    found = run(here, "--with", str(there / "gate.json"))
    assert found == {0: {"gold": 0.0}, 1: {"gold": 0.1}, 2: {"gold": 0.2}}
    assert [p.name for p in here.glob("measured-*")] == ["measured-0"]
    # What is written there can be handed on.
    assert run(tmp_path, "--with", str(here / "gate.json")) == found and not list(tmp_path.glob("measured-*"))


def test_seeds_are_run_side_by_side_with_a_thread_each(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    assert list(run(tmp_path, "--jobs", "2", "--seeds", "4", "0", "2")) == [4, 0, 2]
    assert {p.read_text() for p in tmp_path.glob("measured-*")} == {"1"}


@pytest.mark.parametrize(
    ("content", "said", "message"),
    [
        (None, [], "elsewhere.json: no such file"),
        ("{", [], "elsewhere.json: not what this script writes"),
        ('{"0": {}}', [], "elsewhere.json: not what this script writes"),
        (
            {"settings": {"ppo": {"steps": 50, "coefs": [0.0, 0.25]}}, "seeds": {}},
            [],
            "elsewhere.json: measured with another 'ppo': .*50.* there, .*100.* here",
        ),
        ({"settings": {**SETTINGS, "sft": {}}, "seeds": {}}, [], "another 'sft': {} there, None here"),
        ({"settings": SETTINGS, "seeds": {"7": {}}}, [], r"seed 7 is not among the seeds \[0, 1, 2\]"),
    ],
)
def test_a_file_that_does_not_belong_is_refused(tmp_path, content, said, message):
    path = tmp_path / "elsewhere.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, "--with", str(path))
    assert not list(tmp_path.glob("measured-*"))


def test_a_seed_in_two_files_is_refused(tmp_path):
    path = tmp_path / "elsewhere.json"
    path.write_text(json.dumps({"settings": SETTINGS, "seeds": {"1": {"gold": 0.1}}}))
    with pytest.raises(SystemExit, match="seed 1 is in another file too"):
        run(tmp_path, "--with", str(path), str(path))


def test_what_a_gate_writes_it_reads_again(tmp_path, monkeypatch, capsys):
    figures = {
        str(seed): {"sft": {"gold": 0.5}} | {n: {"gold": g} for n, g in (("1", 0.7), ("4", 0.75), (refresh.ONE, 0.74))}
        for seed in range(3)
    }
    settings = refresh.recipe_of("world", 0).stages
    path = tmp_path / "elsewhere.json"
    path.write_text(json.dumps({"settings": settings, "seeds": figures}))
    words = ["x", "world", "--seeds", "0", "1", "2", "--with", str(path), "--runs", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    refresh.main()
    assert capsys.readouterr().out.endswith("G9: PASS\n")
    assert json.loads((tmp_path / "refresh-world.json").read_text())["seeds"] == figures
    monkeypatch.setattr("sys.argv", [*words, "--draw", "1000"])
    with pytest.raises(SystemExit, match="another 'world'"):
        refresh.main()


def test_intervals_are_students_below_six_seeds_and_resampled_from_there():
    gains = [0.1, 0.2, 0.4, 0.3, 0.0, 0.1]
    three = over_seeds(gains[:3])
    half = 4.30265 * float(torch.tensor(gains[:3]).std()) / math.sqrt(3)
    assert three == pytest.approx((0.7 / 3 - half, 0.7 / 3 + half), abs=1e-4)
    assert over_seeds(gains) == pytest.approx([float(x) for x in bootstrap_interval(torch.tensor(gains), seed=0)])
    assert over_seeds(gains[:1]) is None
