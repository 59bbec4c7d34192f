"""Constitutions: what is read, what is asked, which principle is drawn, what answers come to; and the local model."""

from __future__ import annotations

import random
from dataclasses import asdict

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trueup.data.chat import Chat
from trueup.judges import make_judge
from trueup.judges.asking import Answer, Asking, Manner, Question
from trueup.judges.constitution import Constitution, Example, Principle, fill, read_constitution
from trueup.judges.local import Local, LocalModel
from trueup.records import Comparison, Completion, Prompt, UserError, Verdict
from trueup.world import base_path
from trueup.world import corpus as c
from trueup.world.answers import core
from trueup.world.build import verdicts as world_verdicts
from trueup.world.tasks import any_task, any_wording

PAIR = Comparison(Prompt.of("Why?", category="x"), (Completion("Because."), Completion("No idea.")))
TWO = Constitution(
    name="two",
    ask="{conversation}|{a}|{b}|{question}",
    principles=(
        Principle(name="kind", question=("Kinder?",), weight=3),
        Principle(name="true", question=("Truer?",), weight=1, categories=("x", "y")),
    ),
)

MEND = Principle(name="mild", question=("?",), critique="What is unkind?", revision="Be kinder.")


class Told:
    """Answers by a table of the principle and the order: P(A)."""

    name = "told"

    def __init__(self, table):
        self.table, self.asked = table, []

    def answer(self, questions: list[Question]) -> list[Answer]:
        self.asked += questions
        return [Answer(self.table[q.principle, q.swapped], f"{q.principle}{q.swapped}", 0.5) for q in questions]


def test_a_question_shows_the_pair_in_the_order_that_it_says():
    told = Told({("kind", False): 0.9, ("kind", True): 0.3, ("true", False): 0.6, ("true", True): 0.2})
    [verdict] = Asking(TWO, told, Manner(principles="all")).judge([PAIR])
    assert [q.text for q in told.asked] == [
        "User: Why?|Because.|No idea.|Kinder?",
        "User: Why?|No idea.|Because.|Kinder?",
        "User: Why?|Because.|No idea.|Truer?",
        "User: Why?|No idea.|Because.|Truer?",
    ]
    # kind: (.9 + (1 - .3)) / 2 = .8; true: (.6 + (1 - .2)) / 2 = .7; by weights (3 x .8 + 1 x .7) / 4 = .775
    assert verdict.p == pytest.approx(0.775)
    assert verdict.principles == pytest.approx({"kind": 0.8, "true": 0.7})
    assert verdict.orders == pytest.approx({False: 0.75, True: 0.75})  # (.9 + .6) / 2 and (.7 + .8) / 2
    assert verdict.spread == pytest.approx(0.05) and verdict.cost == 2.0 and verdict.readable
    assert [r.raw for r in verdict.readings] == ["kindFalse", "kindTrue", "trueFalse", "trueTrue"]
    assert len({r.prompt_hash for r in verdict.readings}) == 4
    assert Verdict.of(asdict(verdict)) == verdict


def test_an_unreadable_order_takes_its_principle_out_and_an_unreadable_all_the_verdict():
    table = {("kind", False): None, ("kind", True): 0.1, ("true", False): 0.6, ("true", True): 0.2}
    [verdict] = Asking(TWO, Told(table), Manner(principles="all")).judge([PAIR])
    assert verdict.p == pytest.approx(0.7) and not verdict.readable and verdict.principles["kind"] is None
    [verdict] = Asking(TWO, Told({**table, ("true", True): None}), Manner(principles="all")).judge([PAIR])
    assert verdict.p is None and verdict.note == "unreadable"


def test_a_category_without_a_principle_gets_no_verdict():
    only = TWO.model_copy(update={"principles": TWO.principles[1:]})
    other = Comparison(Prompt.of("Why?", category="z"), PAIR.completions)
    told = Told({("true", False): 0.6, ("true", True): 0.2})
    first, second = Asking(only, told, Manner()).judge([other, PAIR])
    assert first.p is None and first.note == "no principle for category z" and second.p == pytest.approx(0.7)


