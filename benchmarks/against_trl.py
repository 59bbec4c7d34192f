"""Trueup and TRL side by side, step by step in turns: the same weights, rows, optimizer steps and one thread.

    OMP_NUM_THREADS=1 python benchmarks/against_trl.py --sizes S M

In order, for each task (sft, reward, dpo, ppo, rollout) and size: write random models and rows; start one process of
each side and let it set up; let the two step in turns, in a random order inside each pair, so that only one computes
at a time and both meet the same moods of the machine; then, in processes of their own, measure peak memory above set-
up and compute the losses of one and the same rollout on both sides. TRL runs in environments that this makes from
trl-requirements.txt (SFT, reward model, DPO) and trl-ppo-requirements.txt (PPO, and transformers' `generate`).

A rollout is 96 prompts: `generate` is given 32 at a time (16, 48 and 96 were no faster), Trueup its default, up to 128
slots, of which a row that ends leaves its own to one that waits.

The ratio of a pair is TRL's time over Trueup's (rollout: Trueup's tokens a second over `generate`'s, since draws differ
in length); given is the median over pairs, with the interval between two order statistics that covers the median with
95% or more whatever the distribution. Writes results.json and results.md. Not in it: GPUs (see gpu.py).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from sides.setting import SIZES, Job, write

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OURS, THEIRS = "with_trueup", "with_trl"
REQUIREMENTS = {
    "sft": "trl-requirements.txt",
    "reward": "trl-requirements.txt",
    "dpo": "trl-requirements.txt",
    "ppo": "trl-ppo-requirements.txt",
    "rollout": "trl-ppo-requirements.txt",
}
BARS = {"sft": 1.8, "reward": 1.6, "dpo": 2.2, "ppo": 2.0, "rollout": 2.8}
"""What is to be reached at size S in fp32."""
SAME = 1e-5
"""Losses of the same batch may differ by this."""


def environment(folder: Path, requirements: Path) -> Path:
    """The Python of a virtual environment that holds `requirements`, made or renewed where it does not."""
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = requirements.read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {requirements.name} into {folder} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
        stamp.write_text(wanted)
    return python


class Worker:
    """A process of one side; what it prints goes to a log file in the job's folder."""

    def __init__(self, python: Path, side: str, mode: str, job: Job, core: int | None) -> None:
        self.side = side
        log = Path(job.folder) / f"{side}.log"
        pin = ["taskset", "-c", str(core)] if core is not None else []
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src") if side == OURS else ""}
        self.log = log
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                [*pin, str(python), "-m", "sides.worker", side, mode],
                cwd=HERE,
                env=environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.send(job.json())

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.send("quit")
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.fail()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.fail()
        return json.loads(line)

    def fail(self) -> None:
        tail = "\n".join(self.log.read_text().splitlines()[-15:])
        raise SystemExit(f"{self.side} ended before its answer; the end of {self.log}:\n{tail}")

    def step(self) -> dict[str, Any]:
        self.send("step")
        return self.answer()


