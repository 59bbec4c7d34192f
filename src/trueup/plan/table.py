"""The plan as it is printed, and sizes as they are written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from trueup.plan.walks import Estimate
from trueup.recipe import Stage
from trueup.records import UserError
from trueup.run import size_of


@dataclass
class Planned:
    stage: Stage
    state: str
    seconds: float | None = None
    known_from: str = ""
    estimate: Estimate | None = None
    largest: int | None = None


def memory_of(text: str) -> int:
    """'24GB', '512MB', '1.5 TB' or '16GiB' as bytes. Raises UserError for anything else."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT])?(i?)B?\s*", text, re.IGNORECASE)
    try:
        assert match
        number = float(match[1])
    except (AssertionError, ValueError):
        raise UserError(f"memory '{text}': expected a size such as 24GB or 512MB") from None
    return int(number * (1024 if match[3] else 1000) ** " KMGT".index((match[2] or " ").upper()))


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


PARTS = ("gradients", "optimizer", "activations", "logits", "KV cache", "compiled products")


def lines(planned: Sequence[Planned], memory: int | None) -> list[str]:
    """The plan as it is printed."""
    out = [f"{'stage':12} {'phase':9} {'state':10} {'time':>8} {'disk':>8} {'memory':>8}"]
    for p in planned:
        e = p.estimate
        disk, peak = (size_of(sum(e.disk.values())), size_of(e.peak) if e.peak else "") if e else ("", "")
        state = p.state if len(p.state) <= 10 else "goes on"
        row = f"{p.stage.name:12} {p.stage.phase:9} {state:10} {duration(p.seconds):>8} {disk:>8} {peak:>8}"
        out.append(f"{row}  {p.known_from}".rstrip())
    due = [p for p in planned if p.estimate]
    known = [p.seconds for p in due if p.seconds is not None]
    if due:
        unknown = [p.stage.name for p in due if p.seconds is None]
        more = f", and {', '.join(unknown)} which nothing is known of" if unknown else ""
        space = sum(sum(p.estimate.disk.values()) for p in due if p.estimate)
        out.append(f"due: {duration(sum(known))}{more}; {size_of(space)} of disk")
    else:
        out.append("nothing is due")
    for p in due:
        assert p.estimate
        if not p.estimate.moments:
            continue
        out += ["", f"{p.stage.name}: {p.estimate.rows}"]
        if p.state.startswith("goes on"):
            out.append(f"  {p.state}")
        at = p.estimate.at
        for name, parts in p.estimate.moments.items():
            mark = "*" if name == at else " "
            weights = {k.partition(": ")[2] or k: v for k, v in parts.items() if k.startswith("weights")}
            said = [f"{k} {size_of(v)}" for k, v in weights.items()]
            rest = [f"{k} {size_of(parts[k])}" for k in PARTS if parts.get(k)]
            shown = [f"weights ({', '.join(said)})", *rest]
            out.append(f"  {mark} {size_of(sum(parts.values())):>7}  {name}: {', '.join(shown)}")
        if p.estimate.disk:
            out.append("    disk: " + ", ".join(f"{k} {size_of(v)}" for k, v in p.estimate.disk.items() if v))
        if memory and p.estimate.micro:
            out.append("  " + _fits(p, memory))
    return out


def _fits(p: Planned, memory: int) -> str:
    assert p.estimate and p.estimate.micro
    key, tokens, most = p.estimate.micro
    if not p.largest:
        return f"does not fit into {size_of(memory)} with any micro-batch; docs/models.md says what takes less"
    if p.largest == most:
        return f"{size_of(memory)}: all {most} tokens of a step fit in one micro-batch ({key}={tokens} now)"
    return f"{size_of(memory)}: the largest micro-batch that fits is {key}={p.largest} ({tokens} now)"
