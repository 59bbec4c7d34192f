"""Critique and revision, and feedback by the same constitution: the built-in world's base model does both."""

from __future__ import annotations

import json

import pytest

from tests.judges.server import Server
from tests.toy import results, rows, run
from trueup import world
from trueup.data.readers import read_demonstrations, read_preferences
from trueup.phases.critique import tables
from trueup.recipe import load_recipe, run_recipe
from trueup.records import Completion, Prompt, UserError
from trueup.report import write_report
from trueup.store import Store

PROMPT = Prompt.of("Why?")
CATEGORIES = ("harmful", "unknown", "fact")
TOLD = """
name: half
ask: "{conversation}|{a}|{b}|{question}"
criticize: "{conversation}\\nAssistant: {reply}\\nCritique request: {request}\\nCritique:"
revise: "\\nRevision request: {request}\\nRevision:"
stop: ["\\n"]
principles:
  - name: harmless
    categories: [harmful, unknown]
    question: "?"
    critique: Say what is harmful in this reply.
    revision: Rewrite the reply so that it does no harm.
  - {name: right, categories: [fact], question: "?"}
"""


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


@pytest.fixture(scope="module")
def asked() -> list[dict]:
    """Sixteen prompts of each of three categories."""
    found = world.prompts("preference", 700, 0)
    some = [[p for p in found if p.category == c][:16] for c in CATEGORIES]
    return [{"prompt": p.text, "category": p.category} for part in some for p in part]


@pytest.fixture
def keys(toy, asked):
    rows(toy / "asked.jsonl", asked)
    (toy / "half.yaml").write_text(TOLD)
    base = str(world.base_path())
    return {
        "model": base,
        "prompts": {"path": "asked.jsonl", "categories": ["harmful", "unknown"]},
        "helpful": {"path": "asked.jsonl", "categories": ["fact"]},
        "constitution": "half.yaml",
        "by": {"model": base},
        "sampling": {"max_tokens": 32},
    }


def test_revisions_do_less_harm_and_each_round_mends_the_one_before(toy, keys):
    stage = run(toy, {"critique": {**keys, "rounds": 2, "audit": "trueup.world:gold"}})["critique"]
    found, written = results(stage), read(stage.folder / "critiques.jsonl")
    first, once, twice = (a["by_category"] for a in found["audit"])
    assert once["harmful"] > first["harmful"] + 0.2 and twice["harmful"] > 0.5
    assert first["fact"] == once["fact"] == twice["fact"]
    # what stands in the file is what was measured
    harmful = [row for row in written if row["category"] == "harmful"]
    for part, version in ((first, answer), (twice, last)):
        gold = world.gold().score([prompt(r) for r in harmful], [version(r) for r in harmful]).value
        assert gold.mean() == pytest.approx(part["harmful"])
    # a revision of the second round was asked for under the first one's, not under the answer
    again = run(toy, {"critique": {**keys, "rounds": 1}})["critique"]
    assert [r["rounds"][:1] for r in read(again.folder / "critiques.jsonl")] == [r["rounds"][:1] for r in written]
    assert all([p["principle"] for p in r["rounds"]] == ["harmless"] * 2 for r in written)
    assert {r["category"] for r in written} == {"harmful", "unknown"}
    assert sum(r["rounds"][0]["critique"].startswith("The reply ") for r in harmful) > 10


def answer(row: dict) -> Completion:
    return Completion(row["completion"], row["stop"])


def last(row: dict) -> Completion:
    return Completion(usable(row)[-1]) if usable(row) else answer(row)


def prompt(row: dict) -> Prompt:
    return Prompt(tuple(row["prompt"]), {"category": row["category"]})


def test_every_answer_is_accounted_for(toy, keys):
    """A revision that was cut teaches nothing, and what no principle concerns is counted."""
    (toy / "half.yaml").write_text(TOLD.replace("[harmful, unknown]", "[harmful]"))
    stage = run(toy, {"critique": {**keys, "rounds": 2, "max_tokens": 16, "n": 2}})["critique"]
    found, written = results(stage), read(stage.folder / "critiques.jsonl")
    assert found["answers"] == len(written) == 64 and found["prompts"] == 32
    for number, told in enumerate(found["rounds"]):
        parts = [r["rounds"][number] for r in written if r["rounds"]]
        assert told["principles"] == {"harmless": 32} and told["revised"] + told["unusable"] == 32
        assert told["no_principle"] == 32 == sum(r["category"] == "unknown" for r in written)
        assert told["unusable"] == sum(not p["usable"] for p in parts) > 5
        assert told["revised"] == sum(p["usable"] for p in parts) > 5
    demonstrations = read_demonstrations(stage.folder / "demonstrations.jsonl").records
    texts = [(r["prompt"][0]["content"], t) for r in written for t in dict.fromkeys(usable(r))]
    assert [(d.prompt.text, d.reply) for d in demonstrations] == texts and len(texts) == found["demonstrations"]
    better = read_preferences(stage.folder / "comparisons.jsonl").records
    pairs = [(r["prompt"][0]["content"], usable(r)[-1], answer(r)) for r in written if usable(r)]
    pairs = [p for p in pairs if p[1] != p[2].text]
    assert [(p.prompt.text, p.chosen.text, p.rejected) for p in better] == pairs and len(pairs) == found["comparisons"]
    assert {p.rejected.ended for p in better} == {True, False} and all(p.chosen.ended for p in better)
    kept = read_demonstrations(stage.folder / "helpful.jsonl").records
    assert found["helpful"] == len(kept) > 5 and {d.prompt.category for d in kept} == {"fact"}
    assert len(kept) < 2 * found["helpful_prompts"]["prompts"] == 32  # two answers each, of which some do not end
    said = read(stage.folder / "samples.jsonl")
    assert {r["side"] for r in said} == {
        "answer", "critique 1, harmless", "revision 1", "critique 2, harmless", "revision 2",
    }  # fmt: skip


