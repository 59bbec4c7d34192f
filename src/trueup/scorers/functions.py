"""A Python function as a scorer, in either of two conventions, which its signature tells apart.

    def brevity(prompts, completions): ...                      ours: takes the records, Prompt and Completion
    def correct(completions, answer, **kwargs): ...             TRL's, told by its **kwargs: takes keywords alone

TRL's gets `prompts` (conversations: lists of messages), `completions` (each a list of one assistant message),
`completion_ids` (lists of token ids), and each column of the prompts file as a list, None where a row lacks it. Both
return a number a completion, and may be `async`; None means that the function does not apply to that row. A function
that takes no arguments returns a scorer instead.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from trueup.faults import told
from trueup.records import Completion, Prompt, Scorer, UserError
from trueup.scorers.asked import Asked, Own

if TYPE_CHECKING:
    from trueup.engine.mesh import Mesh


def from_function(name: str, function: Callable[..., Any], mesh: Mesh) -> Scorer:
    """The scorer that `function` is, or returns (see above)."""
    if not callable(function):
        raise UserError(f"'{name}' is no function, but {type(function).__name__}")
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # built into Python, such as max
        raise UserError(f"'{name}' has no signature that tells what it takes; wrap it in a function") from None
    waits = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return Asked(name, functools.partial(ask_by_keyword, name, function), mesh, waits=waits)
    if any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
        return Asked(name, function, mesh, waits=waits)
    with told(f"'{name}'"):
        scorer = function()
    if not isinstance(scorer, Scorer):
        raise UserError(f"'{name}' takes no arguments, so it must return a scorer; it returned {type(scorer).__name__}")
    return Own(name, scorer)


def ask_by_keyword(
    name: str, function: Callable[..., Any], prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> Any:
    """What a reward function of TRL's convention answers."""
    columns = list(dict.fromkeys(column for prompt in prompts for column in prompt.meta))
    given: dict[str, Any] = {column: [prompt.meta.get(column) for prompt in prompts] for column in columns}
    given |= {
        "prompts": [[dict(message) for message in prompt.messages] for prompt in prompts],
        "completions": [[{"role": "assistant", "content": completion.text}] for completion in completions],
        "completion_ids": [list(completion.ids) for completion in completions],
    }
    for parameter in inspect.signature(function).parameters.values():
        needed = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        if needed and parameter.name not in given:
            known = ", ".join(columns) or "none"
            raise UserError(f"'{name}' wants '{parameter.name}', which is no column of the prompts (columns: {known})")
    return function(**given)
