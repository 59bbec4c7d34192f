"""The recipes for real models: run on tiny twins of their architecture, planned from their real configs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from tests.models_made import make_tokenizer
from tests.toy import rows
from trueup import plan as planning
from trueup.engine.footprint import OPTIMIZER
from trueup.recipe import load_recipe, run_recipe

pytestmark = pytest.mark.long
RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """Data files that take the place of the Hub's."""
    folder = tmp_path_factory.mktemp("real")
    rows(folder / "talk.jsonl", [{"messages": talk(i)} for i in range(40)])
    rows(folder / "pairs.jsonl", [{"chosen": talk(i), "rejected": talk(i, "no")} for i in range(60)])
    rows(folder / "ask.jsonl", [{"prompt": f"is {i} even?", "category": "ab"[i % 2]} for i in range(6)])
    return folder


def talk(i: int, answer: str = "yes, please") -> list[dict[str, str]]:
    return [{"role": "user", "content": f"say {i} things"}, {"role": "assistant", "content": answer}]


def tiny_like(recipe: Path, folder: Path) -> Path:
    """A tiny random model of the architecture that a recipe is for, with a tokenizer made on the spot."""
    from transformers import AutoModelForCausalLM

    config = AutoConfig.from_pretrained(recipe.parent / "shapes" / recipe.stem.removesuffix("-lora"))
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    for key, value in {**sizes, "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}.items():
        setattr(config, key, value)
    if hasattr(config, "layer_types"):
        config.layer_types = ["full_attention"] * 2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def shrunk(data: Path, model: Path) -> list[str]:
    """Model, data and sizes of a recipe, and nothing else of it."""
    train = [f"{s}.{key}" for s in ("sft", "reward", "judge") for key in ("train.batch=8", "train.epochs=1")]
    sampling = [f"{s}.sampling.max_tokens=4" for s in ("sft", "reward", "judge", "ppo", "evaluate")]
    return [
        f"sft.model={model}",
        f"evaluate.models.base={model}",
        f"sft.data={data / 'talk.jsonl'}",
        f"reward.data={data / 'pairs.jsonl'}",
        f"judge.data={data / 'pairs.jsonl'}",
        f"ppo.prompts={data / 'pairs.jsonl'}",
        f"evaluate.prompts={data / 'ask.jsonl'}",
        *train,
        *sampling,
        "reward.normalize_samples=8",
        "judge.normalize_samples=8",
        "ppo.steps=1",
        "ppo.batch=8",
        "ppo.missing_eos_samples=4",
        "ppo.held_out=0.1",
        "device=cpu",
    ]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_real_models_recipe_runs_on_its_tiny_twin(tmp_path, monkeypatch, real, recipe):
    monkeypatch.chdir(tmp_path)
    assert "NOT YET RUN WITH REAL WEIGHTS" in recipe.read_text()
    loaded = load_recipe(str(recipe), shrunk(real, tiny_like(recipe, tmp_path / "twin")))
    planned = planning.plan(loaded, tmp_path / "runs", rate=1e12)
    assert all(p.estimate.peak > 0 for p in planned)
    stages = run_recipe(loaded, tmp_path / "runs")
    assert [s.name for s in stages] == ["sft", "reward", "judge", "ppo", "evaluate"] and all(s.done for s in stages)
    assert (stages[3].folder / "final" / "adapter").exists() == recipe.stem.endswith("-lora")
    assert [p.state for p in planning.plan(loaded, tmp_path / "runs", rate=1e12)] == ["done"] * 5


def size_of(config) -> int:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_real_models_recipe_is_planned_from_its_config(tmp_path, recipe):
    """SFT at its real width, two layers deep: weights, gradients and means are what the model's size makes them."""
    shape = recipe.parent / "shapes" / recipe.stem.removesuffix("-lora")
    config = AutoConfig.from_pretrained(shape)
    size = {"qwen3-0.6b": 0.596, "qwen3-4b": 4.022, "qwen3-8b": 8.191, "llama-3.1-8b": 8.030}[shape.name] * 1e9
    assert size_of(config) == pytest.approx(size, rel=0.001)
    shutil.copytree(shape, tmp_path / "cut")
    config.num_hidden_layers = 2
    if hasattr(config, "layer_types"):
        config.layer_types = config.layer_types[:2]
    config.save_pretrained(tmp_path / "cut")
    size = size_of(config)
    keys = [f"sft.model={tmp_path / 'cut'}", f"evaluate.models.base={shape}"]
    loaded = load_recipe(str(recipe), keys)
    only = load_recipe({"name": loaded.name, "stages": {"sft": loaded.stages["sft"]}})
    (planned,) = planning.plan(only, tmp_path, rate=1e12)
    step = planned.estimate.moments["a training step"]
    if recipe.stem.endswith("-lora"):
        assert step["weights: base"] == pytest.approx(2 * size, rel=0.01)  # frozen, bfloat16
        assert step[OPTIMIZER] < 0.2 * size
    else:
        assert step["weights: policy"] == pytest.approx(4 * size, rel=0.01)
        assert step[OPTIMIZER] == pytest.approx(8 * size, rel=0.01)