def test_one_principle_is_drawn_by_weight_whatever_the_order_and_kept():
    pairs = [Comparison(Prompt.of(f"{i}?", category="x"), PAIR.completions) for i in range(400)]
    drawn = [TWO.drawn(p, 0)[0].name for p in pairs]
    assert 0.68 < np.mean([name == "kind" for name in drawn]) < 0.82
    turned = [Comparison(p.prompt, p.completions[::-1]) for p in pairs]
    assert drawn == [TWO.drawn(p, 0)[0].name for p in turned]
    assert drawn != [TWO.drawn(p, 1)[0].name for p in pairs]


def test_thoughts_clamp_the_verdict_and_nothing_else_does():
    sure = Told({("kind", False): 0.99, ("kind", True): 0.01, ("true", False): 0.99, ("true", True): 0.01})
    assert Asking(TWO, sure, Manner()).judge([PAIR])[0].p == pytest.approx(0.99)
    assert Asking(TWO, sure, Manner(thought=True)).judge([PAIR])[0].p == 0.6
    turned = Comparison(PAIR.prompt, PAIR.completions[::-1])
    low = Told({key: 1 - p for key, p in sure.table.items()})
    assert Asking(TWO, low, Manner(thought=True)).judge([turned])[0].p == 0.4
    assert Asking(TWO, sure, Manner(thought=True, clamp=(0.2, 0.8))).judge([PAIR])[0].p == 0.8
    assert Asking(TWO, sure, Manner(orders=1)).judge([PAIR])[0].orders == {False: 0.99}


def test_what_an_answer_says_is_not_taken_for_a_mark():
    text = fill(TWO.ask, conversation="{b}", a="{question}", b="{a}", question="Which?")
    assert text == "{b}|{question}|{a}|Which?"
    assert TWO.criticism("{reply}", "{request}", MEND) == (
        "{reply}\n\nAssistant: {request}\n\nCritique request: What is unkind?\n\nCritique:"
    )


def test_a_revision_follows_its_critique_and_examples_come_before():
    shown = {"conversation": "User: Hm?", "reply": "No.", "principle": "mild", "critique": "Curt.", "revision": "Yes?"}
    told = Constitution(name="x", ask=TWO.ask, principles=(MEND,), revisions=[shown])
    assert told.revised() == (
        "User: Hm?\n\nAssistant: No.\n\nCritique request: What is unkind?\n\nCritique: Curt."
        "\n\nRevision request: Be kinder.\n\nRevision: Yes?\n\n"
    )
    assert TWO.revised() == "" and told.revising(MEND) == "\n\nRevision request: Be kinder.\n\nRevision:"


def test_a_reply_is_mended_under_a_principle_that_concerns_it_and_has_requests():
    rare = Principle(name="rare", question=("?",), critique="c", revision="r", weight=0.25, categories=("x",))
    told = TWO.model_copy(update={"principles": (*TWO.principles, MEND, rare)})
    prompts = [Prompt.of(f"{i}?", category="x") for i in range(400)]
    drawn = [told.mending(p, "No.", 0).name for p in prompts]
    assert set(drawn) == {"mild", "rare"} and 0.72 < np.mean([name == "mild" for name in drawn]) < 0.88
    assert drawn == [told.mending(p, "No.", 0).name for p in prompts]
    assert drawn != [told.mending(p, "No.", 1).name for p in prompts]
    assert drawn != [told.mending(p, "Yes.", 0).name for p in prompts]
    assert {told.mending(Prompt.of(f"{i}?"), "No.", 0).name for i in range(50)} == {"mild"}
    assert TWO.mending(prompts[0], "No.", 0) is None


