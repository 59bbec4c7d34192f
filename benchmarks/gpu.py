"""SFT, reward model and PPO on one GPU in bf16, on the architecture of Qwen2.5-0.5B with random weights.

    python benchmarks/gpu.py [--tasks sft reward ppo] [--steps 10]
    python benchmarks/gpu.py --tiny          a tiny model, on the CPU where there is no GPU: shows that this runs

For each task: tokens a second, model FLOPs utilization, peak memory, and the share of each sub-step, which is measured
in steps of its own, since waiting for the device between sub-steps costs time. Beside it TRL, where its package is
importable (PPO: up to TRL 1.12), on the same weights and rows. Writes results.json and results.md.

Utilization is the FLOPs that the task needs over what the device could have done in that time at its peak. Needed are,
for a model of L layers and width d, with N weights in matrix products outside the vocabulary head (V x d):

    forward of a row of T tokens, of which R meet the head      2 N T + 2 L d T^2 + 2 V d R
    backward                                                    twice that

Attention is causal, so T^2 is 2 L d T^2 and not 4. Padding, and what is computed twice, is not needed: a trainer that
pads has a lower utilization for it. Sampling is counted as one forward of prompt and reply.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sides import with_trl, with_trueup
from sides.gate import CountGate, forget_peak, memory_mb
from sides.setting import SIZES, Job, Lengths, Size, read_rows, write

ROOT = Path(__file__).resolve().parent.parent
QWEN = Size(
    layers=24,
    width=896,
    heads=14,
    kv_heads=2,
    inner=4864,
    vocab=151_936,
    batch=64,
    family="qwen2",
    lengths=Lengths(prompt=(64, 512), reply=(128, 512), stop=256, limit=512),
)
"""Qwen2.5-0.5B: 0.36 billion weights outside the embeddings, which are the head too."""
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bf16 FLOPs a second as NVIDIA states them, by a part of the device's name; the first that fits."""


def weights(size: Size) -> int:
    """In matrix products, outside the vocabulary head."""
    wide = size.width // size.heads * (size.kv_heads or size.heads)
    attention = 2 * size.width * (size.width + wide)
    return size.layers * (attention + 3 * size.width * size.inner)


def forward_flops(size: Size, lengths: Sequence[int], read: int) -> float:
    """Of rows of these lengths, of which `read` tokens together meet the vocabulary head."""
    trunk = 2 * weights(size) * sum(lengths) + 2 * size.layers * size.width * sum(n * n for n in lengths)
    return trunk + 2 * size.vocab * size.width * read


def needed_flops(job: Job, step: int, figures: dict[str, Any]) -> float:
    """What a step of the task cannot do without (see the head of this file)."""
    rows = read_rows(job)[step * job.size.batch : (step + 1) * job.size.batch]
    prompts = [len(r["prompt"]) for r in rows]
    if job.task == "sft":
        replies = [len(r["reply"]) for r in rows]
        return 3 * forward_flops(job.size, [p + r for p, r in zip(prompts, replies, strict=True)], sum(replies))
    if job.task == "reward":
        lengths = [p + len(r[name]) for p, r in zip(prompts, rows, strict=True) for name in ("reply", "other")]
        return 3 * forward_flops(job.size, lengths, 0)
    # Replies are sampled: their number is known, each one's length is taken as the mean.
    lengths, read = [round(p + figures["length"]) for p in prompts], figures["tokens"]
    policy, scalar = forward_flops(job.size, lengths, read), forward_flops(job.size, lengths, 0)
    once = 3 * policy + 2 * scalar  # sampling, old and reference log-probs; score and old values
    return once + 3 * job.ppo_epochs * (policy + scalar)


def peak_of(device: str, given: float | None) -> float | None:
    """FLOPs a second of the device at its best, where known."""
    if given or device == "cpu":
        return given
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if all(word in name for word in part.split())), None)


