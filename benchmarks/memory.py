"""Memory and time of a PPO step, whole and with adapters on one frozen base, each in a process of its own.

A random Llama of about 50 M parameters with the world's tokenizer; a reward model that is an adapter on it (whole
PPO loads its merged weights). Above what the imports take: what is held once all players are gathered, and the peak
over one rollout and its update. Linux only: the peak is the kernel's, cleared before.

    OMP_NUM_THREADS=1 python benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bitsandbytes  # noqa: F401  imported before anything is measured
import peft  # noqa: F401
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trueup.data.chat import Chat
from trueup.engine.mesh import Mesh
from trueup.models.load import save_model
from trueup.models.lora import Base, Lora
from trueup.models.roles import save_checked
from trueup.phases import ppo
from trueup.world import base_path, prompts

LORA = {"r": 16, "alpha": 32}
AGAIN = {"gradient_checkpointing": True}
MODES = {
    "whole": {},
    "whole, gradient checkpointing": {"optim": AGAIN, "critic_optim": AGAIN},
    "lora": {"lora": LORA},
    "lora, gradient checkpointing": {"lora": LORA, "optim": AGAIN, "critic_optim": AGAIN},
    "lora, bf16": {"lora": LORA, "precision": "bf16"},
    "lora, nf4": {"lora": {**LORA, "quantize": "nf4"}},
    "lora, nf4, gradient checkpointing": {
        "lora": {**LORA, "quantize": "nf4"},
        "optim": AGAIN,
        "critic_optim": AGAIN,
    },
}


def make(folder: Path, width: int, layers: int) -> int:
    """model/, reward/ and nf4/ (the reward model on the base in four bits); returns the model's parameters."""
    chat = Chat.load(base_path())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(chat.tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        intermediate_size=width * 8 // 3,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config)
    save_model(model, folder / "model", chat.tokenizer, end_id=chat.end_id, pad_id=chat.pad_id)
    for name, keys in (("reward", {}), ("bf16", {}), ("nf4", {"quantize": "nf4"})):
        precision = "bf16" if name == "bf16" else "fp32"
        lora = Lora.model_validate({**LORA, **keys})
        made = Base(str(folder / "model"), lora, precision=precision).scalar(0)  # type: ignore[arg-type]
        save_checked(made, folder / name, chat=chat)
    return sum(p.numel() for p in model.parameters())


def resident(what: str) -> float:
    """VmRSS or VmHWM of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) / 1024


def measure(folder: Path, mode: str, rows: int, tokens: int) -> None:
    keys = MODES[mode]
    scorer = next((name for name in ("nf4", "bf16") if name in mode), "reward")
    config = ppo.PPOConfig.model_validate(
        {
            "model": str(folder / "model"),
            "scorer": str(folder / scorer),
            "prompts": "",
            "batch": rows,
            "sampling": {"max_tokens": tokens},
            **keys,
        }
    )
    chat = Chat.load(config.model)
    before = resident("VmRSS")
    players = ppo.gather_players(config, Mesh(), chat)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, so that only what is held counts
    held = resident("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5")
    began = time.process_time()
    rollout = ppo.make_rollout(config, players, prompts("ppo", rows), 0, 0.1)
    middle = time.process_time()
    rollout.batch |= ppo.estimate_advantages(config, players, rollout)
    ppo.update(config, players, rollout, 0, 0.1)
    ended = time.process_time()
    peak = resident("VmHWM") - before
    print(f"| {mode} | {held:.0f} | {peak:.0f} | {middle - began:.1f} | {ended - middle:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--mode", choices=MODES)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.mode:
        return measure(args.folder, args.mode, args.rows, args.tokens)
    with tempfile.TemporaryDirectory() as folder:
        print(f"{make(Path(folder), args.width, args.layers) / 1e6:.0f} M parameters\n")
        print("| PPO | held, MB | peak, MB | rollout, CPU s | update, CPU s |\n|---|---|---|---|---|", flush=True)
        for mode in MODES:
            sizes = ["--rows", str(args.rows), "--tokens", str(args.tokens)]
            subprocess.run([sys.executable, __file__, "--folder", folder, "--mode", mode, *sizes], check=True)


if __name__ == "__main__":
    main()