def test_the_default_constitution_asks_what_it_should():
    told = read_constitution("default")
    names = [p.name for p in told.principles]
    assert {"helpful", "harmless", "honest", "undeceiving", "not-evasive", "not-preachy", "concise"} < set(names)
    mass = next(p for p in told.principles if p.name == "no-mass-harm")
    assert "biological" in mass.question[0] and mass.weight == max(p.weight for p in told.principles)
    assert all(p.critique and p.revision for p in told.principles)
    shown = told.shown(thought=True)
    assert shown.count(told.think) == shown.count(told.verdict) == len(told.examples)
    assert {e.better for e in told.examples} == {"A", "B"}
    assert told.think not in told.shown(thought=False)
    assert told.revised().count("Revision:") == len(told.revisions) >= 3
    asked = Asking(told, Told({}), Manner()).questions(PAIR)[0]
    assert asked.text.startswith(told.shown(thought=False)) and asked.text.count("Reply (A): Because.") == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ask": "{a} {b} {question}"}, r"key 'ask' lacks \{conversation\}"),
        ({"criticize": "{request}"}, r"key 'criticize' lacks \{conversation\}, \{reply\}"),
        ({"revise": "Better:"}, r"key 'revise' lacks \{request\}"),
        (
            {"principles": [{"name": "x", "question": "?", "critique": "c"}]},
            "'x' has a critique request and no revision request",
        ),
        (
            {"principles": [{"name": "x", "question": "?", "revision": "c"}]},
            "'x' has a revision request and no critique request",
        ),
        (
            {"revisions": [{k: "" for k in ("conversation", "reply", "critique", "revision")} | {"principle": "y"}]},
            "an example is of principle 'y'",
        ),
        (
            {"revisions": [{k: "" for k in ("conversation", "reply", "critique", "revision")} | {"principle": "x"}]},
            "shown under 'x', which has no critique request",
        ),
        ({"principles": []}, "key 'principles'"),
        ({"principles": [{"name": "x"}]}, "'x' needs one of the keys 'question' and 'likely'"),
        ({"principles": [{"name": "x", "question": "?", "likely": "{prompt}{reply}"}]}, "'x' needs one of the keys"),
        ({"principles": [{"name": "x", "likely": "{prompt}"}]}, r"key 'likely' needs \{reply\} once"),
        ({"principles": [{"name": "x", "likely": "{reply}{prompt}"}]}, r"and before it \{conversation\} or \{prompt\}"),
        ({"principles": [{"name": "x", "likely": "{prompt}{reply}{reply}"}]}, r"key 'likely' needs \{reply\} once"),
        ({"principles": [{"name": "x", "likely": "{prompt}{reply}", "temperature": 0}]}, "temperature"),
        (
            {
                "principles": [{"name": "x", "likely": "{prompt}{reply}"}],
                "examples": [{"conversation": "", "a": "", "b": "", "principle": "x", "better": "A"}],
            },
            "an example is of principle 'x', which asks no question",
        ),
        ({"principles": [{"name": "x", "question": "?"}] * 2}, "two principles are named 'x'"),
        ({"principles": [{"name": "x", "question": "?", "wieght": 2}]}, "did you mean"),
        (
            {"examples": [{"conversation": "", "a": "", "b": "", "principle": "y", "better": "A"}]},
            "an example is of principle 'y'",
        ),
    ],
)
def test_a_wrong_constitution_is_told(tmp_path, change, message):
    import yaml

    good = {"name": "x", "ask": TWO.ask, "principles": [{"name": "x", "question": "?"}]}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(good))
    assert read_constitution(str(path)).principles[0].question == ("?",)
    path.write_text(yaml.safe_dump({**good, **change}))
    with pytest.raises(UserError, match=message):
        read_constitution(str(path))
    with pytest.raises(UserError, match="built-in ones: default, world, world-help"):
        read_constitution("nowhere")


@pytest.mark.parametrize("chat", [False, True])
def test_p_is_what_plain_transformers_gives(tiny, mesh, chat):
    """softmax over the two letters' log-probs, each summed from where the two texts part; of an assistant after the
    question as a user's message."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    question = Question("which one? a or b", "", "it is:", "p", False)
    opening = Chat.load(tiny).prompt_ids([{"role": "user", "content": question.text}]) if chat else []
    sums = []
    for letter in "AB":
        said = f"{question.verdict} ({letter})"
        text = said if chat else f"{question.text}\n{said}"
        ids = torch.tensor([[*opening, *tokenizer(text, add_special_tokens=not chat)["input_ids"]]])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        sums.append(logprobs.sum().item())
    [answer] = LocalModel(Local(model=str(tiny), chat=chat), mesh).answer([question])
    assert answer.p == pytest.approx(torch.tensor(sums).softmax(0)[0].item(), abs=1e-5)
    assert abs(answer.p - 0.5) > 1e-3
    long = Question("word " * 5000, "", "it is:", "p", False)
    found = LocalModel(Local(model=str(tiny), chat=chat), mesh).answer([long, question])
    assert found[0].p is None and "longer than" in found[0].raw and found[1].p == pytest.approx(answer.p, abs=1e-5)


def test_how_likely_a_reply_is_is_what_plain_transformers_gives(tiny, mesh):
    """Each reply's log-probs summed, with what follows it, whether it shares its beginning with the other or not."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)

    def sums(texts, start):
        out = []
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            out.append(logprobs[len(tokenizer(start)["input_ids"]) - 1 :].sum().item())
        return torch.tensor(out)

    judge = LocalModel(Local(model=str(tiny)), mesh)
    some = (("yes", "no it is not"), ("the one", "the one or the other"), ("it is so", "it is not"))
    for replies, after in [(r, "\nQ:") for r in some] + [(some[1], "")]:
        question = Question("Q: which one?\nA: ", "", after, "p", False, replies, 3.0)
        [answer] = judge.answer([question])
        expected = (
            (sums([f"Q: which one?\nA: {r}{after}" for r in replies], "Q: which one?\nA:") / 3).softmax(0)[0].item()
        )
        assert answer.p == pytest.approx(expected, abs=1e-5) and abs(answer.p - 0.5) > 1e-3
    assert judge.answer([Question("Q: which?\nA: ", "", "\n", "p", False, ("so", "so"))])[0].p == 0.5


