"""A scorer behind an address: `http://host:port/path`, or `https://`.

It is sent, by POST, up to 64 completions at a time as JSON,

    {"prompts": [[{"role": "user", "content": "2 + 2?"}]], "completions": ["It is 4."], "stops": ["eos"]}

and answers {"scores": [1.0]}: a number for each completion, in their order, or null where it does not apply. `stops`
says why each ended: `eos`, `stop` or `length`. An answer may take a minute. Where the connection fails or the server
answers 5xx it is asked again, four times at most, after 0.5, 1, 2 and 4 seconds.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from trueup.records import Completion, Prompt, UserError
from trueup.scorers.asked import Asked

if TYPE_CHECKING:
    from trueup.engine.mesh import Mesh

BATCH = 64
TIMEOUT = 60.0
PAUSES = (0.5, 1.0, 2.0, 4.0)


def from_address(url: str, mesh: Mesh) -> Asked:
    """The scorer at `url`."""

    async def ask(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Any]:
        return await asyncio.wrap_future(in_thread(lambda: scores_from(url, prompts, completions)))

    return Asked(url, ask, mesh, waits=True)


def in_thread(work: Callable[[], Any]) -> Future[Any]:
    """What `work()` will give. Unlike an executor's thread this one does not hold up a program that was stopped."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def scores_from(url: str, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Any]:
    """The server's answers, a batch after the other."""
    out: list[Any] = []
    for start in range(0, len(completions), BATCH):
        some = completions[start : start + BATCH]
        body = {
            "prompts": [[dict(m) for m in p.messages] for p in prompts[start : start + BATCH]],
            "completions": [c.text for c in some],
            "stops": [c.stop for c in some],
        }
        answer = post(url, json.dumps(body).encode())
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or len(scores) != len(some):
            raise UserError(f'{url}: expected {{"scores": [{len(some)} numbers]}}, got {json.dumps(answer)[:200]}')
        out += scores
    return out


def post(url: str, body: bytes) -> Any:
    """The JSON that `url` answers. Raises UserError, in one line, where it gives none."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    wrong = ""
    for pause in (0.0, *PAUSES):
        time.sleep(pause)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            wrong = f"HTTP {error.code} {error.reason}: {error.read(200).decode(errors='replace')}"
            if error.code < 500:
                break
        except ValueError as error:  # an address or an answer that cannot be read: asking again will not help
            wrong = f"not JSON: {error}"
            break
        except (OSError, http.client.HTTPException) as error:  # no connection, or too slow
            wrong = f"{getattr(error, 'reason', error) or type(error).__name__}"
    raise UserError(f"{url}: {' '.join(wrong.split())}")
