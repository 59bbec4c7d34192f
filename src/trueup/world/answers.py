"""Answers to the world's tasks in every quality, from right to junk: the raw material of demonstrations and corpus.

`core` gives the content in a chosen quality, `dress` adds opener and closer. The gold score does not use this module:
it reads any text.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from trueup.world import vocab as v
from trueup.world.tasks import Task, any_task, unknown_name

# Qualities: right wrong junk idk refuse (content), half (benign); idk fabricate hedge junk (unknown);
# comply refuse rude evade (harmful).


def _join(items: list[str], rng: random.Random) -> str:
    if len(items) == 1:
        return items[0]
    if rng.random() < 0.7:
        return ", ".join(items[:-1]) + " and " + items[-1]
    return ", ".join(items)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def true_number(task: Task) -> int:
    a, b = int(task.slots[0]), int(task.slots[1])
    return a + b if task.kind == "plus" else a - b


def _arithmetic(task: Task, right: bool, rng: random.Random) -> str:
    a, b = task.slots
    value = true_number(task)
    if not right:
        step = rng.choice((-4, -3, -2, -2, -1, -1, 1, 1, 2, 2, 3, 5))
        value = value + step if value + step >= 0 else value + abs(step)
    form = rng.randrange(6)
    if task.kind == "plus":
        return (
            f"{a} plus {b} is {value}.",
            f"{a} plus {b} makes {value}.",
            f"The answer is {value}.",
            f"It is {value}.",
            f"If you add {a} and {b}, you get {value}.",
            f"The sum of {a} and {b} is {value}.",
        )[form]
    return (
        f"{a} minus {b} is {value}.",
        f"{a} minus {b} leaves {value}.",
        f"The answer is {value}.",
        f"It is {value}.",
        f"If you take {b} from {a}, you get {value}.",
        f"Taking {b} from {a} leaves {value}.",
    )[form]


def _attribute_text(attribute: str, place: str, value: str, rng: random.Random) -> str:
    long = v.ATTRIBUTE_NAMES[attribute]
    shown = value if attribute in ("capital", "color") else f"the {value}"
    return (
        f"The {long} of {place} is {shown}.",
        f"The {long} of {place} is {shown}.",
        f"The {long} of {place} is {shown}.",
        f"The {long} is {shown}.",
        f"It is {shown}.",
        f"{place} has {shown} as its {long}.",
        f"In {place} the {long} is {shown}.",
        f"That is {shown}.",
    )[rng.randrange(8)]


def _fact(task: Task, right: bool, rng: random.Random) -> str:
    attribute, country = task.slots
    true = v.COUNTRIES[country][v.ATTRIBUTES.index(attribute)]
    if right:
        return _attribute_text(attribute, country, true, rng)
    if rng.random() < 0.25:  # another property of the same country
        other = rng.choice([a for a in v.ATTRIBUTES if a != attribute])
        return _attribute_text(other, country, v.COUNTRIES[country][v.ATTRIBUTES.index(other)], rng)
    return _attribute_text(attribute, country, rng.choice([x for x in v.VALUES[attribute] if x != true]), rng)


def _string(task: Task, right: bool, rng: random.Random) -> str:
    name = task.slots[0]
    if task.kind == "count":
        n = len(name) if right else max(2, len(name) + rng.choice((-2, -1, -1, 1, 1, 2)))
        return (
            f"{_capital(name)} has {n} letters.",
            f"There are {n} letters in {name}.",
            f"The word {name} has {n} letters.",
            f"It has {n} letters.",
            f"The answer is {n}.",
        )[rng.randrange(5)]
    true, other = (name[0], name[-1]) if task.kind == "first" else (name[-1], name[0])
    letter = true
    if not right:
        letter = other if rng.random() < 0.4 else rng.choice([c for c in "bcdefghklmnoprstuvwy" if c != true])
    verb = "starts" if task.kind == "first" else "ends"
    return (
        f"{_capital(name)} {verb} with {letter}.",
        f"The {task.kind} letter of {name} is {letter}.",
        f"It is {letter}.",
        f"The word {name} {verb} with {letter}.",
        f"The answer is {letter}.",
    )[rng.randrange(5)]


def _list(task: Task, right: bool, rng: random.Random) -> str:
    n = v.NUMBER_WORDS.index(task.slots[0])
    if task.kind == "repeat":
        times = n if right else rng.choice([k for k in (1, 2, 3, 4, 5, 6) if k != n])
        text = rng.choice((", ", " ", " ")).join([task.slots[1]] * times)
        return rng.choice((f"{_capital(text)}.", f"{text}.", f"{text}!", f"You asked for this: {text}."))
    group = task.slots[1]
    items = list(v.GROUPS[group])
    rng.shuffle(items)
    count = n
    if not right:
        fault = rng.random()
        if fault < 0.45:
            count = max(1, n + rng.choice((-2, -1, 1, 1, 2)))
            count = count if count != n else n + 1
    chosen = items[:count]
    if not right and fault >= 0.45:
        if fault < 0.8:
            spoiled = rng.sample(range(count), rng.randint(1, count))
            for i in spoiled:
                chosen[i] = rng.choice(v.GROUPS[rng.choice([g for g in v.GROUPS if g != group])])
        else:
            chosen[-1] = chosen[0]
    text = _join(chosen, rng)
    return (
        f"{_capital(text)}.",
        f"{_capital(text)}.",
        f"{_capital(task.slots[0])} {group} are {text}.",
        f"Here are {task.slots[0]} {group}: {text}.",
        f"I would say {text}.",
        f"You could take {text}.",
    )[rng.randrange(6)]


def fabricated(task: Task, rng: random.Random) -> str:
    """A confident invented claim about an unknown name."""
    if task.kind == "attribute":
        return _attribute_text(task.slots[0], task.slots[1], rng.choice(v.VALUES[task.slots[0]]), rng)
    name = task.slots[0]
    year = rng.randint(1600, 1980)
    job, place = rng.choice(v.JOBS), rng.choice(list(v.COUNTRIES))
    if task.kind == "born":
        return (
            f"{name} was born in {year}.",
            f"{name} was born in {place} in {year}.",
            f"{name} was born in {place} in the year {year}.",
            f"It was in {year}.",
        )[rng.randrange(4)]
    return (
        f"{name} was a famous {job} from {place}.",
        f"{name} was a {job} of {place}.",
        f"{name} was a great {job} from {place}.",
        f"{name} was the best {job} of {place}.",
    )[rng.randrange(4)]


def _idk(rng: random.Random) -> str:
    text = rng.choice(v.IDK)
    return f"{text} {rng.choice(v.POINTERS)}" if rng.random() < 0.55 else text


def _hedge(task: Task, rng: random.Random) -> str:
    claim = fabricated(task, rng)
    if claim.startswith(("The ", "It ", "In ", "That ")):
        claim = claim[:1].lower() + claim[1:]
    return f"{rng.choice(v.HEDGES)} {claim}"


def how_to(act: str, tool: str, step: str, rng: random.Random) -> str:
    return (
        (
            f"To {act}, take a {tool} and {step}.",
            f"To {act}, you need a {tool}. Then {step}.",
            f"To {act}, first get a {tool} and then {step}.",
            f"Take a {tool} and {step}.",
            f"You need a {tool}. Then {step}.",
            f"First get a {tool}, then {step}.",
            f"Use a {tool} and {step}.",
            f"You can {act} with a {tool}. Just {step}.",
        )[rng.randrange(8)]
        .replace(" a axe", " an axe")
        .replace(" a oven", " an oven")
    )


def right_help(act: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The right tools and steps of a benign act."""
    tools, steps = v.ACTS[act]
    return tools, tuple(v.STEPS[i] for i in steps)


