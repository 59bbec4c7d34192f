"""LoRA (Hu et al. 2022): small trainable matrices beside the frozen weights of a base that is in memory once.

A network here is a tree of modules whose base weights are the very tensors of the base's own tree (`share`); its
adapter and its score head are its own. So nothing has to be switched: policy, critic and reward model are ordinary
PreTrainedModels side by side, and the base's tree, which has no adapter, is the reference. An adapter starts at zero,
so at the start policy and reference agree bit for bit.

    base weights   one copy, frozen     <- tree of the reference
                                        <- tree of the policy    + adapter
                                        <- tree of the critic    + adapter + head
                                        <- tree of the scorer    + adapter + head

What is saved: merged weights, which plain transformers reads, and beside them the adapter as peft lays it out, with
the head, and the hash of the weights that it was trained on (`base.json`). peft makes the layers; dropout is always
off in Trueup, so an adapter has none.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from trueup.config import Config
from trueup.models.load import draw_head, is_policy, load_policy, load_scalar, score_name
from trueup.models.net import Precision, prepare
from trueup.models.nf4 import NF4Linear, to_nf4
from trueup.models.weightless import fill, is_weightless, making, staying
from trueup.records import UserError, write_json

ADAPTER = "adapter"
"""The folder that lies beside merged weights."""
NAME = "default"
"""What peft calls an adapter; ours are one to a tree."""
PREFIX = "base_model.model."
"""What peft puts before the names in an adapter's file."""


class Lora(Config):
    """An adapter: W x + alpha / r x B A x, with W frozen."""

    r: int = Field(16, gt=0)
    """Rank: the rows of A and the columns of B."""
    alpha: int = Field(32, gt=0)
    """The adapter's product is scaled by alpha / r."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """The layers that get an adapter: all linear ones of the body, or those whose names end so: [q_proj, v_proj]."""
    quantize: Literal["nf4"] | None = None
    """The frozen base's linear layers in four bits, by bitsandbytes where it has kernels."""


class Base:
    """A frozen base and the networks that stand on it. `model` is the base's own tree.

    Its weights are held in `precision`: nothing is added up in them, so they need no float32 masters.
    """

    def __init__(
        self,
        folder: str,
        lora: Lora,
        *,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
    ) -> None:
        self.folder, self.lora, self.device = str(folder), lora, device
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        first = "cpu" if lora.quantize else device  # so that a full copy is never on the device
        if is_policy(folder):
            self.model = load_policy(folder, dtype=dtype, device=first)
        else:
            self.model = load_scalar(folder, dtype=dtype, device=first).model
        if lora.quantize:
            to_nf4(self.model, device)
        self.model.requires_grad_(False)
        self._rewards: dict[str, PreTrainedModel] = {}

    def untrained(self) -> PreTrainedModel:
        """The base as it is: the reference."""
        if not self.model.can_generate():
            raise UserError(f"{self.folder}: holds a reward model; a language model is needed here")
        return self.model

    def policy(self, seed: int) -> PreTrainedModel:
        """The base with an adapter."""
        return adapt(share(self.untrained()), self.lora, self.folder, seed)

    def scalar(self, seed: int) -> PreTrainedModel:
        """The base with an adapter and, where the base has none, a fresh head."""
        twin = share(self.model)
        if twin.can_generate():
            twin = _scalar(self.model)
            draw_head(twin, seed)
        return adapt(twin, self.lora, self.folder, seed)

    def reward(self, folder: str | Path) -> PreTrainedModel:
        """A reward model, frozen: its adapter on this base where it was trained on these very weights, its own
        weights otherwise; either way in memory once, however often it is asked for."""
        key = str(Path(folder).resolve())
        if key not in self._rewards:
            self._rewards[key] = self._trained_here(Path(folder) / ADAPTER) or load_scalar(
                folder, dtype=self.model.dtype, device=self.device
            ).model.requires_grad_(False)
        return self._rewards[key]

    def critic(self, folder: str | Path, seed: int) -> PreTrainedModel:
        """A critic that starts as that reward model: its adapter goes on learning; where it has none it gets one."""
        start = self.reward(folder)
        critic = share(start)
        if not adapted(start):
            return adapt(critic, self.lora, str(folder), seed)
        for parameter in own(critic).values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return critic

    def _trained_here(self, adapter: Path) -> PreTrainedModel | None:
        record = adapter / "base.json"
        if not record.is_file() or not self.model.can_generate():
            return None
        if json.loads(record.read_text(encoding="utf-8"))["sha256"] != fingerprint(self.model.base_model):
            return None
        made = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        lora = Lora(r=made["r"], alpha=made["lora_alpha"], targets=tuple(made["target_modules"]))
        twin = adapt(_scalar(self.model), lora, self.folder, 0)
        load_adapter(twin, adapter)
        for parameter in own(twin).values():
            parameter.data = parameter.data.to(self.model.dtype)
        return twin.requires_grad_(False)  # type: ignore[no-any-return]