@dataclass
class Found:
    """What one task at one size showed. Times, samples and tokens are lists over pairs, by side."""

    task: str
    size: str
    job: Job
    wall: dict[str, list[float]] = field(default_factory=lambda: {OURS: [], THEIRS: []})
    cpu: dict[str, list[float]] = field(default_factory=lambda: {OURS: [], THEIRS: []})
    samples: dict[str, list[int]] = field(default_factory=lambda: {OURS: [], THEIRS: []})
    tokens: dict[str, list[int]] = field(default_factory=lambda: {OURS: [], THEIRS: []})
    losses: dict[str, list[dict[str, float]]] = field(default_factory=lambda: {OURS: [], THEIRS: []})
    """Of every step, warm-up steps too: step n of both sides has the same weights, but for rounding, and rows."""
    parts: list[dict[str, float]] = field(default_factory=list)
    peak_mb: dict[str, float] = field(default_factory=dict)
    replayed: dict[str, dict[str, float]] = field(default_factory=dict)
    """The losses of one and the same rollout."""

    def ratios(self, clock: str = "wall") -> list[float]:
        times: dict[str, list[float]] = getattr(self, clock)
        pairs = zip(times[THEIRS], times[OURS], self.tokens[THEIRS], self.tokens[OURS], strict=True)
        if self.task == "rollout":
            return [(a / m) / (b / n) for a, b, m, n in pairs]
        return [a / b for a, b, _, _ in pairs]

    def rate(self, what: str, side: str) -> float:
        """Median samples or tokens a second of wall time."""
        return statistics.median(n / t for n, t in zip(getattr(self, what)[side], self.wall[side], strict=True))

    def same(self) -> tuple[dict[str, float], dict[str, float]]:
        """Losses of the same batch: TRL's and ours."""
        if self.replayed:
            return self.replayed[THEIRS], self.replayed[OURS]
        return (self.losses[THEIRS] or [{}])[0], (self.losses[OURS] or [{}])[0]

    def difference(self) -> float | None:
        theirs, ours = self.same()
        return max((abs(theirs[name] - ours[name]) for name in theirs), default=None)

    def summary(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "task": self.task,
            "size": self.size,
            "pairs": len(self.wall[OURS]),
            "peak_mb": self.peak_mb,
            "losses": dict(zip((THEIRS, OURS), self.same(), strict=True)),
            "loss_difference": self.difference(),
        }
        if not self.wall[OURS]:
            return out
        for clock in ("wall", "cpu"):
            low, high, coverage = interval(self.ratios(clock))
            out[f"ratio_{clock}"] = statistics.median(self.ratios(clock))
            out[f"interval_{clock}"] = [low, high]
            out["coverage"] = coverage
        for what in ("samples", "tokens"):
            out[f"{what}_per_second"] = {side: self.rate(what, side) for side in (THEIRS, OURS)}
        return out


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """(low, high, coverage): the k-th smallest and k-th largest value, k as large as the coverage of the median allows.

    Each value lies below the median with probability 1/2, so that the interval misses it where fewer than k of n do, or
    more than n - k: coverage 1 - 2 sum_{i < k} C(n, i) / 2^n. Below 6 values even the extremes cover less than 95%.
    """
    ordered, n = sorted(values), len(values)

    def coverage(k: int) -> float:
        return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

    k = max((k for k in range(1, n // 2 + 1) if coverage(k) >= level), default=1)
    return ordered[k - 1], ordered[-k], coverage(k)


def in_turns(found: Found, workers: dict[str, Worker], warmup: int, pairs: int, seed: int) -> None:
    """Warm-up steps, then pairs of steps in a random order."""
    for worker in workers.values():
        worker.answer()  # ready
    rng = random.Random(seed)
    for pair in range(-warmup, pairs):
        for side in rng.sample([OURS, THEIRS], 2):
            step = workers[side].step()
            found.losses[side].append(step["losses"])
            if pair >= 0:
                for name in ("wall", "cpu", "samples", "tokens"):
                    getattr(found, name)[side].append(step[name])
                if side == OURS and "parts" in step:
                    found.parts.append(step["parts"])
        if pair >= 0:
            wall, cpu = found.ratios()[-1], found.ratios("cpu")[-1]
            print(
                f"  pair {pair + 1:2}: TRL {found.wall[THEIRS][-1]:7.2f} s  Trueup {found.wall[OURS][-1]:7.2f} s  "
                f"ratio {wall:.2f} (CPU time {cpu:.2f})",
                flush=True,
            )


def measure(task: str, name: str, args: argparse.Namespace) -> Found:
    steps = max(args.warmup + args.pairs, args.memory_steps, 1)
    folder = args.out / f"{task}-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("*.log"):
        log.unlink()
    job = Job(task, str(folder.resolve()), SIZES[name], steps, ppo_epochs=args.ppo_epochs, slots=args.slots)
    write(job, args.seed)
    theirs = REQUIREMENTS[task].removesuffix("-requirements.txt")
    python = {OURS: Path(sys.executable), THEIRS: environment(args.envs / theirs, HERE / REQUIREMENTS[task])}

    def start(side: str, mode: str) -> Worker:
        return Worker(python[side], side, mode, job, args.core)

    found = Found(task, name, job)
    print(f"{task} at {name}: {job.size}", flush=True)
    if args.pairs:
        with ExitStack() as stack:
            workers = {side: stack.enter_context(start(side, "steps")) for side in (OURS, THEIRS)}
            in_turns(found, workers, args.warmup, args.pairs, args.seed)
    for side in (OURS, THEIRS) if args.memory_steps else ():
        with start(side, "steps") as worker:
            worker.answer()
            taken = [worker.step() for _ in range(args.memory_steps)]
            found.peak_mb[side] = max(step["peak_mb"] for step in taken)
            found.losses[side] = found.losses[side] or [step["losses"] for step in taken]
    if task in ("ppo", "rollout"):
        for side, mode in ((THEIRS, "record"), (OURS, "replay")):
            with start(side, mode) as worker:
                found.replayed[side] = worker.answer()
    return found


def machine(args: argparse.Namespace) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "core": args.core,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers")},
        **{f"TRL of {task}": pinned(file, "trl") for task, file in REQUIREMENTS.items() if task != "rollout"},
    }


def pinned(requirements: str, package: str) -> str:
    lines = (HERE / requirements).read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(package + "=="))


def table(results: Sequence[dict[str, Any]]) -> str:
    """A row a task and size, TRL's figure before ours."""
    head = [
        *("task", "size", "samples/s, TRL", "Trueup", "tokens/s, TRL", "Trueup", "ratio (wall)", "95% interval"),
        *("ratio (CPU)", "peak MB above set-up, TRL", "Trueup", "loss, TRL", "Trueup", "difference"),
    ]
    lines = [head, ["---"] * len(head)]
    for r in results:
        cells = [r["task"], r["size"]]
        for what, digits in (("samples_per_second", 1), ("tokens_per_second", 0)):
            cells += [f"{r[what][side]:.{digits}f}" if what in r else "" for side in (THEIRS, OURS)]
        if "ratio_wall" in r:
            low, high = r["interval_wall"]
            cells += [f"{r['ratio_wall']:.2f}", f"{low:.2f} to {high:.2f}", f"{r['ratio_cpu']:.2f}"]
        else:
            cells += [""] * 3
        cells += [f"{r['peak_mb'][side]:.0f}" if r["peak_mb"] else "" for side in (THEIRS, OURS)]
        cells += [", ".join(f"{v:.6f}" for v in r["losses"][side].values()) for side in (THEIRS, OURS)]
        cells.append("" if r["loss_difference"] is None else f"{r['loss_difference']:.1e}")
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def verdicts(results: Sequence[dict[str, Any]]) -> list[str]:
    """What is not as it should be: unequal losses at any size; at S, an interval that starts 10% below its bar."""
    out = []
    for r in results:
        if r["loss_difference"] is not None and r["loss_difference"] > SAME:
            out.append(f"{r['task']} at {r['size']}: losses of the same batch differ by {r['loss_difference']:.1e}")
        if r["size"] == "S" and "ratio_wall" in r and r["interval_wall"][0] < 0.9 * BARS[r["task"]]:
            out.append(f"{r['task']} at S: from {r['interval_wall'][0]:.2f}, 10% below {BARS[r['task']]} and more")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=list(REQUIREMENTS), default=list(REQUIREMENTS))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["S", "M"])
    parser.add_argument(
        "--pairs", type=int, default=9, help="measured steps of each side; 0 for memory and losses only"
    )
    parser.add_argument("--warmup", type=int, default=2, help="steps of each side before them")
    parser.add_argument("--memory-steps", type=int, default=3, help="steps of the memory processes; 0 leaves them out")
    parser.add_argument("--ppo-epochs", type=int, default=4)
    parser.add_argument("--slots", type=int, help="rows that Trueup samples at a time; its default (128) if not given")
    parser.add_argument("--core", type=int, help="pin both sides to this core")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--envs", type=Path, default=ROOT / "build" / "bench", help="where TRL's environments are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench" / "results")
    args = parser.parse_args()
    args.envs, args.out = args.envs.resolve(), args.out.resolve()
    about = machine(args)
    results: list[dict[str, Any]] = []
    raw: list[dict[str, Any]] = []
    for name in args.sizes:
        for task in args.tasks:
            began = time.monotonic()
            found = measure(task, name, args)
            results.append({**found.summary(), "minutes": (time.monotonic() - began) / 60})
            raw.append(asdict(found))
            lengths = f"Lengths at {name}: {SIZES[name].lengths}."
            text = {"machine": about, "bars": BARS, "results": results, "steps": raw}
            (args.out / "results.json").write_text(json.dumps(text, indent=1))
            (args.out / "results.md").write_text(table(results))
            print(table(results[-1:]) + lengths, flush=True)
    print("\n" + table(results))
    missed = verdicts(results)
    print("\n".join(missed))
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
