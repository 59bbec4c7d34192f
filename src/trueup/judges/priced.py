"""What asking servers would cost, before anything is asked."""

from __future__ import annotations

from collections.abc import Sequence

from trueup.engine.mesh import Mesh
from trueup.judges import JudgeSpec, make_judge
from trueup.judges.asking import Asking
from trueup.judges.endpoint import Server
from trueup.records import Comparison, UserError


def is_server(spec: JudgeSpec) -> bool:
    """Whether what it is asked is sent, and may be charged."""
    return isinstance(spec, dict) and {"constitution", "endpoint"} <= set(spec)


def priced(pairs: int, asked: Sequence[tuple[JudgeSpec, int, Sequence[Comparison]]]) -> str:
    """In one line, for judges with their seeds and what each is asked; those that are no servers cost nothing. Sends
    nothing. Raises UserError where none is a server."""
    found = []
    for spec, seed, comparisons in asked:
        if is_server(spec):
            judge = make_judge(spec, Mesh(), seed=seed)
            assert isinstance(judge, Asking) and isinstance(judge.answerer, Server)
            found.append(judge.answerer.estimate([q for c in comparisons for q in judge.questions(c)]))
    if not found:
        raise UserError("a dry run needs a judge with the keys constitution and endpoint: another is free")
    return (
        f"{pairs} pairs: {sum(f.requests for f in found)} requests to send, {sum(f.cached for f in found)} answered "
        f"before; at most {sum(f.cost for f in found):.6g} at the prices given, where none is tried twice; "
        f"{found[0].spent:.6g} booked before"
    )
