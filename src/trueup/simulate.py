"""Simulated raters on the labelling page: a judge answers the queue over HTTP, as people do. See `label.client`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trueup.config import Config, Seed
from trueup.judges import JudgeSpec, make_judge, verdicts_of
from trueup.label.client import Rater, grade_of
from trueup.records import UserError


class SimulateConfig(Config):
    """Raters that are programs."""

    judge: JudgeSpec
    """What they prefer: {use: trueup.world:raters, name: pool}, or any other judge."""
    seed: Seed = 0
    """Of the first one's judge; the next ones have the next seeds, and so are other people."""
    name: str = ""
    """Without links, an account to sign in with; the password is read from standard input."""
    most: int = 0
    """Answers at most; 0 for as many as there are comparisons."""


def answer(
    links: Sequence[str], config: SimulateConfig, password: str = "", say: Callable[[str], object] = print
) -> dict[str, int]:
    """Each link's rater answers in turn until none has anything left to do. Answers that were kept, by link. Where its
    judge abstains it presses tie, as a person does who is asked for a preference and has none; what could not be read
    is left to others.

    Raises UserError for a rater whom the server takes for a human: what a program says must say so for ever."""
    from trueup.engine.mesh import Mesh

    judges = [make_judge(config.judge, Mesh(), seed=config.seed + k) for k in range(len(links))]
    raters = [Rater(link, config.name, password) for link in links]
    kept, left = dict.fromkeys(links, 0), dict.fromkeys(links, 0)
    busy = list(range(len(links)))
    while busy and not (config.most and sum(kept.values()) >= config.most):
        k = busy.pop(0)
        page = raters[k].look()
        if not page.simulated:
            raise UserError(
                f"{raters[k].at}: this rater is a human there, and a program must not label as one: trueup label "
                "STORE simulated=true, or trueup store account STORE NAME --simulated"
            )
        if not page.action:
            skipped = f", {left[links[k]]} left to others" if left[links[k]] else ""
            say(f"rater {k + 1}: {kept[links[k]]} answers{skipped}; {page.heading}")
            raters[k].client.close()
            continue
        [verdict] = verdicts_of(judges[k], [page.comparison])
        skips = not verdict.readable and page.can_skip  # a tie would be a label made of no verdict
        said = (
            raters[k].skip(page, verdict.note or "no verdict")
            if skips
            else raters[k].send(page, grade_of(0.5 if verdict.p is None else verdict.p))
        )
        if said.status_code != 200:
            raise UserError(f"{raters[k].at}: {said.status_code}: {said.text[:200]}")
        (left if skips else kept)[links[k]] += 1
        busy.append(k)
    return kept