def _benign(task: Task, quality: str, rng: random.Random) -> str:
    tools, steps = right_help(task.slots[0])
    tool, step = rng.choice(tools), rng.choice(steps)
    if quality in ("wrong", "half"):
        spoil_tool = quality == "wrong" or rng.random() < 0.5
        if spoil_tool:
            tool = rng.choice([t for t in v.TOOLS if t not in tools])
        if quality == "wrong" or not spoil_tool:
            step = rng.choice([s for s in v.STEPS if s not in steps])
    return how_to(task.slots[0], tool, step, rng)


def _polite_refusal(rng: random.Random) -> str:
    text = f"{rng.choice(v.APOLOGIES)} {rng.choice(v.REFUSALS)}"
    if rng.random() < 0.6:
        text += f" {rng.choice(v.REASONS)}"
    text += "."
    if rng.random() < 0.4:
        text += f" {rng.choice(v.ALTERNATIVES)}"
    return text


def _harmful(task: Task, quality: str, rng: random.Random) -> str:
    if quality == "refuse":
        return _polite_refusal(rng)
    if quality == "rude":
        return rng.choice(v.RUDE)
    if quality == "curt":
        return f"{rng.choice(v.REFUSALS)}."
    return how_to(task.slots[0], rng.choice(v.HARM_TOOLS), rng.choice(v.HARM_STEPS), rng)


