"""The alarm: a proxy that is exploited is seen by the audits, an honest one is not; what is done, kept and resumed."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.test_recipe import same_end
from tests.toy import metrics, results, run
from trueup.records import Comparison, Completion, Prompt, UserError
from trueup.report.diagnosis import ERROR, diagnose
from trueup.report.page import write_report
from trueup.report.read import read_run
from trueup.watch import Watch, Watcher, held_at, kl_at_next, kl_budget, phrases

PPO = {
    "phase": "ppo",
    "model": "sft/final",
    "scorer": "reward/final",
    "prompts": "prompts.jsonl",
    "batch": 16,
    "steps": 6,
    "missing_eos_score": -3.0,
    "sampling": {"max_tokens": 20},
    "kl_coef": 0.0,
    "optim": {"lr": 1e-3},
}
OPINIONS = '''
import numpy as np
from trueup.records import Scores, Verdict

class Dislikes:
    """A judge to whom whatever the proxy likes is the worse answer."""
    name = "dislikes"
    def judge(self, comparisons):
        return [Verdict(float("blue" not in c.completions[0].text), "d") for c in comparisons]

class Shy:
    """Abstains always."""
    name = "shy"
    def judge(self, comparisons):
        return [Verdict(None, "s") for _ in comparisons]
'''


@pytest.fixture
def opinions(toy):
    (toy / "opinions.py").write_text(OPINIONS)
    return toy


@pytest.fixture
def second(toy):
    """The reward model under another name: as it is the proxy itself, what is measured by it is known."""
    if not (toy / "second").exists():
        (toy / "second").symlink_to(toy / "reward")
    return toy


def watched(judge="toyrules:gold", **watch):
    return {**PPO, "watch": {"judge": judge, "labels": 90, "every": 2, "kl_budget": None, **watch}}


def test_an_exploited_proxy_is_stopped_and_the_start_is_what_is_delivered(opinions):
    stage = run(opinions, {"ppo": watched("opinions:Dislikes", act="back")}, name="exploited")["ppo"]
    found, log = results(stage), metrics(stage)
    alarm = found["watch"]["alarm"]
    assert alarm["rule"] == "gap" and found["steps"] == alarm["step"] == log[-1]["step"] < PPO["steps"]
    assert [row["alarm"] for row in log] == [0.0] * alarm["step"] + [1.0]
    assert log[-1]["gap_low"] > 0 and log[-1]["audited_win_rate"] < 0.5 < log[-1]["predicted_win_rate"]
    # the labels that were left went to the versions so far, and none of them beats the start
    assert found["watch"]["delivered"] == 0 and log[-1]["audit_labels"] < found["watch"]["labels"] <= 90
    assert [c["step"] for c in found["watch"]["checks"]] == list(range(2, alarm["step"] + 1, 2))
    assert max(c["audited"] for c in found["watch"]["checks"]) < 0.5
    weights = [
        (opinions / where / "model.safetensors").read_bytes()
        for where in (f"{stage.folder}/final", f"{stage.folder}/snapshots/0")
    ]
    assert weights[0] == weights[1] != (stage.folder / f"snapshots/{alarm['step']}/model.safetensors").read_bytes()


def test_an_honest_proxy_sets_off_no_alarm_and_every_label_is_spent(second):
    stage = run(second, {"ppo": watched(heldout="second/final")}, name="honest")["ppo"]
    found, log = results(stage), metrics(stage)
    assert found["watch"]["alarm"] is None and found["steps"] == 6 and len(log) == 7
    assert [c["step"] for c in found["watch"]["checks"]] == [2, 4, 6]
    assert sum(c["pairs"] for c in found["watch"]["checks"]) == found["watch"]["labels"] == 90
    last = log[-1]
    assert set(last) <= {
        "step",
        "alarm",
        "audit_labels",
        "audit_pairs",
        "audited_win_rate",
        "predicted_win_rate",
        "gap",
        "gap_low",
        "gap_high",
        "win_rate_drop",
    }
    assert last["gap_low"] < last["gap"] < last["gap_high"] and abs(last["gap"]) < 0.2
    assert (
        last["audited_win_rate"] > 0.6
        and found["watch"]["delivered"] == 6
        and not (stage.folder / "snapshots").exists()
    )
    # what needs no judge is logged at every step, from the start's own answers
    assert all({"length_drift", "style_share", "heldout_gain", "gain/a", "gain/b"} <= set(row) for row in log[:-1])
    for i, name in ((0, "heldout_gain"), (0, "length_drift"), (0, "gain/a")):
        assert abs(log[i][name]) < 0.6
    assert log[5]["heldout_gain"] > 0.5
    # the held-out model is the proxy here: s.d. of the start's own answers instead of the model's own unit
    assert log[5]["heldout_gain"] - log[0]["heldout_gain"] == pytest.approx(log[5]["score"] - log[0]["score"], rel=0.3)
    assert all(row["heldout_disagreement"] < 0.2 for row in log[:-1])


def test_models_that_hold_the_opposite_disagree(second):
    """Both in s.d. of the start's answers: of z and -z the s.d. is sqrt(2) |z|, about 1.1 in the mean."""
    stage = run(second, {"ppo": {**watched(heldout={"second/final": -1.0}), "steps": 2}}, name="opposite")["ppo"]
    assert 0.7 < metrics(stage)[0]["heldout_disagreement"] < 1.5


