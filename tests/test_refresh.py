"""The reward model refreshed: pairs from the present policy, judged, added, trained on, round after round."""

from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console

from tests.toy import QUESTIONS, constant, metrics, results, run
from trueup.report.closing import rounds_table
from trueup.report.page import render
from trueup.report.read import read_run
from trueup.store import Store

STAGES = {
    "answers": {
        "phase": "generate",
        "model": "sft/final",
        "prompts": "prompts.jsonl",
        "n": 2,
        "limit": 60,
        "draw": True,
        "sampling": {"max_tokens": 20},
    },
    "comparisons": {
        "phase": "judge",
        "completions": "@answers/completions.jsonl",
        "judge": "toyrules:gold",
        "kind": "simulated",
        "overlap": 0.0,
        "store": "@run/preferences.sqlite",
    },
    "reward": {
        "model": "sft/final",
        "data": "@comparisons*/comparisons.jsonl",
        "held_out": 0.3,
        "sampling": {"max_tokens": 20},
        "train": {"epochs": 1, "batch": 8, "optim": constant(1e-3)},
    },
    "ppo": {
        "model": "sft/final",
        "scorer": "@reward/final",
        "prompts": "prompts.jsonl",
        "audit": "toyrules:gold",
        "batch": 16,
        "steps": 3,
        "sampling": {"max_tokens": 20},
    },
    "refresh": {
        "phase": "rounds",
        "times": 2,
        "stages": {
            "answers": {"model": "@ppo/final", "against": "sft/final", "against_share": 0.5},
            "comparisons": {},
            "reward": {},
            "ppo": {},
        },
    },
}


@pytest.fixture(scope="module")
def made(toy):
    return run(toy, STAGES, name="refreshed")


def rows(stage, name="comparisons.jsonl"):
    return [json.loads(line) for line in (stage.folder / name).read_text().splitlines()]


def test_each_reward_model_learns_from_all_comparisons_so_far(toy, made):
    counts = [results(made[n])["comparisons"] for n in ("comparisons", "comparisons-2", "comparisons-3")]
    assert all(counts)
    by_data = results(made["reward-3"])["by_data"]
    assert list(by_data) == [str(made[n].folder / "comparisons.jsonl") for n in made if n.startswith("comparisons")]
    assert sum(part["pairs"] for part in by_data.values()) == results(made["reward-3"])["pairs"]
    mean = sum(p["accuracy"] * p["pairs"] for p in by_data.values()) / results(made["reward-3"])["pairs"]
    assert mean == pytest.approx(results(made["reward-3"])["accuracy"])
    assert "by_data" not in results(made["reward"])
    assert list(results(made["reward-2"])["mix"].values())[1] < counts[1]  # some are held out


def test_the_store_holds_every_verdict_with_where_it_came_from(toy, made):
    kept = Store(toy / "runs/refreshed/preferences.sqlite").preferences()
    for name in ("comparisons", "comparisons-2", "comparisons-3"):
        assert sum(j.origin == made[name].folder.name for j in kept) == results(made[name])["comparisons"]
    assert {j.kind for j in kept} == {"simulated"}


def test_half_of_the_pairs_are_against_the_start(toy, made):
    answered = rows(made["answers-2"], "completions.jsonl")
    assert all(set(a) >= {"model"} for row in answered for a in row["completions"])
    policy, start = str(made["ppo"].folder / "final"), "sft/final"
    models = [[a["model"] for a in row["completions"]] for row in answered]
    assert {tuple(m) for m in models} == {(policy, policy), (policy, start)}
    assert 0.3 < sum(m[1] == start for m in models) / len(models) < 0.7
    # other prompts are drawn in the next round
    asked = [{row["prompt"][0]["content"] for row in rows(made[f"answers-{k}"], "completions.jsonl")} for k in (2, 3)]
    assert asked[0] != asked[1] and len(asked[0]) == 60 < len(QUESTIONS)


def test_what_each_round_cost_and_gave_is_told(toy, made):
    table = rounds_table(read_run(toy / "runs/refreshed"))
    assert table is not None
    console = Console(width=120, record=True, file=StringIO())
    console.print(table)
    said = console.export_text()
    spent = 0
    for k, name in enumerate(("comparisons", "comparisons-2", "comparisons-3"), 1):
        spent += results(made[name])["comparisons"]
        (line,) = [x.split() for x in said.splitlines() if x.strip().startswith(f"{k} ")]
        assert line[1] == str(spent)
        assert line[-1] == f"{results(made['ppo' if k == 1 else f'ppo-{k}'])['audit']:.2f}"
        row = f'<tr><th scope="row">{line[0]}</th>' + "".join(f"<td>{x}</td>" for x in line[1:])
        assert row in render(read_run(toy / "runs/refreshed"))
    assert rounds_table(read_run(toy / "runs/made")) is None


def test_a_second_call_finds_all_rounds_done(toy, made, capsys):
    again = run(toy, STAGES, name="refreshed")
    assert capsys.readouterr().out.count("done before") == len(again) == 12
    assert {n: s.folder for n, s in again.items()} == {n: s.folder for n, s in made.items()}


def test_where_ppo_goes_on_it_begins_at_the_last_policy_and_kl_is_from_sft(toy):
    """Before a round's first update the policy is the last round's: its KL from SFT is there at once."""
    ppo = {**STAGES["ppo"], "kl_coef": 0.0, "optim": constant(1e-3)}
    again = {"answers": {"model": "@ppo/final"}, "comparisons": {}, "reward": {}}

    def rounds(times: int, **keys) -> dict:
        stages = {**again, "ppo": {"model": "@ppo/final", **keys}}
        laid = {**STAGES, "ppo": ppo, "refresh": {"phase": "rounds", "times": times, "stages": stages}}
        return run(toy, laid, name="goes-on")

    made = rounds(2, reference="sft/final")
    one, two, three = (made[name] for name in ("ppo", "ppo-2", "ppo-3"))
    assert [s.config.model for s in (two, three)] == [str(s.folder / "final") for s in (one, two)]
    assert {s.config.reference for s in (two, three)} == {"sft/final"}
    starts = [metrics(stage)[0]["kl_k3"] for stage in (one, two, three)]
    assert starts[0] < 1e-5 and 1e-3 < starts[1] < starts[2], starts
    alone = rounds(1)["ppo-2"]  # without a reference the start of the round would be it, and the KL lost
    assert alone.folder != two.folder and metrics(alone)[0]["kl_k3"] < 1e-5


def test_an_odd_number_of_answers_is_refused(toy):
    from trueup.records import UserError

    with pytest.raises(UserError, match="n must be even, not 3"):
        run(toy, {"answers": {**STAGES["answers"], "against": "base", "n": 3}})