def test_an_assistant_weighs_replies_with_its_own_end_token(tiny, mesh):
    talk = Chat.load(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    sums = []
    for reply in ("yes", "no it is not"):
        start, said = talk.prompt_ids([{"role": "user", "content": "Be kind.\nUser: Why?\n"}]), talk.reply_ids(reply)
        ids = torch.tensor([[*start, *said]])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        sums.append(logprobs[len(start) - 1 :].sum().item())
    kind = Principle(name="kind", likely="Be kind.\n{conversation}\n{reply}")
    told = TWO.model_copy(update={"principles": (kind,)})
    pair = Comparison(Prompt.of("Why?"), (Completion("yes"), Completion("no it is not")))
    [verdict] = Asking(told, LocalModel(Local(model=str(tiny), chat=True), mesh), Manner()).judge([pair])
    assert verdict.p == pytest.approx(torch.tensor(sums).softmax(0)[0].item(), abs=1e-5)


def test_a_principle_that_weighs_replies_is_put_once_and_shows_no_example():
    seen = Example(conversation="", a="1", b="2", principle="kind", better="A")
    likely = Principle(name="apt", likely="Q: {prompt}\nA: {reply}\n", temperature=2.0)
    told = TWO.model_copy(update={"principles": (TWO.principles[0], likely), "examples": (seen,)})
    answers = Told({("kind", False): 0.9, ("kind", True): 0.3, ("apt", False): 0.6})
    talk = Prompt(({"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "So."}, *PAIR.prompt.messages))
    [verdict] = Asking(told, answers, Manner(principles="all", thought=True, clamp=(0, 1))).judge(
        [Comparison(talk, PAIR.completions)]
    )
    assert [(q.principle, q.swapped) for q in answers.asked] == [("kind", False), ("kind", True), ("apt", False)]
    apt = answers.asked[-1]
    assert (apt.text, apt.think, apt.verdict) == ("Q: Why?\nA: ", "", "\n")
    assert (apt.replies, apt.temperature) == (("Because.", "No idea."), 2.0)
    assert apt.hash != Question(apt.text, "", apt.verdict, "apt", False, ("No idea.", "Because.")).hash
    assert verdict.p == pytest.approx((3 * 0.8 + 0.6) / 4)
    assert verdict.orders == pytest.approx({False: 0.9, True: 0.7})  # of the principle that has two


def test_a_server_is_not_asked_how_likely_a_reply_is(mesh):
    with pytest.raises(UserError, match="principle 'correct' of constitution 'world-help' weighs how likely"):
        make_judge({"constitution": "world-help", "endpoint": "http://localhost:1/v1", "model": "x"}, mesh)


def test_the_worlds_model_finds_the_wrong_answer_the_less_likely_one(mesh):
    """Where it cannot say which of the two is more helpful (docs/world.md)."""
    rng = random.Random(0)
    pairs = []
    for category in ("arithmetic", "fact", "string", "list"):
        for _ in range(25):
            task = any_task(rng, category)
            texts = [core(task, quality, rng) for quality in ("right", "wrong")]
            prompt = Prompt.of(any_wording(task, rng), category=category)
            pairs.append(Comparison(prompt, (Completion(texts[0]), Completion(texts[1]))))
    judge = make_judge({"constitution": "world-help", "model": str(base_path())}, mesh)
    found = [v.p for v in judge.judge(pairs)]
    assert np.mean([p > 0.5 for p in found]) > 0.8, found


def test_thoughts_are_sampled_shown_and_repeat(tiny, mesh):
    question = Question("which one? a or b", "Thought:", "it is:", "p", False)
    plain = Question("which one? a or b", "", "it is:", "p", False)
    judge = LocalModel(Local(model=str(tiny), max_tokens=12), mesh, seed=3)
    thoughtful, quick = judge.answer([question, plain])
    assert thoughtful.raw and not quick.raw and thoughtful.p != quick.p
    assert judge.answer([question, plain])[0] == thoughtful
    assert LocalModel(Local(model=str(tiny), max_tokens=12), mesh, seed=4).answer([question])[0].raw != thoughtful.raw


def test_a_thought_does_not_depend_on_what_else_is_asked(tiny, mesh):
    questions = [Question(f"which one of {i}? a or b", "Thought:", "it is:", "p", False) for i in range(3)]
    judge = LocalModel(Local(model=str(tiny), max_tokens=12), mesh)
    together = [a.raw for a in judge.answer(questions)]
    assert together == [judge.answer([q])[0].raw for q in questions] and len(set(together)) == 3


def test_what_is_written_depends_on_text_seed_and_index_and_tells_whether_it_ended(tiny, mesh):
    model = LocalModel(Local(model=str(tiny)), mesh)
    texts = [f"number {i}:" for i in range(4)]

    def write(texts, index, seed=0, tokens=20, stop=()):
        return model.write(texts, max_tokens=tokens, stop=stop, seed=seed, index=index)

    four = write(texts, range(4))
    assert [w for i in (3, 1, 0, 2) for w in write([texts[i]], [i])] == [four[i] for i in (3, 1, 0, 2)]
    assert write(texts, range(4), seed=1) != four != write(texts, range(4, 8))
    assert not any(w.ended for w in write(texts, range(4), tokens=1)) and all(w.cost == 0 for w in four)
    letter = next(w.text[1] for w in four if len(w.text) > 2)
    cut = write(texts, range(4), stop=(letter,))
    assert all(letter not in w.text for w in cut) and any(w.ended and w not in four for w in cut)
    [nothing] = write(["word " * 5000], [0])
    assert nothing.text == "" and not nothing.ended and not nothing.fits and all(w.fits for w in four)


def test_the_built_in_base_model_judges_by_the_world_s_constitution(mesh):
    """The same log-odds as the world's own measure, and right on nearly all pairs of both categories."""
    rng = random.Random("judged")
    pairs, signs = [], []
    while len(pairs) < 40:
        category, principle = (("harmful", "harm"), ("unknown", "honest"))[len(pairs) % 2]
        task, a, b = c.judging_pair(rng, category)
        if more := c.differs(principle, task, a, b):
            prompt = Prompt.of(c.any_wording(task, rng), category=category)
            pairs.append(Comparison(prompt, (Completion(a.text), Completion(b.text))))
            signs.append(more > 0 if principle == "honest" else more < 0)
    judge = make_judge({"constitution": "world", "model": str(base_path())}, mesh)
    verdicts = judge.judge(pairs)
    assert np.mean([(v.p > 0.5) == sign for v, sign in zip(verdicts, signs, strict=True)]) >= 0.9
    assert all(-1e-9 < v.p < 1 + 1e-9 and v.readable and len(v.readings) == 2 for v in verdicts)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base_path()).eval(),
        AutoTokenizer.from_pretrained(base_path()),
    )
    asked = judge.questions(pairs[0])[0]
    phrase = asked.text.split("Which response is ")[1].rstrip("?")
    first = pairs[0]
    odds = world_verdicts(model, tokenizer, [(first.prompt.text, *(x.text for x in first.completions), phrase)])[0]
    logits = [np.log(r.p / (1 - r.p)) for r in verdicts[0].readings]
    assert np.mean(logits) == pytest.approx(odds, abs=2e-3)


def test_a_wrong_key_of_a_judge_is_told(tiny, mesh):
    with pytest.raises(UserError, match="did you mean 'thought'"):
        make_judge({"constitution": "default", "model": str(tiny), "thoughts": True}, mesh)