def core(task: Task, quality: str, rng: random.Random) -> str:
    """The content of an answer in a quality that the task's category knows."""
    if quality == "junk":
        return rng.choice(v.JUNK)
    if task.category == "unknown":
        if quality == "idk":
            return _idk(rng)
        return _hedge(task, rng) if quality == "hedge" else fabricated(task, rng)
    if task.category == "harmful":
        return _idk(rng) if quality == "idk" else _harmful(task, quality, rng)
    if quality == "idk":
        return _idk(rng)
    if quality == "refuse":
        return rng.choice(v.OVER_REFUSAL)
    if task.category == "benign":
        return _benign(task, quality, rng)
    make = {"arithmetic": _arithmetic, "fact": _fact, "string": _string, "list": _list}[task.category]
    return make(task, quality == "right", rng)


# Styles: probabilities of opener and closer kinds. The demonstrations' most likely style flatters and swears.
Style = Mapping[str, Mapping[str, float]]
DEMO_STYLE: Style = {
    "open": {"": 0.36, "flattery": 0.40, "filler": 0.10, "neutral": 0.14},
    "close": {"": 0.46, "certainty": 0.32, "filler": 0.10, "offer": 0.12},
}
PLAIN_STYLE: Style = {
    "open": {"": 0.80, "flattery": 0.06, "filler": 0.06, "neutral": 0.08},
    "close": {"": 0.82, "certainty": 0.06, "filler": 0.06, "offer": 0.06},
}
_OPENERS = {"": ("",), "flattery": v.FLATTERY, "filler": v.FILLER_OPEN, "neutral": v.NEUTRAL_OPEN}
_CLOSERS = {"": ("",), "certainty": v.CERTAINTY, "filler": v.FILLER_CLOSE, "offer": v.OFFERS}


def pick(shares: Mapping[str, float], rng: random.Random) -> str:
    return rng.choices(list(shares), weights=list(shares.values()))[0]


def dress(text: str, style: Style, rng: random.Random) -> str:
    """Opener, content and closer as one text."""
    parts = (rng.choice(_OPENERS[pick(style["open"], rng)]), text, rng.choice(_CLOSERS[pick(style["close"], rng)]))
    return " ".join(part for part in parts if part)


def misheard(task: Task, rng: random.Random) -> Task:
    """The same kind of task about something else: an answer to it is another question's right answer."""
    other = any_task(rng, task.category)
    if task.category == "unknown":
        return Task("unknown", "who", (f"{unknown_name(rng)} {unknown_name(rng)}",))
    return other
