"""trueup's command line in a process of its own, which can be killed.

Reading torch and transformers takes as long as the work of a small stage, so these processes are forked from one that
has read them and has done nothing else. That `python -m trueup` itself works is tested where a command line is.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

PRELOAD = ["trueup.cli", "trueup.recipe", "trueup.study", "trueup.phases.ppo", "trueup.evaluate.compare"]


class Command:
    """`trueup ARGUMENTS` in `folder`; what it says goes to one file. `largest`: KiB that a file of it may have."""

    def __init__(
        self, folder: Path, *arguments: str, env: Mapping[str, str] | None = None, largest: int | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._out = tempfile.NamedTemporaryFile(mode="r", errors="replace")  # noqa: SIM115
        wanted = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        self._process = context.Process(target=_run, args=(str(folder), arguments, wanted, largest, self._out.name))
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, or None while it is at work."""
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def said(self) -> str:
        """What it has said so far."""
        return Path(self._out.name).read_text(errors="replace")

    def wait(self) -> tuple[int, str]:
        """Its exit code and all that it said, at its end."""
        self._process.join()
        code = self._process.exitcode
        assert code is not None
        return code, self.said()


def _run(folder: str, arguments: tuple[str, ...], env: dict[str, str], largest: int | None, out: str) -> None:
    import torch

    from trueup.cli import main

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.path[0] = ""
    sys.argv = ["trueup", *arguments]
    said = os.open(out, os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest * 1024, largest * 1024))
    main()
