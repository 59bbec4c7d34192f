"""A process of one side: `python -m sides.worker with_trl|with_trueup steps|record|replay`, the job on its first line.

steps    takes steps as they are ordered on stdin (see PipeGate)
record   one step, whose rollout and losses go into `record.json` of the job's folder
replay   the losses of that rollout, as this side computes them
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch

from sides.gate import PipeGate
from sides.setting import Job


class OpenGate:
    """For a step that nobody measures."""

    def begin(self) -> None: ...

    def end(self, figures: object) -> None: ...


def main() -> None:
    side, mode = sys.argv[1:]
    gate = PipeGate()
    torch.set_num_threads(1)
    job = Job.of(sys.stdin.readline())
    module = importlib.import_module(f"sides.{side}")
    file = Path(job.folder) / "record.json"
    if mode == "steps":
        module.run(job, gate)
    elif mode == "record":
        found = module.record(job, OpenGate())
        file.write_text(json.dumps(found))
        gate.say(found["losses"])
    else:
        gate.say(module.TASKS[job.task](job).replay(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