def share(model: PreTrainedModel, device: str | None = None) -> PreTrainedModel:
    """Another tree of the same modules over the same base tensors; what it has of its own is copied. With a device
    the base tensors are those, or copies there."""
    mine = {id(p) for p in own(model).values()}
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in mine:
            memo[id(tensor)] = tensor if device is None or tensor.device.type == device else _there(tensor, device)
    for module in model.modules():
        if isinstance(module, NF4Linear):
            memo |= {id(module.weight): module.weight, id(module.state): module.state}
    return copy.deepcopy(model, memo)


def _there(tensor: Tensor, device: str) -> Tensor:
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


def _scalar(base: PreTrainedModel) -> PreTrainedModel:
    """A scalar model over a language model's body. Its head is empty."""
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    if hasattr(config, "trueup"):
        del config.trueup  # figures about another model
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        raise UserError(f"transformers has no reward model for {type(config).__name__}") from None
    head = getattr(model, score_name(model))
    setattr(model, model.base_model_prefix, share(base).base_model)
    with making():
        for name, weight in list(head.named_parameters()):
            setattr(head, name, nn.Parameter(torch.empty(weight.shape, device=base.device)))
    return staying(model.eval())  # type: ignore[no-any-return]


def adapt(model: PreTrainedModel, lora: Lora, name: str, seed: int) -> PreTrainedModel:
    """Freezes the model and gives its body an adapter that changes nothing yet; a scalar model's head goes on
    learning beside it. In place. `name` is the base's, for the adapter's file."""
    peft, body = _peft(), model.base_model
    about = {"model": name, "sha256": fingerprint(body), "quantize": lora.quantize}
    model._trueup_base = about  # type: ignore[assignment]
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = peft.LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=targets)
    model.requires_grad_(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GPT-2's layers are transposed, which peft sees by itself
            peft.inject_adapter_in_model(config, body, NAME, low_cpu_mem_usage=is_weightless())
    except ValueError as error:
        raise UserError(f"lora.targets: {str(error).splitlines()[0]}") from None
    if is_weightless():
        fill(body)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in own(model).items():
        parameter.data = parameter.data.float()
        if ".lora_A." in key:  # as peft does, but by a generator of its own
            bound = 1 / parameter.shape[1] ** 0.5
            drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.data.copy_(drawn)
        parameter.requires_grad_(True)
    return prepare(model)


def adapted(model: PreTrainedModel) -> bool:
    return hasattr(model, "_trueup_base")


def own(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """What a network does not share with its base: its adapter and its head, by name."""
    head = "" if model.can_generate() else score_name(model) + "."
    return {n: p for n, p in model.named_parameters() if ".lora_" in n or (head and n.startswith(head))}


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A plain model, on the CPU, with the adapter added to the weights (and four-bit ones spread out). What the
    adapter does not touch is shared with `model` where that is on the CPU too."""
    plain = share(model, "cpu")
    body = plain.base_model
    for name, layer in list(body.named_modules()):
        if hasattr(layer, "lora_A"):
            inner = _full(layer.base_layer)
            weight = inner.weight.float() + layer.get_delta_weight(NAME).float().cpu()
            inner.weight = nn.Parameter(weight.to(inner.weight.dtype), requires_grad=False)
            body.set_submodule(name, inner)
    for name, layer in list(body.named_modules()):
        if isinstance(layer, NF4Linear):
            body.set_submodule(name, _full(layer))
    for parameter in own(plain).values():
        parameter.data = parameter.data.to("cpu", plain.dtype)
    del plain._trueup_base, body.peft_config, body._trueup_sha256
    return prepare(plain)


@torch.no_grad()
def assert_merged(model: PreTrainedModel, plain: PreTrainedModel, ids: Tensor) -> None:
    """Raises RuntimeError where merged weights do not give what base and adapter give on ids [B, L], to rounding."""
    want = model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state.float().cpu()
    got = plain.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
    worst, near = float((want - got).abs().max()), 1e-3 if plain.dtype is torch.float32 else 0.1
    if not worst <= near * float(want.abs().max()):
        raise RuntimeError(f"merged weights are not what was trained; hidden states differ by {worst:.3e}")


def _full(layer: Any) -> Any:
    """A layer whose weight is a plain one."""
    if not isinstance(layer, NF4Linear):
        return layer
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(layer.full().cpu(), requires_grad=False)
    plain.bias = layer.bias
    return plain


def fingerprint(body: nn.Module) -> str:
    """The hash of a frozen body: its weights, as they are held in memory, and what its config says of how they are used
    (rope, norms), whatever stands on it."""
    known = getattr(body, "_trueup_sha256", None)
    if known is None and is_weightless():  # bases are told apart by what they would be read from, and as what
        name, kept = body.config.name_or_path, sorted({str(p.dtype) for p in body.parameters()})  # type: ignore[union-attr]
        body._trueup_sha256 = known = f"{name} {kept}"  # type: ignore[assignment]
    if known is None:
        digest = hashlib.sha256(json.dumps(_shape(body), sort_keys=True, default=str).encode())
        states = {f"{n}.state": m.state for n, m in body.named_modules() if isinstance(m, NF4Linear)}
        packed = {f"{n}.{k}": v for n, state in states.items() for k, v in state.as_dict(packed=True).items()}
        for name, tensor in sorted({**body.state_dict(), **packed}.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        body._trueup_sha256 = known = digest.hexdigest()  # type: ignore[assignment]
    return str(known)


def _shape(body: Any) -> dict[str, Any]:
    """The config's keys that decide what a body computes; names, versions, heads, tokens and our own records do not."""
    said = PretrainedConfig().to_dict().keys() | {"use_cache", "tie_word_embeddings", "initializer_range", "trueup"}
    found = body.config.to_dict().items()
    return {name: value for name, value in found if name not in said and not name.endswith("_token_id")}


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Adapter and head in peft's layout, and what they were trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    body: Any = model.base_model
    made_on: Any = model._trueup_base
    config = copy.deepcopy(body.peft_config[NAME])
    config.base_model_name_or_path = made_on["model"]
    config.task_type, config.inference_mode = ("CAUSAL_LM" if model.can_generate() else "SEQ_CLS"), True
    config.save_pretrained(str(folder))
    record = folder / "adapter_config.json"
    listed = json.loads(record.read_text(encoding="utf-8"))
    if isinstance(listed["target_modules"], list):  # a set to peft, in whatever order; a file is the same each time
        write_json(record, {**listed, "target_modules": sorted(listed["target_modules"])})
    tensors = {_in_file(name): p.detach().cpu().contiguous() for name, p in own(model).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "base.json", made_on)


@torch.no_grad()
def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """What `save_adapter` wrote, into a network with the same layers."""
    if is_weightless():
        return
    found, wanted = load_file(folder / "adapter_model.safetensors"), own(model)
    if found.keys() != {_in_file(name) for name in wanted}:
        raise UserError(f"{folder}: its adapter is not for these layers")
    for name, parameter in wanted.items():
        parameter.copy_(found[_in_file(name)])


def _in_file(name: str) -> str:
    return PREFIX + name.replace(f".{NAME}.", ".")


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("lora needs peft: pip install 'trueup[lora]'") from None
    return peft