class Device:
    """Time and memory of CUDA, or of this process where there is none."""

    def __init__(self, name: str) -> None:
        self.cuda = name == "cuda"

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_peak()

    def peak_mb(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**20 if self.cuda else memory_mb("VmHWM")


def measure(job: Job, run: Callable[..., None], args: argparse.Namespace, peak: float | None) -> dict[str, Any]:
    """Warm-up and measured steps of one side."""
    device = Device(job.device)
    device.forget_peak()
    gate = CountGate(args.warmup, args.steps, device.sync)
    run(job, gate)
    rates = [step["tokens"] / step["wall"] for step in gate.measured]
    out: dict[str, Any] = {
        "tokens_per_second": statistics.median(rates),
        "seconds": [step["wall"] for step in gate.measured],
        "peak_mb": device.peak_mb(),
        "losses": gate.measured[-1]["losses"],
    }
    if peak:
        used = [
            needed_flops(job, i, step) / step["wall"] / peak for i, step in enumerate(gate.measured, start=args.warmup)
        ]
        out["utilization"] = statistics.median(used)
    return out


def shares(job: Job, args: argparse.Namespace) -> dict[str, float]:
    """What part of a step each sub-step takes, waiting for the device after each."""
    task = with_trueup.TASKS[job.task](job)
    sync = Device(job.device).sync
    clock = PartsClock(task.learner, sync) if isinstance(task, with_trueup.SFT | with_trueup.Reward) else None
    total: dict[str, float] = {}
    for i in range(args.warmup + args.part_steps):
        sync()
        began = time.perf_counter()
        parts = task.step(i).get("parts", {})
        sync()
        if clock:
            parts = clock.take(time.perf_counter() - began)
        if i >= args.warmup:
            total = {name: total.get(name, 0.0) + seconds for name, seconds in parts.items()}
    whole = sum(total.values())
    return {name: seconds / whole for name, seconds in total.items()}


class PartsClock:
    """Seconds that a learner spends in forward, backward and the optimizer."""

    def __init__(self, learner: Any, sync: Callable[[], None]) -> None:
        self.sync, self.seconds = sync, {"forward": 0.0, "optimizer": 0.0, "forward_backward": 0.0}
        learner.net.register_forward_pre_hook(lambda *_: self.start("forward"))
        learner.net.register_forward_hook(lambda *_: self.stop("forward"))
        self.began: dict[str, float] = {}
        for name, part in (("step", "optimizer"), ("forward_backward", "forward_backward")):
            setattr(learner, name, self.timed(part, getattr(learner, name)))

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any) -> Any:
            self.start(part)
            value = call(*args)
            self.stop(part)
            return value

        return inner

    def start(self, part: str) -> None:
        self.sync()
        self.began[part] = time.perf_counter()

    def stop(self, part: str) -> None:
        self.sync()
        self.seconds[part] += time.perf_counter() - self.began[part]

    def take(self, whole: float) -> dict[str, float]:
        """The parts of a step that took `whole` seconds, and the clock starts anew."""
        found, self.seconds = self.seconds, dict.fromkeys(self.seconds, 0.0)
        both = found["forward_backward"]
        return {
            "batch": whole - both - found["optimizer"],
            "forward": found["forward"],
            "backward": both - found["forward"],
            "optimizer": found["optimizer"],
        }


def trl_can(task: str) -> bool:
    if importlib.util.find_spec("trl") is None:
        return False
    return task != "ppo" or importlib.util.find_spec("trl.experimental.ppo") is not None


def table(results: Sequence[dict[str, Any]]) -> str:
    head = [
        *("task", "tokens/s", "utilization", "peak MB", "sub-steps"),
        *("TRL: tokens/s", "utilization", "peak MB", "Trueup/TRL"),
    ]
    lines = [head, ["---"] * len(head)]
    for r in results:
        cells = [r["task"]]
        for side in ("trueup", "trl"):
            found = r.get(side)
            used = f"{found['utilization']:.1%}" if found and "utilization" in found else "-"
            cells += [f"{found['tokens_per_second']:.0f}", used, f"{found['peak_mb']:.0f}"] if found else ["-"] * 3
            if side == "trueup":
                cells.append(", ".join(f"{name} {share:.0%}" for name, share in r["shares"].items()))
        ratio = r["trueup"]["tokens_per_second"] / r["trl"]["tokens_per_second"] if r.get("trl") else None
        cells.append(f"{ratio:.2f}" if ratio else "-")
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=["sft", "reward", "ppo"], default=["sft", "reward", "ppo"])
    parser.add_argument("--tiny", action="store_true", help="a tiny model; runs on a CPU too")
    parser.add_argument("--steps", type=int, default=10, help="measured steps")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--part-steps", type=int, default=3, help="steps in which sub-steps are timed")
    parser.add_argument("--batch", type=int, help="rows an optimizer step (pairs, for the reward model)")
    parser.add_argument("--micro-tokens", type=int, default=32768, help="Trueup's tokens at a time")
    parser.add_argument("--micro-rows", type=int, default=16, help="TRL's rows at a time")
    parser.add_argument("--ppo-epochs", type=int, default=4)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--peak", type=float, help="the device's dense FLOPs a second at this precision")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        raise SystemExit("no CUDA device; --tiny runs on the CPU")
    size = SIZES["T"] if args.tiny else QWEN
    size = replace(size, batch=args.batch or size.batch)
    peak = peak_of(device, args.peak)
    about = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{about}, peak {peak or 0:.3g} FLOPs/s, {args.precision}; {size.lengths}; {size.batch} rows a step")
    results = []
    for task in args.tasks:
        job = Job(
            task,
            str((args.out / task).resolve()),
            size,
            steps=args.warmup + max(args.steps, args.part_steps),
            precision=args.precision,
            device=device,
            lr=1e-5,
            ppo_epochs=args.ppo_epochs,
            micro_rows=min(args.micro_rows, size.batch),
            micro_tokens=args.micro_tokens,
        )
        write(job)
        found: dict[str, Any] = {"task": task, "trueup": measure(job, with_trueup.run, args, peak)}
        found["shares"] = shares(job, args)
        if trl_can(task):
            try:
                found["trl"] = measure(job, with_trl.run, args, peak)
            except torch.cuda.OutOfMemoryError as error:
                print(f"TRL's {task} does not fit: {str(error).splitlines()[0]}; try a smaller --micro-rows")
        results.append(found)
        print(table([found]), flush=True)
    text = {"device": about, "peak": peak, "size": str(size), "precision": args.precision, "results": results}
    (args.out / "results.json").write_text(json.dumps(text, indent=1))
    (args.out / "results.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