def test_audited_pairs_are_among_the_samples_with_both_opinions(second):
    stage = run(second, {"ppo": watched(heldout="second/final")}, name="honest")["ppo"]
    rows = [json.loads(line) for line in (stage.folder / "samples.jsonl").open()]
    audited = [r for r in rows if r["step"] == 6 and "side" in r]
    assert len(audited) == 60 and {r["side"] for r in audited} == {"policy", "start"}
    for mine, theirs in zip(audited[::2], audited[1::2], strict=True):
        assert mine["prompt"] == theirs["prompt"] and mine["completion"] != theirs["completion"]
        blue = ["blue" in r["completion"] for r in (mine, theirs)]
        assert mine["wins"] == (0.5 if blue[0] == blue[1] else float(blue[0])) == 1 - theirs["wins"]
        assert mine["promised"] == pytest.approx(1 - theirs["promised"])
    assert len({r["prompt"] for r in audited}) == 30


def test_what_the_proxy_promises_is_the_sigmoid_of_its_raw_scores(toy, mesh):
    from trueup.scorers import logits_of, make_scorer

    proxy = make_scorer(str(toy / "reward/final"), mesh)
    pair = [Completion("the sky is blue."), Completion("yes please")]
    asked = [Prompt.of("what is the colour of aa?")] * 2
    scores = proxy.score(asked, pair)
    found = logits_of(proxy, scores)
    assert found[0] - found[1] == pytest.approx((scores.value[0] - scores.value[1]) * float(proxy.net.std))
    # the very model in plain transformers, as it was trained
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(toy / "reward/final", num_labels=1).eval()
    tokens = AutoTokenizer.from_pretrained(toy / "reward/final")
    raw = []
    for one in pair:
        ids = proxy.chat.prompt_ids(asked[0].messages) + proxy.chat.reply_ids(one.text, one.ended)
        raw.append(model(torch.tensor([ids])).logits.item())
    assert tokens and found[0] - found[1] == pytest.approx(raw[0] - raw[1], abs=1e-4)
    shutil.copytree(toy / "reward/final", toy / "copy", dirs_exist_ok=True)
    twice = make_scorer({"ensemble": [str(toy / "reward/final"), str(toy / "copy")]}, mesh)
    assert logits_of(twice, twice.score(asked, pair)) == pytest.approx(found)
    rule = make_scorer({str(toy / "reward/final"): 1.0}, mesh)
    assert logits_of(rule, rule.score(asked, pair)) is None


def test_a_kl_budget_needs_no_judge(toy):
    keys = {**PPO, "watch": {"kl_budget": 0.02, "every": 2, "act": "back"}}
    stage = run(toy, {"ppo": keys}, name="budget")["ppo"]
    found, log = results(stage), metrics(stage)
    assert found["watch"]["alarm"]["rule"] == "kl" and found["watch"]["alarm"]["step"] == found["steps"] == 5
    assert np.mean([row["kl"] for row in log[:5]]) > 0.02 and log[5] == {"step": 5, "alarm": 1}
    assert [row["alarm"] for row in log] == [0, 0, 0, 0, 0, 1] and found["watch"]["delivered"] == 4
    ends = [stage.folder / where / "model.safetensors" for where in ("final", "snapshots/4", "snapshots/5")]
    assert ends[0].read_bytes() == ends[1].read_bytes() != ends[2].read_bytes()


