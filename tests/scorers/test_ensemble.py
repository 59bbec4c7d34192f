"""An ensemble as a scorer: what its members say as one number, with their disagreement; what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from tests.models import tiny
from trueup.config import Config, parse
from trueup.evaluate.compare import scored_by
from trueup.judges import make_judge
from trueup.models.net import Net
from trueup.records import Comparison, Completion, Prompt, UserError
from trueup.scorers import Spec, make_scorer, reward_model_in

PROMPT = Prompt.of("what is the colour of aa?")
SAID = [Completion("the sky is blue."), Completion("yes please")]
# blue: 1, 0; short: -16/100, -10/100 (tests.toy)
BLUE, SHORT = np.array([1.0, 0.0]), np.array([-0.16, -0.10])


class Uses(Config):
    scorer: Spec


def score(spec, mesh):
    spec = parse(Uses, {"scorer": spec}, "test").scorer
    return make_scorer(spec, mesh).score([PROMPT] * 2, SAID)


@pytest.fixture
def here(toy, monkeypatch):
    monkeypatch.chdir(toy)
    return toy


@pytest.fixture
def folder(here, tmp_path):
    """Two members: the toy's reward model, and the same with another normalization, twice as wide and one higher."""
    for name, change in (("member-0", (0.0, 1.0)), ("member-1", (1.0, 2.0))):
        shutil.copytree(here / "reward" / "final", tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["trueup"]["score_mean"] += change[0]
        config["trueup"]["score_std"] *= change[1]
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    record = {"members": ["member-0", "member-1"], "combine": "wco", "penalty": 0.5, "best": "member-1"}
    (tmp_path / "ensemble.json").write_text(json.dumps(record))
    return tmp_path


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (BLUE + SHORT) / 2),
        ({"combine": "median"}, (BLUE + SHORT) / 2),
        ({"combine": "wco"}, np.array([-0.16, -0.10])),
        # deviations from the mean: 0.58 and 0.05
        ({"combine": "uwo"}, (BLUE + SHORT) / 2 - 0.5 * np.array([0.58, 0.05]) ** 2),
        ({"combine": "uwo", "penalty": 2}, (BLUE + SHORT) / 2 - 2 * np.array([0.58, 0.05]) ** 2),
    ],
)
def test_any_scorers_can_be_members(here, mesh, keys, expected):
    found = score({"ensemble": ["toyrules:blue", "toyrules:short"], **keys}, mesh)
    assert found.value == pytest.approx(expected, abs=1e-12)
    assert found.disagreement == pytest.approx([0.58, 0.05], abs=1e-12)
    assert found.parts["toyrules:blue"] == pytest.approx(BLUE)


def test_a_folder_is_combined_as_it_says_each_member_as_its_own_config_says(folder, here, mesh):
    alone = [score(str(folder / name), mesh).value for name in ("member-0", "member-1")]
    assert np.abs(alone[0] - alone[1]).max() > 0.1
    for spec, expected in (
        (str(folder), np.minimum(*alone)),
        ({"ensemble": str(folder)}, np.minimum(*alone)),
        ({"ensemble": str(folder), "combine": "mean"}, (alone[0] + alone[1]) / 2),
    ):
        found = score(spec, mesh)
        assert found.value == pytest.approx(expected, abs=1e-6)
        assert found.disagreement == pytest.approx(np.abs(alone[0] - alone[1]) / 2, abs=1e-6)
    assert list(found.parts) == ["member-0", "member-1"]
    assert found.parts["member-1"] == pytest.approx(alone[1], abs=1e-6)


def test_a_critic_starts_from_the_best_member(folder, here, mesh):
    assert reward_model_in(make_scorer(str(folder), mesh)) == f"{folder}/member-1"
    listed = make_scorer({"ensemble": ["toyrules:blue", f"{folder}/member-0"]}, mesh)
    assert reward_model_in(listed) == f"{folder}/member-0"
    assert reward_model_in(make_scorer({str(folder): 0.5, "toyrules:blue": 2.0}, mesh)) == f"{folder}/member-1"
    assert reward_model_in(make_scorer({"ensemble": ["toyrules:blue"]}, mesh)) is None


