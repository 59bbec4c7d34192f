"""What stands between a side's steps: it says when the next one may run, and measures it.

A side calls `begin` before a step and `end` after it. TRL's trainers own their loop, so theirs are called from a
callback; ours from a plain loop. The standard library alone.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

Figures = dict[str, Any]
"""Of one step: samples, tokens, losses {name: value}; where known parts {name: seconds}."""


class Done(Exception):
    """No further step is wanted."""


class Gate(Protocol):
    def begin(self) -> None:
        """Returns when the next step may run. Raises Done where there is none."""

    def end(self, figures: Figures) -> None:
        """The step is over."""


class PipeGate:
    """Steps on the order of another process: a line in on stdin, a line of JSON out on what was stdout.

    stdout itself is turned to stderr, since libraries print what they like.
    """

    def __init__(self) -> None:
        self._out: IO[str] = sys.stdout
        sys.stdout = sys.stderr
        self._ready = False

    def say(self, message: Figures) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def begin(self) -> None:
        if not self._ready:
            gc.collect()
            self._start_mb, self._ready = memory_mb("VmRSS"), True
            forget_peak()
            self.say({"ready": True, "setup_mb": self._start_mb})
        if sys.stdin.readline().strip() != "step":
            raise Done
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def end(self, figures: Figures) -> None:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self.say({**figures, "wall": wall, "cpu": cpu, "peak_mb": memory_mb("VmHWM") - self._start_mb})


class CountGate:
    """A fixed number of steps in this process, after some that are not measured. `sync` waits for the device."""

    def __init__(self, warmup: int, steps: int, sync: Callable[[], None]) -> None:
        self.left, self.warmup, self.sync = warmup + steps, warmup, sync
        self.measured: list[Figures] = []

    def begin(self) -> None:
        if not self.left:
            raise Done
        self.sync()
        self._start = time.perf_counter()

    def end(self, figures: Figures) -> None:
        self.sync()
        seconds = time.perf_counter() - self._start
        self.left -= 1
        if self.warmup:
            self.warmup -= 1
        else:
            self.measured.append({**figures, "wall": seconds})


def memory_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process; 0 where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":")), 0.0)


def forget_peak() -> None:
    """The peak starts anew from what is held now, where Linux allows it; otherwise set-up's own peak counts."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak of memory could not be reset: set-up may be in it", file=sys.stderr)