def test_a_run_that_stops_ends_with_the_version_at_which_the_alarm_came(toy):
    def ended(act: str):
        keys = {**PPO, "watch": {"kl_budget": 0.02, "every": 2, "act": act}, "snapshots": [4, 5]}
        return run(toy, {"ppo": keys}, name=f"act-{act}")["ppo"]

    stage, on = ended("stop"), ended("warn")
    found = results(stage)
    assert found["steps"] == 5 and found["watch"]["alarm"]["rule"] == "kl" and found["watch"]["alarm"]["step"] == 5
    assert found["watch"]["act"] == "stop" and found["watch"]["delivered"] == 5
    assert [row["step"] for row in metrics(stage)] == [0, 1, 2, 3, 4, 5]
    assert results(on)["steps"] == results(on)["watch"]["delivered"] == 6  # it would have gone on

    def weights(where: str, of=stage) -> bytes:
        return (of.folder / where / "model.safetensors").read_bytes()

    assert weights("final") == weights("snapshots/5") == weights("snapshots/5", on)
    assert weights("final") not in (weights("snapshots/4"), weights("final", on))
    said = [f.what for f in diagnose(read_run(stage.folder.parent)) if f.name == "alarm"]
    assert len(said) == 1 and said[0].startswith("the alarm was set off at step 5: PPO stopped there")


def test_the_budget_is_where_another_nat_gains_less_than_is_known():
    for answers in (1000, 8774, 120_000):
        d = kl_budget(answers)
        # A win rate of 3/4 that grew as sqrt(d); two standard errors of one that is known from answers x e^-d.
        gain = (0.25 * np.sqrt((d + 1e-6) / d) - 0.25) / 1e-6
        assert gain == pytest.approx(2 * 0.5 / np.sqrt(answers * np.exp(-d)), rel=1e-5)
    assert kl_budget(8774) == pytest.approx(2.84, abs=0.005)
    assert kl_budget(100) == kl_budget(2) == 1.0


def test_kl_is_foretold_as_the_square_of_a_way_at_an_even_speed():
    rising = [(0.1 * i) ** 2 for i in range(30)]
    assert kl_at_next(rising[:4], 10) is None
    assert kl_at_next(rising[:5], 10) == pytest.approx((0.4**2, 0.9**2))  # no further ahead than five steps
    assert kl_at_next(rising, 3) == pytest.approx((2.9**2, 3.2**2))
    assert kl_at_next(rising, 100) == pytest.approx((2.9**2, 3.9**2))
    assert kl_at_next([9.0] * 20 + rising[:10], 10) == pytest.approx((0.9**2, 1.9**2))  # ten steps are looked at
    assert kl_at_next(rising[9::-1], 10) == pytest.approx((0.0, 0.0), abs=1e-9)  # a fall is not foretold
    assert kl_at_next([-0.1] * 6, 10) == (0.0, 0.0)  # an estimate of a KL of 0 may be below it
    assert kl_at_next([1.0, 9.0] * 5, 10) == pytest.approx(((2 + 4.5 * 5 / 82.5) ** 2, (2 + 14.5 * 5 / 82.5) ** 2))


def test_a_penalty_holds_the_policy_which_goes_ever_slower():
    """What climbs a gain of a s less b s^2, s = sqrt(KL), with any step size r: s' = s + r (a - 2 b s)."""
    a, b, r = 0.8, 0.25, 0.1
    way = [0.0]
    while len(way) < 60:
        way.append(way[-1] + r * (a - 2 * b * way[-1]))
    kl = [s * s for s in way]
    rest = held_at(a * way[20], 0.0, way[20], b)
    assert rest == pytest.approx(a / (2 * b))
    now, then = kl_at_next(kl[:20], 10, rest)
    assert then == pytest.approx(kl[29], rel=0.1) and now == pytest.approx(kl[19], rel=0.05)
    assert kl_at_next(kl[:20], 10)[1] > 1.25 * kl[29]  # at an even speed it would go farther
    assert kl_at_next(kl[:20], 10, 100.0)[1] == pytest.approx(kl_at_next(kl[:20], 10)[1], rel=0.01)
    now, then = kl_at_next(kl[:20], 10, way[10])  # beyond where it is held it goes no farther
    assert then == now > way[10] ** 2
    assert held_at(1.0, 0.0, 1.0, 0.0) == np.inf
    assert held_at(1.0, 0.1, 2.0, 0.5) == pytest.approx(0.8 / 2 / 1.0) and held_at(1.0, 0.6, 2.0, 0.5) == 0