def test_an_ensemble_can_judge_but_not_who_climbed_one_of_its_members(folder, here, mesh):
    spec = {"ensemble": str(folder), "combine": "mean"}
    first, second = score(spec, mesh).value
    verdict = make_judge(spec, mesh).judge([Comparison(PROMPT, tuple(SAID))])[0]
    assert first > second and verdict.p == 1.0
    member = str((folder / "member-0").resolve())
    assert member in scored_by(spec) & scored_by(str(folder))
    assert {"toyrules:blue", member} <= scored_by({"ensemble": ["toyrules:blue", f"{folder}/member-0"]})


def test_in_a_weighted_sum_an_ensemble_keeps_its_doubt(folder, here, mesh):
    whole, sum_of = score(str(folder), mesh), score({str(folder): -0.5, "toyrules:blue": 2.0}, mesh)
    assert sum_of.value == pytest.approx(-0.5 * whole.value + 2 * BLUE, abs=1e-6)
    assert sum_of.disagreement == pytest.approx(0.5 * whole.disagreement, abs=1e-6)
    assert score({"toyrules:short": 1.0, "toyrules:blue": 2.0}, mesh).disagreement is None


def test_a_member_that_does_not_apply_is_refused(here, mesh, monkeypatch):
    import toyrules

    monkeypatch.setattr(toyrules, "sometimes", lambda prompts, completions: [None, 1.0], raising=False)
    with pytest.raises(UserError, match="'toyrules:sometimes' does not apply to 1 of 2 completions; a member must"):
        score({"ensemble": ["toyrules:blue", "toyrules:sometimes"]}, mesh)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"ensemble": "nowhere"}, "nowhere: no such folder; an ensemble is what trueup ensemble makes"),
        ({"ensemble": "reward/final"}, "reward/final: no ensemble.json in this folder"),
        ({"ensemble": ["toyrules:blue"], "combin": "wco"}, "unknown key 'combin'; did you mean 'combine'"),
        ({"ensemble": ["toyrules:blue"], "combine": "worst"}, "key 'combine'"),
        ({"ensemble": ["toyrules:blue"], "penalty": -1}, "key 'penalty'"),
        ({"ensemble": []}, "key 'ensemble"),
        ({"ensemble": ["toyrules:blue", "toyrules:short", "toyrules:blue"]}, "'toyrules:blue' is in it twice"),
        ({"toyrules:blue": "much"}, "key 'scorer'"),
    ],
)
def test_a_wrong_spec_is_told_in_one_line(here, mesh, spec, message):
    with pytest.raises(UserError, match=message) as error:
        score(spec, mesh)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "ensemble.json: not JSON"),
        ("[]", "ensemble.json: expected an object, found list"),
        ('{"members": ["member-0"]}', "ensemble.json: key 'best' is missing"),
        ('{"members": ["member-7"], "best": "member-7"}', "ensemble.json: 'member-7' is no member beside it"),
        ('{"members": ["member-0"], "best": "member-1"}', "ensemble.json: 'member-1' is no member beside it"),
    ],
)
def test_a_broken_folder_is_told_in_one_line(folder, here, mesh, content, message):
    (folder / "ensemble.json").write_text(content)
    with pytest.raises(UserError, match=message):
        score(str(folder), mesh)


def test_scores_from_a_stack_of_weights_are_those_of_one_member_after_another():
    """What benchmarks/ensemble.py compares computes the same."""
    from benchmarks.ensemble import Stacked, one_by_one

    nets = [Net(tiny.scalar(), "reward") for _ in range(3)]
    torch.manual_seed(0)
    with torch.no_grad():
        for i, net in enumerate(nets):
            net.set_affine(0.1 * i, 1.0 + i)
            for parameter in net.model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    ids = torch.randint(5, nets[0].model.config.vocab_size, (6, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([9, 1, 4, 9, 7, 2])
    want = one_by_one(nets, ids, lengths)
    assert (want[0] - want[1]).abs().max() > 1e-3
    torch.testing.assert_close(Stacked(nets).scores(ids, lengths), want, rtol=0, atol=1e-5)
