"""Folders with config and tokenizer for every model of a recipe, those that no stage has made yet too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig

from trueup.config import parse
from trueup.data.chat import Chat
from trueup.models.lora import ADAPTER, Base, Lora
from trueup.models.net import Precision
from trueup.models.weightless import weightless
from trueup.named import CALLABLE
from trueup.recipe import Stage
from trueup.records import Completion, Prompt, UserError, is_local, write_json
from trueup.scorers.ensemble import FILE, is_ensemble, read_ensemble


class Folders:
    """A place where every model of a recipe has a folder with its config and a tokenizer, made or not."""

    def __init__(self, stages: Sequence[Stage], at: Path) -> None:
        self.stages, self.at = {str(s.folder): s for s in stages}, at
        self.known: dict[str, str] = {}
        self.plain: set[str] = set()
        """Stand-ins whose tokenizer is one of ours, since none is at hand."""

    def of(self, name: str, trained: bool = False) -> str:
        """The stand-in of a model's folder or Hub name. Raises UserError where its shape cannot be known."""
        if name not in self.known:
            self.known[name] = str(self._make(name))
        return self.known[name]

    def _make(self, name: str) -> Path:
        stage = next((s for folder, s in self.stages.items() if name == folder or name.startswith(f"{folder}/")), None)
        target = self.at / f"model-{len(list(self.at.iterdir()))}"
        target.mkdir()
        if (stage is not None and stage.phase == "ensemble" and name == f"{stage.folder}/final") or is_ensemble(name):
            return self._ensemble(name, stage, target)
        if stage is None or (Path(name) / "config.json").is_file():
            config = _read_config(name)
            self._known_adapter(Path(name) / ADAPTER, config, target)
            source = name if _has_tokenizer(name) else None
        elif stage.phase == "world":
            from trueup.world.stage import base_shape

            config, source = base_shape(stage.config)  # type: ignore[arg-type]
        else:
            made: Any = stage.config
            if stage.phase == "ensemble":
                made = member_of(made, Path(name).name)
            start = self.of(made.model)
            if stage.phase == "ppo" and Path(name).name == "critic":
                start = self.of(critic_of(made) or made.model)
                start = f"{start}/{read_ensemble(start).best}" if is_ensemble(start) else start
            config, source = AutoConfig.from_pretrained(start), start
            if stage.phase in ("reward", "ensemble"):
                # An adapter's record, by which PPO knows whether it stands on the same weights.
                if made.lora:
                    self._record(start, made.lora, made.train.precision, target)
                config.num_labels = 1
                classes: Any = AutoModelForSequenceClassification._model_mapping[type(config)]
                config.architectures = [classes.__name__]
        config.save_pretrained(target)
        if source is None:
            word_tokenizer(config).save_pretrained(target)
            self.plain.add(str(target))
        else:
            for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
                if is_local(source) and (Path(source) / file).is_file():
                    shutil.copy(Path(source) / file, target / file)
            if not is_local(source):
                Chat.load(source).tokenizer.save_pretrained(target)
            if source in self.plain:
                self.plain.add(str(target))
        return target

    def _ensemble(self, name: str, stage: Stage | None, target: Path) -> Path:
        """A folder of stand-ins for its members, made or not."""
        if is_ensemble(name):
            about = read_ensemble(name).model_dump()
            members = {one: self.of(f"{name}/{one}") for one in about["members"]}
        else:
            assert stage is not None
            config: Any = stage.config
            known = (
                config.members
                if isinstance(config.members, list)
                else [f"{name}/member-{i}" for i in range(config.members)]
            )
            members = {f"member-{i}": self.of(one) for i, one in enumerate(known)}
            about = {"members": list(members), "combine": config.combine, "penalty": config.penalty, "best": "member-0"}
        for one, folder in members.items():
            (target / one).symlink_to(folder)
        write_json(target / FILE, about)
        return target

    def _known_adapter(self, adapter: Path, config: PreTrainedConfig, target: Path) -> None:
        if (adapter / "base.json").is_file():
            about, made = (json.loads((adapter / f).read_text()) for f in ("base.json", "adapter_config.json"))
            try:
                start = self.of(about["model"])
            except UserError:
                return  # its base is not to be found here: it stands alone
            lora = Lora(r=made["r"], alpha=made["lora_alpha"], quantize=about["quantize"])
            lora = lora.model_copy(update={"targets": tuple(made["target_modules"])})
            self._record(start, lora, "bf16" if config.dtype is torch.bfloat16 else "fp32", target)

    def _record(self, start: str, lora: Lora, precision: Precision, target: Path) -> None:
        with weightless():
            made: Any = Base(start, lora, precision=precision).scalar(0)
        record = made.base_model.peft_config["default"]
        write_json(target / ADAPTER / "base.json", made._trueup_base)
        write_json(
            target / ADAPTER / "adapter_config.json",
            {"r": record.r, "lora_alpha": record.lora_alpha, "target_modules": sorted(record.target_modules)},
        )

    def config(self, stage: Stage) -> Any:
        """The stage's config with stand-ins for its models, and nothing for scorers that are no models."""
        data = stage.config.model_dump()
        for key in ("model", "reference", "critic"):
            if data.get(key) and "models" not in data:  # there a reference is one of the models
                data[key] = self.of(data[key])
        if "models" in data:
            data["models"] = {name: self.of(folder) for name, folder in data["models"].items()}
        if stage.phase == "ensemble":
            data["member"]["model"] = self.of(data["member"]["model"])
            data["starts"] = [self.of(one) for one in data["starts"]]
            if isinstance(data["members"], list):
                data["members"] = [self.of(one) for one in data["members"]]
        for key in ("scorer", "audit", "gold", "proxy", "judge"):
            if data.get(key):
                data[key] = self._scorer(data[key])
        if watch := data.get("watch"):
            for key in ("judge", "heldout"):
                watch[key] = self._judge(watch[key]) if watch[key] else None
        if stage.phase == "ppo":
            data["scorer"] = data["scorer"] or "trueup.plan.standins:nothing"
        return parse(type(stage.config), data, f"stage '{stage.name}'")

    def _judge(self, spec: Any) -> Any:
        """As `_scorer`; a constitution's model on this machine takes memory too, a server's does not."""
        if isinstance(spec, Mapping) and "constitution" in spec and "endpoint" not in spec:
            return {**spec, "model": self.of(spec.get("model", ""))}
        return self._scorer(spec)

    def _scorer(self, spec: Any) -> Any:
        if isinstance(spec, Mapping) and ("use" in spec or "constitution" in spec):
            return None
        if isinstance(spec, Mapping) and "ensemble" in spec:
            of = spec["ensemble"]
            if isinstance(of, str):
                if not is_ensemble(self.of(of)):
                    read_ensemble(of)  # says what it is not
                return {**spec, "ensemble": self.of(of)}
            models = [self.of(one) for one in of if _is_model(one)]
            return {**spec, "ensemble": models} if models else None
        if isinstance(spec, Mapping):
            return {self.of(one): weight for one, weight in spec.items() if _is_model(one)} or None
        return self.of(spec) if _is_model(spec) else None