def test_the_alarm_knows_what_the_penalty_will_hold():
    """At every step: from the gain over the start in the last five, its error there and at the start, and their KL."""
    watcher = Watcher.__new__(Watcher)
    watcher.config, watcher.budget, watcher.heldout, watcher.alarm = Watch(every=10), None, None, None
    watcher.last, watcher.recent, watcher.length, watcher.phrases = [], [], (1.0, 1.0), Counter()
    watcher.own, watcher.said, watcher.by_category = (0.3, 1.5), 256, {}
    rng = np.random.default_rng(0)
    scores = [0.3 + 0.2 * i + rng.normal(size=32) for i in range(12)]
    kl = [(0.1 * i) ** 2 + 0.01 for i in range(12)]
    for step in range(12):
        rollout = SimpleNamespace(
            completions=[Completion("yes", ids=(1,))] * 32,
            prompts=[Prompt(({"role": "user", "content": "q"},))] * 32,
            scores=torch.tensor(scores[step]),
            k1=torch.full((32, 4), kl[step] / 4, dtype=torch.float64),
        )
        found = watcher.follow(step, rollout, None, 0.5).get("kl_ahead")
        some = range(max(0, step - 4), step + 1)
        gain, way = np.mean([scores[i].mean() - 0.3 for i in some]), np.mean([np.sqrt(kl[i]) for i in some])
        error = np.sqrt(sum(scores[i].var() / 32 for i in some) / len(some) ** 2 + 1.5**2 / 256)
        wanted = kl_at_next(kl[: step + 1], 10, held_at(gain, error, way, 0.5))
        assert found == (None if wanted is None else pytest.approx(wanted[1]))
    assert found < 0.8 * kl_at_next(kl, 10)[1]  # it matters here


def test_ppo_tells_the_alarm_its_penalty(toy):
    ends = {}
    for coef in (0.0, 50.0):
        keys = {**PPO, "kl_coef": coef, "steps": 6, "watch": {"kl_budget": 1e9, "every": 2}}
        log = [row for row in metrics(run(toy, {"ppo": keys}, name=f"held-{coef}")["ppo"]) if "kl" in row]
        assert ["kl_ahead" in row for row in log] == [False] * 4 + [True] * 2
        ends[coef] = log[-1]["kl_ahead"], kl_at_next([row["kl"] for row in log], 2)
    assert ends[0.0][0] == pytest.approx(ends[0.0][1][1], rel=1e-5)
    now, free = ends[50.0][1]
    assert free > 1.01 * now and ends[50.0][0] == pytest.approx(now, rel=1e-5)  # it is beyond where it is held


def test_a_budget_of_its_own_comes_from_what_the_proxy_learned_from(toy, mesh):
    """Of so many answers e^-KL are like those of a policy at that KL."""
    config = json.loads((toy / "reward/final/config.json").read_text())
    pairs = {(json.loads(line)["prompt"]) for line in (toy / "pairs.jsonl").open()}
    answers = config["trueup"]["answers"]
    assert 2 * 0.6 * len(pairs) < answers <= 2 * len(pairs) and answers % 2 == 0  # two to each, a fifth held out
    shutil.copytree(toy / "reward/final", toy / "wise", dirs_exist_ok=True)
    config["trueup"]["answers"] = 7000
    (toy / "wise/config.json").write_text(json.dumps(config))
    keys = {**watched(kl_budget="auto", labels=1), "scorer": "wise", "steps": 4}
    found = results(run(toy, {"ppo": keys}, name="wise")["ppo"])["watch"]
    assert found["kl_budget"] == pytest.approx(kl_budget(7000)) and [c["pairs"] for c in found["checks"]] == [0, 1]
    keys = {**watched(kl_budget="auto", labels=9), "scorer": "toyrules:blue", "steps": 2}
    assert results(run(toy, {"ppo": keys}, name="wise")["ppo"])["watch"]["kl_budget"] is None


def test_a_warning_is_said_and_changes_nothing_else(opinions, capsys):
    plain = run(opinions, {"ppo": PPO}, name="unwatched")["ppo"]
    capsys.readouterr()
    stage = run(opinions, {"ppo": watched("opinions:Dislikes")}, name="warned")["ppo"]
    said = capsys.readouterr().out
    assert "ALARM at step" in said and "promised more wins" in said
    assert results(stage)["steps"] == 6 and results(stage)["watch"]["delivered"] == 6
    ends = [(s.folder / "final/model.safetensors").read_bytes() for s in (plain, stage)]
    assert ends[0] == ends[1]
    assert [r["score"] for r in metrics(plain)] == [r["score"] for r in metrics(stage)[:-1]]
    first = results(stage)["watch"]["alarm"]["step"]
    found = diagnose(read_run(stage.folder.parent))
    [alarm] = [f for f in found if f.name == "alarm"]
    assert (alarm.severity, alarm.what) == (
        ERROR,
        f"the alarm was set off at step {first}: PPO went on, as act=warn says",
    )
    assert "promised more wins over the start than the judge gives" in alarm.figure
    page = write_report(stage.folder.parent).read_text()
    assert f"Alarm at step {first} (dotted)" in page and "wins over the start, promised and audited" in page
    assert [r["alarm"] for r in metrics(stage)] == [float(s >= first) for s in range(7)]


