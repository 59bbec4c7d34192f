"""`trueup plan` against what is measured: peak memory of SFT, reward model, DPO and PPO, each in a process of its own.

Random Llamas of about 2 (S) and 30 (M) million parameters, on a CPU, one thread. Measured is the highest resident size
of a whole stage (`trueup run`) above what the process took once it had imported everything and run the same stage with
a model of a few thousand parameters. The stage runs twice: with every block above 1 MB given back when it is free
(MALLOC_MMAP_THRESHOLD_=1000000, "held"), which is what the plan predicts, and as the C library does by itself, which
keeps freed blocks for speed ("default"). Linux only.

    OMP_NUM_THREADS=1 python benchmarks/plan.py [--sizes S M] [--cases sft ppo]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from ctypes import CDLL
from pathlib import Path
from typing import Any

SIZES = {"T": (1, 32, 2, 64, 128, 4), "S": (4, 192, 4, 512, 2048, 32), "M": (8, 512, 8, 1376, 8192, 8)}
"""Layers, width, heads, feed-forward width, vocabulary; rows of an optimizer step."""
LORA = {"r": 16, "alpha": 32}
AGAIN = {"gradient_checkpointing": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "sft, gradient checkpointing": ("sft", {"train": {"optim": AGAIN}}),
    "sft, lora": ("sft", {"lora": LORA}),
    "reward": ("reward", {}),
    "reward, lora": ("reward", {"lora": LORA}),
    "dpo": ("dpo", {}),
    "dpo, lora": ("dpo", {"lora": LORA}),
    "kto": ("dpo", {"loss": "kto"}),
    "ppo": ("ppo", {}),
    "ppo, lora": ("ppo", {"lora": LORA}),
    "ppo, lora, gradient checkpointing": ("ppo", {"lora": LORA, "optim": AGAIN, "critic_optim": AGAIN}),
}


def make(folder: Path, size: str) -> None:
    """model/, reward/ (a reward model), lora/ (one that is an adapter on the model), and the data."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trueup.data.chat import Chat
    from trueup.models.load import save_model
    from trueup.models.lora import ADAPTER, Base, Lora, merged, save_adapter
    from trueup.plan.standins import word_tokenizer

    layers, width, heads, inner, vocab, batch = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    tokenizer = word_tokenizer(config)
    tokenizer.add_tokens(["w", "x"])
    chat = Chat(tokenizer)
    model = LlamaForCausalLM(config)
    save_model(model, folder / "model", chat.tokenizer, end_id=chat.end_id, pad_id=chat.pad_id)
    made = Base(str(folder / "model"), Lora.model_validate(LORA)).scalar(0)
    save_model(merged(made), folder / "reward", chat.tokenizer, end_id=chat.end_id, pad_id=chat.pad_id)
    save_adapter(made, folder / "reward" / ADAPTER)
    dice = random.Random(0)

    def words(low: int, high: int, word: str = "w") -> str:
        return " ".join([word] * dice.randint(low, high))

    low, high = (4, 12) if size == "T" else (16, 128)
    rows = [(f"{words(low, high)} {i}", words(high // 2, high), words(high // 2, high, "x")) for i in range(4 * batch)]
    columns = {
        "demos": ("prompt", "completion"),
        "pairs": ("prompt", "chosen", "rejected"),
        "thumbs": ("prompt", "completion", "label"),
        "prompts": ("prompt",),
    }
    for name, keys in columns.items():
        said = [(prompt, one, i % 2 == 0) for i, (prompt, one, _) in enumerate(rows)] if name == "thumbs" else rows
        text = "".join(json.dumps(dict(zip(keys, row, strict=False))) + "\n" for row in said)
        (folder / f"{name}.jsonl").write_text(text)


def stage(folder: Path, size: str, case: str) -> dict[str, Any]:
    """The recipe of one stage."""
    phase, keys = CASES[case]
    batch, sampling = SIZES[size][5], {"max_tokens": 8 if size == "T" else 128}
    train = {"batch": batch, "epochs": 0.8, "optim": {}}
    base = {"phase": phase, "model": str(folder / "model"), "sampling": sampling}
    if phase == "ppo":
        given: dict[str, Any] = {
            "scorer": str(folder / "reward"),
            "prompts": str(folder / "prompts.jsonl"),
            "batch": batch,
            "steps": 2,
        }
        given["missing_eos_samples"] = 2 * batch
    else:
        data = folder / ("demos.jsonl" if phase == "sft" else "thumbs.jsonl" if case == "kto" else "pairs.jsonl")
        given = {"data": str(data), "train": train, "held_out": 0.2}
        given |= {"normalize_samples": 2 * batch} if phase == "reward" else {}
    over = {k: {**given.get(k, {}), **v} if k == "train" else v for k, v in keys.items()}
    return {"name": "measured", "device": "cpu", "stages": {phase: {**base, **given, **over}}}


def resident(what: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) * 1024


def measure(folder: Path, size: str, case: str) -> None:
    """Prints the bytes that the stage takes above what the process took before."""
    from trueup.recipe import load_recipe, run_recipe

    with tempfile.TemporaryDirectory() as runs:
        run_recipe(load_recipe(stage(folder / "T", "T", case)), Path(runs) / "T")
        gc.collect()
        CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        run_recipe(load_recipe(stage(folder / size, size, case)), Path(runs) / size)
        print(f"peak {resident('VmHWM') - before}")


def predict(folder: Path, size: str, case: str) -> tuple[int, str]:
    """The plan's peak, and at which moment."""
    from trueup.plan import plan
    from trueup.recipe import load_recipe

    with tempfile.TemporaryDirectory() as runs:
        (planned,) = plan(load_recipe(stage(folder / size, size, case)), Path(runs), rate=1e11)
    assert planned.estimate
    return planned.estimate.peak, planned.estimate.at


def measured(folder: Path, size: str, case: str, **environment: str) -> int:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", case, "--sizes", size, "--folder", str(folder)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr or done.stdout)
    return int(next(line for line in done.stdout.splitlines() if line.startswith("peak ")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["S", "M"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--measure", choices=CASES)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.measure:
        return measure(args.folder, args.sizes[0], args.measure)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for size in {"T", *args.sizes}:
            make(folder / size, size)
        print("| | stage | planned, MB | held, MB | planned / held | default, MB | the highest moment |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for size in args.sizes:
            for case in args.cases:
                planned, at = predict(folder, size, case)
                held = measured(folder, size, case, MALLOC_MMAP_THRESHOLD_="1000000")
                default = measured(folder, size, case)
                figures = f"{planned / 1e6:.0f} | {held / 1e6:.0f} | {planned / held:.2f} | {default / 1e6:.0f}"
                print(f"| {size} | {case} | {figures} | {at} |", flush=True)


if __name__ == "__main__":
    main()