def test_a_revision_that_comes_twice_teaches_once():
    rounds = [{"principle": "x", "critique": "", "revision": t, "usable": t != "C"} for t in ("A", "A", "B", "C")]
    made = tables([PROMPT], [Completion("first")], [[r] for r in rounds])
    assert [r["completion"] for r in made["demonstrations"]] == ["A", "B"]
    assert [(r["chosen"], r["rejected"]) for r in made["comparisons"]] == [("B", "first")]
    assert not tables([PROMPT], [Completion("A")], [[rounds[0]]])["comparisons"]  # mended into itself
    assert len(made["critiques"][0]["rounds"]) == 4 and made["helpful"] == []
    three = [Completion("first"), Completion("kept"), Completion("cut", "length")]
    made = tables([PROMPT] * 3, three, [[rounds[0]]])
    assert [r["completion"] for r in made["helpful"]] == ["kept"] and len(made["critiques"]) == 1


def usable(row: dict) -> list[str]:
    return [p["revision"] for p in row["rounds"] if p["usable"]]


def test_a_run_that_was_cut_off_goes_on_and_ends_the_same(toy, keys, asked):
    """Behind a server, whose answers are counted, and which refuses once in the second round."""
    rows(toy / "asked.jsonl", asked[:4] + asked[-2:])
    server = Server(world.base_path())
    server.answers = [f"said {i}." for i in range(40)]
    by = {"endpoint": server.url, "model": "x", "parallel": 1, "tries": 1, "price_out": 1e6}
    keys = {**keys, "by": {**by, "cache": str(toy / "a.sqlite")}, "rounds": 2, "chunk": 2}
    try:
        whole = run(toy, {"critique": keys})["critique"]
        assert results(whole)["cost"] == 16 * 3 and len(server.bodies) == 16
        server.answers = [f"said {i}." for i in range(40)]
        server.faults = [*[None] * 10, 400]
        keys["by"] = {**by, "cache": str(toy / "b.sqlite")}
        with pytest.raises(UserError, match="HTTP 400"):
            run(toy, {"critique": keys})
        again = run(toy, {"critique": keys})["critique"]
        assert len(server.bodies) == 16 + 17  # the refused one twice, and no other
        for name in ("critiques", "demonstrations", "comparisons", "helpful"):
            assert read(again.folder / f"{name}.jsonl") == read(whole.folder / f"{name}.jsonl")
        asked_of_first = server.bodies[4]["messages"][0]["content"]
        assert "Assistant: said " in server.bodies[8]["messages"][0]["content"] and "said" not in asked_of_first
    finally:
        server.stop()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"constitution": "none.yaml"}, "constitution none.yaml: no such file"),
        ({"constitution": "bare.yaml"}, "constitution bare.yaml: no principle has a critique and a revision request"),
        ({"by": {"modle": "x"}}, "'modle'; did you mean 'model'"),
        ({"by": {"model": "nowhere"}}, "nowhere"),
        ({"prompts": {"path": "asked.jsonl", "categories": ["none"]}}, "categories there: fact, harmful, unknown"),
        ({"max_prompt": 1}, "every prompt has more than 1 tokens"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(toy, keys, change, message):
    (toy / "bare.yaml").write_text(BARE)
    with pytest.raises(UserError, match=message):
        run(toy, {"critique": {**keys, **change}})


BARE = """
name: bare
ask: "{conversation}|{a}|{b}|{question}"
principles: [{name: x, question: "?"}]
"""


def test_ai_feedback_is_generate_and_judge_in_one(toy, keys):
    """The same answers, the same verdicts; as comparisons of kind `ai` beside people's, by category."""
    base = keys["model"]
    given = {"model": base, "prompts": keys["prompts"], "sampling": {"max_tokens": 40}}
    stages = run(
        toy,
        {
            "feedback": {
                "phase": "ai-feedback", **given, "constitution": "world", "by": keys["by"],
                "store": "prefs.sqlite", "audit": "trueup.world:gold",
            },
            "answers": {"phase": "generate", **given, "n": 2},
            "labels": {
                "phase": "judge", "completions": "@answers/completions.jsonl", "overlap": 0,
                "judge": {"constitution": "world", "model": base},
            },
            "dpo": {
                "model": base, "data": "@feedback/comparisons.jsonl", "samples": 0, "held_out": 0.2,
                "train": {"epochs": 2, "batch": 8, "optim": {"lr": 1e-3}}, "sampling": {"max_tokens": 4},
            },
        },
    )  # fmt: skip
    feedback, labels = stages["feedback"], stages["labels"]
    own, other = (read_preferences(s.folder / "comparisons.jsonl").records for s in (feedback, labels))
    assert [p.chosen.text for p in own] == [p.chosen.text for p in other] and len(own) > 20
    assert [p.label for p in own] == pytest.approx([p.label for p in other], abs=1e-5)
    assert {p.prompt.category for p in own} == {"harmful", "unknown"} and len({p.label for p in own}) > 20
    found = results(feedback)
    assert found["sampled"]["prompts"] == 32 and found["sampled"]["dropped"] == {"of other categories": 16}
    assert found["label_accuracy"] > 0.6 and found["comparisons"] == len(own)
    kept = Store(toy / "prefs.sqlite").preferences()
    assert {j.kind for j in kept} == {"ai"} and len(kept) == len(own)
    learned = results(stages["dpo"])
    assert not learned["dropped"] and learned["validation_loss"] < 0.692  # of soft labels: ln 2 at the start


def test_where_nobody_is_named_the_model_itself_criticizes_and_judges_as_an_assistant(toy, keys):
    few = {"path": "asked.jsonl", "categories": ["harmful"]}
    shared = {"model": "sft/final", "prompts": few, "limit": 6, "constitution": "half.yaml"}
    shared["sampling"] = {"max_tokens": 12}
    found = []
    for by in ({}, {"by": {"model": "sft/final", "chat": True}}):
        stages = {
            "critique": {**shared, **by, "max_tokens": 8},
            "feedback": {"phase": "ai-feedback", **shared, **by},
        }
        done = run(toy, stages, name=f"itself-{len(by)}")
        critiques = read(done["critique"].folder / "critiques.jsonl")
        found.append((critiques, [p["label"] for p in read(done["feedback"].folder / "comparisons.jsonl")]))
    assert found[0] == found[1] and len(found[0][1]) > 3
    plain = run(toy, {"feedback": {"phase": "ai-feedback", **shared, "by": {"model": "sft/final"}}}, name="plainly")
    assert [p["label"] for p in read(plain["feedback"].folder / "comparisons.jsonl")] != found[0][1]


def test_ai_feedback_may_set_a_models_answers_against_anothers(toy, keys):
    given = {"phase": "ai-feedback", "prompts": keys["prompts"], "constitution": "world", "by": keys["by"]}
    given |= {"model": "sft/final", "against": keys["model"], "limit": 12, "sampling": {"max_tokens": 12}}
    stage = run(toy, {"feedback": {**given, "against_share": 1.0}}, name="against")["feedback"]
    lines = (stage.folder / "completions.jsonl").read_text().splitlines()
    said = [[c["model"] for c in json.loads(line)["completions"]] for line in lines]
    assert said == [["sft/final", keys["model"]]] * 12 and results(stage)["comparisons"] > 6


@pytest.mark.long
def test_the_recipe_makes_an_aligned_model_from_a_constitution(tmp_path):
    """Cut small. No person's label is of a harmful or unknown prompt; the constitution's are of all."""
    small = ["world.demonstrations=1200", "world.prompts=500", "critique.limit=100", "ppo.steps=4", "evaluate.limit=60"]
    small += ["ppo.watch.every=2"]
    stages = {s.name: s for s in run_recipe(load_recipe("constitution", [*small, "device=cpu"]), tmp_path)}
    first, mended = (part["by_category"]["harmful"] for part in results(stages["critique"])["audit"])
    assert mended > first + 0.2
    by_people, by_ai = (
        {p.prompt.category for p in read_preferences(stages[name].folder / "comparisons.jsonl").records}
        for name in ("comparisons", "feedback")
    )
    assert len(by_ai) == 7 and by_ai - by_people == {"harmful", "unknown"}
    assert len(results(stages["reward"])["mix"]) == 2
    kept = Store(tmp_path / "constitution/preferences.sqlite").preferences()
    assert {j.comparison.prompt.category for j in kept if j.kind == "simulated"} == by_people
    assert {j.comparison.prompt.category for j in kept if j.kind == "ai"} == by_ai
    watch = results(stages["ppo"])["watch"]
    assert watch["act"] == "back" and watch["asked"] > 0
    harmful = [m["sampled"]["gold_by_category"]["harmful"] for m in results(stages["evaluate"])["models"].values()]
    assert harmful[2] > harmful[1]  # revised, sft
    page = write_report(tmp_path / "constitution").read_text(encoding="utf-8")
    assert "revisions of" in page and "critique 1, harmless" in page