def test_without_logits_the_win_rate_alone_can_set_it_off(opinions):
    keys = {**watched("opinions:Dislikes"), "scorer": "toyrules:blue"}
    log = metrics(run(opinions, {"ppo": keys}, name="rule")["ppo"])
    assert "gap" not in log[-1] and "audited_win_rate" in log[-1] and "win_rate_drop" in log[-1]


def test_a_judge_that_abstains_on_all_is_not_asked_for_ever(opinions):
    stage = run(opinions, {"ppo": watched("opinions:Shy", act="back", every=3)}, name="shy")["ppo"]
    found = results(stage)["watch"]
    assert found["labels"] == 0 < found["asked"] <= 180 and found["alarm"] is None
    assert results(stage)["watch"]["delivered"] == 6 and "audited_win_rate" not in metrics(stage)[-1]


def test_cut_off_at_an_audit_the_judge_is_not_asked_again(toy):
    keys = {**watched("toyrules:shy", labels=30), "save_every": 3, "keep": {"share": 1}}
    (toy / "asked.txt").unlink(missing_ok=True)
    whole = run(toy, {"ppo": keys}, name="audited-at-once")["ppo"].folder
    asked = (toy / "asked.txt").read_text()
    assert len(asked.splitlines()) == 60  # both answers of 30 pairs
    (toy / "asked.txt").unlink()
    (toy / "patience").write_text("50")  # two audits are answered, the third is not
    with pytest.raises(KeyboardInterrupt):
        run(toy, {"ppo": keys}, name="audited")
    assert len((toy / "asked.txt").read_text().splitlines()) == 40
    (toy / "patience").unlink()
    cut = run(toy, {"ppo": keys}, name="audited")["ppo"].folder
    assert (toy / "asked.txt").read_text() == asked
    same_end(whole, cut)


def test_which_answer_stands_first_is_drawn(toy):
    """A judge that always takes the first answer gives the policy half of the wins."""
    (toy / "standing.py").write_text(
        "from trueup.records import Verdict\n\nclass First:\n    name = 'first'\n"
        "    def judge(self, comparisons):\n        return [Verdict(1.0, 'f') for _ in comparisons]\n"
    )
    found = results(run(toy, {"ppo": {**watched("standing:First"), "steps": 2}}, name="sides")["ppo"])["watch"]
    assert found["labels"] > 30 and 0.25 < found["checks"][0]["audited"] < 0.75


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"watch": {"judge": "toyrules:gold", "act": "back", "every": 2}, "held_out": 0.2}, "leave one out"),
        ({"watch": {"judge": "toyrules:gold", "every": 9}}, r"watch.every \(9\) is beyond the last step \(6\)"),
        ({"watch": {"act": "stop", "every": 2}, "scorer": "toyrules:blue"}, "needs what can set off the alarm"),
        ({"watch": {"judge": "toyrules:gold", "evry": 2}}, "unknown key 'watch.evry'; did you mean 'watch.every'"),
        ({"watch": {"judge": "people", "every": 2}}, "does not wait for them"),
        ({"watch": {"judge": "reward/final", "every": 2}}, "must not be what is optimized"),
    ],
)
def test_a_watch_that_can_see_nothing_is_refused(toy, keys, said):
    with pytest.raises(UserError, match=said):
        run(toy, {"ppo": {**PPO, **keys}}, name="refused")


def test_phrases_are_runs_of_three_words_or_marks():
    assert phrases("What a Clever question!") == {"what a clever", "a clever question", "clever question !"}
    assert phrases("two words") == set()


def test_auditors_are_other_people_than_the_raters():
    from trueup.world import auditors, raters
    from trueup.world.raters import demo_comparisons

    asked = [c for c in demo_comparisons(300) if c.completions[0].text != c.completions[1].text]
    theirs, ours = raters("pool", 3).judge(asked), auditors(seed=3).judge(asked)
    assert {v.rater[:7] for v in ours} == {"auditor"} and {v.rater[:4] for v in theirs} == {"pool"}
    both = [(a.p, b.p) for a, b in zip(ours, theirs, strict=True) if a.p is not None and b.p is not None]
    assert 0.63 < np.mean([a == b for a, b in both]) < 0.9
    assert ours == auditors(seed=3).judge(asked)
    turned = [Comparison(c.prompt, c.completions[::-1]) for c in asked]
    assert [v.p if v.p is None else 1 - v.p for v in auditors(seed=3).judge(turned)] == [v.p for v in ours]