def _is_model(spec: str) -> bool:
    """Whether a scorer or judge is a reward model: no function, server, rule or file of verdicts."""
    elsewhere = spec.startswith(("http://", "https://")) or spec == "length" or spec.endswith(".jsonl")
    return not elsewhere and not CALLABLE.match(spec)


def member_of(config: Any, name: str) -> Any:
    """The config of an ensemble's member `member-I`; of `average`, that of the first."""
    i = int(name.partition("-")[2] or 0)
    start = config.starts[i % len(config.starts)] if config.starts else config.member.model
    return config.member.model_copy(update={"model": start})


def critic_of(config: Any) -> str | None:
    """The reward model, or the ensemble, that a PPO config's critic starts from, as `ppo.make_critic` finds it."""
    spec = config.critic or config.scorer
    if isinstance(spec, Mapping) and "ensemble" in spec:
        spec = spec["ensemble"] if isinstance(spec["ensemble"], str) else dict.fromkeys(spec["ensemble"], 1.0)
    weights = spec if isinstance(spec, Mapping) else {spec: 1.0}
    return max((one for one in weights if _is_model(one)), key=lambda one: abs(weights[one]), default=None)


def nothing(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    """A scorer that holds no model."""
    return [0.0 for _ in completions]


def _read_config(name: str) -> PreTrainedConfig:
    local = is_local(name)
    if local and not (Path(name) / "config.json").is_file():
        what = "no config.json in this folder" if Path(name).is_dir() else "no such folder"
        raise UserError(f"{name}: {what}; plan needs a model's config.json, and nothing else of it")
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        if local:
            raise UserError(f"{name}: not a model's config: {str(error).splitlines()[0]}") from None
        raise UserError(
            f"{name}: not in the local cache, and plan downloads nothing; fetch what it reads with "
            f"'hf download {name} config.json tokenizer.json tokenizer_config.json', or name a folder with config.json"
        ) from None


def _has_tokenizer(name: str) -> bool:
    if is_local(name):
        return (Path(name) / "tokenizer.json").is_file() or (Path(name) / "tokenizer_config.json").is_file()
    try:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return False
    return True


def word_tokenizer(config: PreTrainedConfig) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "<end>": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", chat_template=WORDS
    )


WORDS = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %} {{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}"
)
