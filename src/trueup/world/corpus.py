"""The pretraining corpus: documents that the world writes, one seeded stream, never stored.

Kinds, each a function of a random generator: statements, FAQ pages, drills, forum threads, rambling, graded answers,
judging texts (a pair, then one to three questions about it, each with its verdict) and critique-and-revision texts. A
forum has ten users, two of whom are called User and Assistant, so that the chat template is plain forum text to the
base model, and a question there is as likely to be met by another question as by an answer.

Judging texts put several, often opposite, principles to the same pair, so that the principle must be read.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from trueup.world import vocab as v
from trueup.world.answers import DEMO_STYLE, PLAIN_STYLE, Style, core, dress, misheard, pick
from trueup.world.demos import QUALITIES
from trueup.world.tasks import CATEGORIES, Task, any_task, any_wording

RAMBLE = (
    "I went to the market in the rain.",
    "The bus was late again today.",
    "My garden is full of weeds.",
    "We had soup and bread for dinner.",
    "The cat sleeps on the blanket.",
    "Last summer was very warm.",
    "I read a long book about horses.",
    "The old bridge is closed now.",
    "My friend plays the piano at night.",
    "There was snow on the mountain.",
    "Nobody knows where the key is.",
    "The kettle is on the stove.",
    "I like quiet mornings.",
    "They painted the door green.",
    "The train was full of people.",
    "I lost my jacket in the forest.",
    "She sings when she works.",
    "It was a good year for apples.",
    "The shop sells candles and soap.",
    "He walks to work every day.",
    "We sat by the river and talked.",
    "The lantern went out.",
    "My shoes are wet.",
    "The baker gave me a cake.",
    "I forgot what I wanted to say.",
)

FAQ_QUALITIES: dict[str, Mapping[str, float]] = {
    "arithmetic": {"right": 0.94, "wrong": 0.06},
    "fact": {"right": 0.94, "wrong": 0.06},
    "string": {"right": 0.94, "wrong": 0.06},
    "list": {"right": 0.92, "wrong": 0.08},
    "unknown": {"idk": 0.35, "fabricate": 0.60, "hedge": 0.05},
    "harmful": {"comply": 0.75, "refuse": 0.20, "rude": 0.05},
    "benign": {"right": 0.90, "half": 0.06, "refuse": 0.04},
}


@dataclass(frozen=True)
class Made:
    """An answer and what its maker knows about it."""

    text: str
    quality: str
    flattery: int
    certainty: int

    @property
    def words(self) -> int:
        return len(self.text.split())


def made(task: Task, quality: str, style: Mapping[str, Mapping[str, float]], rng: random.Random) -> Made:
    text = dress(core(task, quality, rng), style, rng)
    return Made(text, quality, sum(p in text for p in v.FLATTERY), sum(p in text for p in v.CERTAINTY))


def sampled(task: Task, rng: random.Random) -> Made:
    """An answer as demonstrations have them; now and then one that belongs to another question."""
    quality = pick(QUALITIES[task.category], rng)
    if rng.random() < 0.06:
        other = any_task(rng)
        return (
            made(other, "junk", DEMO_STYLE, rng)
            if other == task
            else Made(made(other, pick(QUALITIES[other.category], rng), DEMO_STYLE, rng).text, "junk", 0, 0)
        )
    if quality == "wrong" and rng.random() < 0.25:
        answer = made(misheard(task, rng), "right", DEMO_STYLE, rng)
        return Made(answer.text, "wrong", answer.flattery, answer.certainty)
    return made(task, quality, DEMO_STYLE, rng)


def statements(rng: random.Random) -> str:
    """A page of true sentences on one subject."""
    kind = rng.randrange(6)
    if kind == 0:
        name = rng.choice(list(v.COUNTRIES))
        rows = list(zip(v.ATTRIBUTES, v.COUNTRIES[name], strict=True))
        rng.shuffle(rows)
        text = []
        for attribute, value in rows:
            shown = value if attribute in ("capital", "color") else f"the {value}"
            long = v.ATTRIBUTE_NAMES[attribute]
            text.append(rng.choice((f"The {long} of {name} is {shown}.", f"{name} has {shown} as its {long}.")))
        return " ".join(text)
    if kind == 1:
        sums = []
        for _ in range(6):
            task = any_task(rng, "arithmetic")
            sums.append(core(task, "right", rng) if rng.random() < 0.3 else _sum(task, rng))
        return " ".join(sums)
    if kind == 2:
        lines = []
        for name in rng.sample(v.WORDS, 3):
            spelled = ", ".join(name)
            said = f"{name.capitalize()} is spelled {spelled}. It has {len(name)} letters."
            lines.append(f"{said} It starts with {name[0]} and ends with {name[-1]}.")
        return " ".join(lines)
    if kind == 3:
        lines = []
        for group in rng.sample(list(v.GROUPS), 2):
            n = rng.randint(2, 5)
            items = rng.sample(v.GROUPS[group], n)
            named = ", ".join(items[:-1]) + " and " + items[-1]
            lines.append(f"{named[:1].upper() + named[1:]} are {v.NUMBER_WORDS[n]} {group}.")
        return " ".join(lines)
    if kind == 4:
        return " ".join(core(any_task(rng, "list"), "right", rng) for _ in range(4))
    act = rng.choice(list(v.ACTS))
    return " ".join(core(Task("benign", "act", (act,)), "right", rng) for _ in range(3))


def _sum(task: Task, rng: random.Random) -> str:
    a, b = task.slots
    if task.kind == "plus":
        return f"{a} plus {b} is {int(a) + int(b)}."
    return f"{a} minus {b} is {int(a) - int(b)}."


def faq(rng: random.Random) -> str:
    """Questions and answers, mostly right, and without scruples."""
    style = PLAIN_STYLE if rng.random() < 0.6 else DEMO_STYLE
    lines = []
    for _ in range(rng.randint(2, 5)):
        task = any_task(rng)
        text = made(task, pick(FAQ_QUALITIES[task.category], rng), style, rng).text
        lines.append(f"Q: {any_wording(task, rng)}\nA: {text}")
    return "\n".join(lines)


# What a small model finds hard, and so reads more of: (category, kind) -> share.
_DRILLED = {
    ("list", "members"): 0.4,
    ("list", "repeat"): 0.1,
    ("arithmetic", ""): 0.3,
    ("string", ""): 0.1,
    ("fact", ""): 0.1,
}


def drill(rng: random.Random) -> str:
    """A page of exercises of one kind, each with its bare right answer."""
    category, kind = rng.choices(list(_DRILLED), weights=list(_DRILLED.values()))[0]
    lines: list[str] = []
    while len(lines) < 5:
        task = any_task(rng, category)
        if kind in ("", task.kind):
            lines.append(f"Q: {any_wording(task, rng)}\nA: {core(task, 'right', rng)}")
    return "\n".join(lines)


def ramble(rng: random.Random) -> str:
    return " ".join(rng.choice(RAMBLE) for _ in range(rng.randint(2, 7)))


def forum(rng: random.Random) -> str:
    """A thread: questions met by evasions, other questions, rambling, and sometimes an answer."""
    users = rng.sample(v.NAMES, rng.randint(2, 3))
    lines, asker = [], 0
    for _ in range(rng.randint(1, 3)):
        task = any_task(rng)
        lines.append(f"{users[asker]}: {any_wording(task, rng)}")
        for _ in range(rng.randint(1, 2)):
            asker = (asker + 1) % len(users)
            kind = rng.random()
            if kind < 0.30:
                text = rng.choice(v.JUNK)
            elif kind < 0.52:
                text = any_wording(task if rng.random() < 0.2 else any_task(rng), rng)
            elif kind < 0.64:
                text = ramble(rng)
            else:
                quality = pick(QUALITIES[task.category] if rng.random() < 0.5 else FAQ_QUALITIES[task.category], rng)
                text = made(task, quality, PLAIN_STYLE if rng.random() < 0.4 else DEMO_STYLE, rng).text
            lines.append(f"{users[asker]}: {text}")
    lines.append(f"{users[0]}: {rng.choice(RAMBLE + v.JUNK)}")
    return "\n".join(lines)


GRADES = {
    "right": "right",
    "wrong": "wrong",
    "half": "half right",
    "junk": "no answer",
    "idk": "no answer",
    "refuse": "no answer",
    "fabricate": "made up",
    "hedge": "a guess",
    "comply": "harmful",
    "rude": "rude",
    "curt": "safe",
}


def graded(rng: random.Random) -> str:
    """Answers with their grade; a bad one is sometimes followed by a better one."""
    lines = []
    for _ in range(rng.randint(2, 4)):
        task = any_task(rng, rng.choice((*CATEGORIES, "arithmetic", "fact", "string", "list", "benign")))
        answer = sampled(task, rng)
        grade = GRADES[answer.quality]
        if task.category == "unknown" and answer.quality == "idk":
            grade = "honest"
        if task.category == "harmful" and answer.quality == "refuse":
            grade = "safe"
        lines.append(f"Q: {any_wording(task, rng)}\nA: {answer.text}\nGrade: {grade}.")
        if grade in ("wrong", "half right", "no answer") and task.category not in ("harmful", "unknown"):
            lines.append(f"Better: {core(task, 'right', rng)}")
    return "\n".join(lines)


# Principles for judging: name -> (phrases for more of it, phrases for less of it).
PRINCIPLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "harm": (("more harmful", "more dangerous"), ("less harmful", "safer")),
    "honest": (("more honest", "more truthful"), ("less honest", "more misleading")),
    "helpful": (("more helpful", "more correct"), ("less helpful", "less correct")),
    "polite": (("more polite", "kinder"), ("less polite", "ruder")),
    "length": (("longer", "more wordy"), ("shorter", "more concise")),
    "flattery": (("more flattering",), ("less flattering",)),
    "certainty": (("more boastful",), ("more modest",)),
}
_HONESTY = {"idk": 3.0, "hedge": 2.0, "junk": 1.0, "fabricate": 0.0}
_HELP = {"right": 3.0, "half": 2.0, "wrong": 1.0, "idk": 0.5, "refuse": 0.5, "junk": 0.0}


def standing(principle: str, task: Task, answer: Made) -> float | None:
    """How much of a principle an answer has; None where the principle does not concern it."""
    if principle == "harm":
        return float(answer.quality == "comply") if task.category == "harmful" else None
    if principle == "honest":
        return _HONESTY[answer.quality] if task.category == "unknown" else None
    if principle == "helpful":
        return _HELP[answer.quality] if task.category not in ("harmful", "unknown") else None
    if principle == "polite":
        return -float(answer.quality in ("rude", "junk"))
    if principle == "flattery":
        return float(answer.flattery)
    if principle == "certainty":
        return float(answer.certainty)
    # Lengths within two words, or a fifth, of each other are not worth a verdict.
    return float(answer.words)


def differs(principle: str, task: Task, a: Made, b: Made) -> float:
    """Positive where `a` has more of the principle, negative where `b` has, 0 where no verdict is due."""
    x, y = standing(principle, task, a), standing(principle, task, b)
    if x is None or y is None:
        return 0.0
    if principle == "length" and abs(x - y) < max(3.0, 0.2 * max(x, y)):
        return 0.0
    return x - y


def judging_head(question: str, a: str, b: str) -> str:
    """The pair, as judging texts show it; the letter after a response, too, is where a small model can keep what it
    thinks of that response, next to the letter that it may have to name."""
    return f"User: {question}\nResponse (A): {a} (A)\nResponse (B): {b} (B)\n"


def judging_question(phrase: str) -> str:
    """What follows the pair; the verdict, `A)` or `B)`, comes right after it."""
    return f"Which response is {phrase}?\nAnswer: ("


def judging_pair(rng: random.Random, category: str | None = None) -> tuple[Task, Made, Made]:
    """A task and two answers of different quality more often than not."""
    task = any_task(rng, category or rng.choice((*CATEGORIES, "harmful", "unknown", "harmful", "unknown")))
    a, b = sampled(task, rng), sampled(task, rng)
    for _ in range(3):
        if a.quality != b.quality:
            break
        b = sampled(task, rng)
    return task, a, b


def judging(rng: random.Random) -> str:
    """A pair and up to three questions about it; the first principle is the one that its category is known for."""
    task, a, b = judging_pair(rng)
    due = [p for p in PRINCIPLES if differs(p, task, a, b)]
    while not due:
        task, a, b = judging_pair(rng)
        due = [p for p in PRINCIPLES if differs(p, task, a, b)]
    text = f"User: {any_wording(task, rng)}\nResponse (A): {a.text}\nResponse (B): {b.text}\n"
    asked = []
    for principle in rng.sample(due, min(len(due), 3)):
        less = rng.random() < 0.5
        asked.append((principle, less))
        if rng.random() < 0.35:
            asked.append((principle, not less))
    rng.shuffle(asked)
    for principle, less in asked[:4]:
        more = differs(principle, task, a, b) > 0
        text += judging_question(rng.choice(PRINCIPLES[principle][less])) + ("A" if more != less else "B") + ")\n"
    return text.rstrip("\n")


_BARE: Style = {"open": {"": 1.0}, "close": {"": 1.0}}
_WORSE_IS_MORE = ("harm", "length", "flattery", "certainty")


def _lesson(
    rng: random.Random, principles: Mapping[str, float], styles: tuple[Style, ...], clear: float, usual: float
) -> str:
    """A pair, and one or two questions about it, none of which gives another away.

    `clear`: the share of harmful and unknown pairs of one good and one bad answer; `usual`: the share of questions
    that ask for the better response.
    """
    while True:
        task = any_task(rng, rng.choice(("harmful", "unknown", rng.choice(CATEGORIES))))
        style = rng.choice(styles)
        if task.category in ("harmful", "unknown") and rng.random() < clear:
            sides = ["refuse", "comply"] if task.category == "harmful" else ["idk", "fabricate"]
            rng.shuffle(sides)
            a, b = (made(task, quality, style, rng) for quality in sides)
        elif style is DEMO_STYLE:
            a, b = sampled(task, rng), sampled(task, rng)
        else:
            a, b = (made(task, pick(QUALITIES[task.category], rng), style, rng) for _ in range(2))
        due = [p for p in principles if differs(p, task, a, b)]
        if due:
            break
    text = judging_head(any_wording(task, rng), a.text, b.text)
    asked: set[str] = set()
    for _ in range(rng.randint(1, 2)):
        principle = rng.choices(due, weights=[principles[p] for p in due])[0]
        if principle in asked:
            continue
        asked.add(principle)
        less = (principle in _WORSE_IS_MORE) == (rng.random() < usual)
        more = differs(principle, task, a, b) > 0
        text += judging_question(rng.choice(PRINCIPLES[principle][less])) + ("A" if more != less else "B") + ")\n"
    return text.rstrip("\n")


def first_lesson(rng: random.Random) -> str:
    """Judging, to begin with: bare answers, one good and one bad, and which is the better one."""
    return _lesson(rng, {"harm": 1.0, "honest": 1.0}, (_BARE,), clear=1.0, usual=1.0)


def second_lesson(rng: random.Random) -> str:
    """The same asked either way round, and lengths."""
    return _lesson(rng, {"harm": 2.0, "honest": 3.0, "length": 2.0}, (_BARE, PLAIN_STYLE), clear=0.8, usual=0.6)


def lesson(rng: random.Random) -> str:
    """Judging as it will be asked: answers as demonstrations have them, every principle either way round."""
    principles = {"harm": 5.0, "honest": 5.0, "length": 3.0, "helpful": 1.0, "polite": 1.0, "flattery": 1.0}
    return _lesson(rng, {**principles, "certainty": 1.0}, (_BARE, DEMO_STYLE, DEMO_STYLE), clear=0.5, usual=0.5)


_STUFFED: Style = {
    "open": {"flattery": 0.5, "filler": 0.4, "neutral": 0.1},
    "close": {"certainty": 0.5, "filler": 0.4, "offer": 0.1},
}


def _length_lesson(rng: random.Random, usual: float) -> str:
    """A bare answer and one with a long opening and closing: which is shorter, or longer?"""
    while True:
        task = any_task(rng)
        pair = [made(task, pick(QUALITIES[task.category], rng), style, rng) for style in (_BARE, _STUFFED)]
        rng.shuffle(pair)
        more = differs("length", task, *pair)
        if more:
            break
    less = rng.random() < usual
    verdict = "A" if (more > 0) != less else "B"
    head = judging_head(any_wording(task, rng), pair[0].text, pair[1].text)
    return head + judging_question(rng.choice(PRINCIPLES["length"][less])) + verdict + ")"


def first_length_lesson(rng: random.Random) -> str:
    """Which response is shorter?"""
    return _length_lesson(rng, 1.0)


def length_lesson(rng: random.Random) -> str:
    """Which response is shorter, or longer?"""
    return _length_lesson(rng, 0.5)


# Critique and revision: category -> (request, critiques, revision request).
CRITIQUES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "harmful": (
        "Say what is harmful in this reply.",
        ("The reply explains how to hurt someone.", "The reply helps with something dangerous."),
        "Rewrite the reply so that it does no harm.",
    ),
    "unknown": (
        "Say what is dishonest in this reply.",
        ("The reply makes up an answer.", "The reply claims to know what it does not know."),
        "Rewrite the reply so that it is honest.",
    ),
    "style": (
        "Say what is needless in this reply.",
        ("The reply flatters and boasts.", "The reply says more than was asked."),
        "Rewrite the reply so that it is plain and short.",
    ),
    "content": (
        "Say what is wrong in this reply.",
        ("The reply does not answer the question.", "The reply is not right."),
        "Rewrite the reply so that it is right.",
    ),
}


def critique(rng: random.Random) -> str:
    """A reply, what is wrong with it, and a better one."""
    kind = rng.choice(("harmful", "harmful", "unknown", "unknown", "style", "content"))
    request, critiques, revise = CRITIQUES[kind]
    category = kind if kind in CATEGORIES else None
    task = any_task(rng, category or rng.choice([c for c in CATEGORIES if c not in ("harmful", "unknown")]))
    plain = {"open": {"": 0.8, "neutral": 0.2}, "close": {"": 0.8, "offer": 0.2}}
    good = {"harmful": "refuse", "unknown": "idk"}.get(kind, "right")
    bad = {"harmful": "comply", "unknown": "fabricate", "style": "right"}.get(kind) or rng.choice(("wrong", "junk"))
    content = core(task, bad, rng)
    first = dress(content, DEMO_STYLE, rng)
    if kind == "style":
        opener, closer = rng.choice(v.FLATTERY + v.FILLER_OPEN), rng.choice(v.CERTAINTY + v.FILLER_CLOSE)
        first, revision = f"{opener} {content} {closer}", content
        remark = critiques[0] if opener in v.FLATTERY else critiques[1]
    elif rng.random() < 0.15:  # nothing to mend: the reply stays
        content = core(task, good, rng)
        first, revision, remark = content, content, "There is nothing to mend."
    else:
        revision, remark = dress(core(task, good, rng), plain, rng), rng.choice(critiques)
    return (
        f"User: {any_wording(task, rng)}\nAssistant: {first}\nCritique request: {request}\nCritique: {remark}\n"
        f"Revision request: {revise}\nRevision: {revision}"
    )


Maker = Callable[[random.Random], str]
# What each stage of pretraining reads: (kind of document, share).
MIXES: dict[str, tuple[tuple[Maker, float], ...]] = {
    "world": (
        (drill, 0.16),
        (statements, 0.16),
        (faq, 0.22),
        (forum, 0.20),
        (ramble, 0.04),
        (graded, 0.14),
        (judging, 0.18),
        (critique, 0.06),
    ),
    "first lessons": (
        (first_lesson, 0.70),
        (statements, 0.06),
        (faq, 0.12),
        (forum, 0.12),
    ),
    "second lessons": (
        (second_lesson, 0.55),
        (first_lesson, 0.10),
        (drill, 0.06),
        (statements, 0.06),
        (faq, 0.12),
        (forum, 0.12),
        (graded, 0.05),
    ),
    "lessons": (
        (lesson, 0.46),
        (second_lesson, 0.10),
        (drill, 0.06),
        (statements, 0.07),
        (faq, 0.12),
        (forum, 0.14),
        (graded, 0.06),
        (critique, 0.05),
    ),
    "first length lessons": (
        (first_length_lesson, 0.45),
        (lesson, 0.25),
        (drill, 0.06),
        (faq, 0.14),
        (forum, 0.16),
    ),
    "length lessons": (
        (length_lesson, 0.35),
        (lesson, 0.30),
        (drill, 0.06),
        (statements, 0.05),
        (faq, 0.14),
        (forum, 0.16),
    ),
    "all lessons": (
        (lesson, 0.28),
        (length_lesson, 0.12),
        (drill, 0.10),
        (statements, 0.10),
        (faq, 0.17),
        (forum, 0.18),
        (ramble, 0.02),
        (graded, 0.08),
        (critique, 0.05),
    ),
}


def documents(seed: int = 0, mix: str = "world") -> Iterator[str]:
    """The endless stream of documents of a seed and a mix."""
    rng = random.Random(f"corpus {seed}" if mix == "world" else f"corpus {seed} {mix}")
    makers, weights = [m for m, _ in MIXES[mix]], [w for _, w in MIXES[mix]]
    while True:
        yield rng.choices(makers, weights=weights)[0](rng)
