"""Would the tests of `trueup.math` notice? Break the code in every small way, and see that one of them fails.

In order: read each module's syntax tree, make a mutant for each change of `changes`, and run tests/math against it in
a fork of a process that has everything loaded and the tests collected: the module's own tests first, the quick before
the slow, and of other modules' tests the quick ones alone. A mutant that passes all these survives.
Prints a table, and exits with 1 when one survives that is not in EQUIVALENT.

    python scripts/mutate.py [--only TEXT ...] [--jobs N] [--list]

Not in it: other rooms, two changes at once, constants in capitals, decorators, and what is text (docstrings,
annotations, the words of an error).
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import unwrap
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

# Before torch: one thread each, since a fork of a process with threads may hang.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis.strategies import booleans

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "trueup" / "math"
TESTS = ROOT / "tests" / "math"
SLOW = 0.5  # seconds; a test that takes longer is for mutants of its own module alone, and comes last
HANGS = 10  # times as long as without a mutant, and seconds more: so long a test hangs, which one would notice too

# Mutants that compute the very same, by their label, each with the reason. Few, or the tests are at fault.
EQUIVALENT: dict[str, str] = {
    "kl.py: return (p * torch.where(p > 0, logp - logq, 0.0)).sum(-1)"
    "  ->  return (p * torch.where(p > 0, logp - logq, 1.0)).sum(-1)": "p is 0 there, and 0 x 1 = 0 x 0",
    "powered.py: together = torch.cov(torch.stack([y, f]))[0, 1]"
    "  ->  together = torch.cov(torch.stack([y, f]))[1, 0]": "a covariance has no order",
    "sequential.py: return fits[(costs < costs.min() + ROUNDING).int().argmax()]"
    "  ->  return fits[(costs <= costs.min() + ROUNDING).int().argmax()]": "no cost is more by just so much",
    "sequential.py: while pools and pools[-1][0] >= pool[0]:"
    "  ->  while pools and pools[-1][0] > pool[0]:": "pools alike have one mean, pooled or not",
    "statistics.py: if p.shape != outcome.shape or p.ndim != 1 or bins < 1:"
    "  ->  if p.shape != outcome.shape or outcome.ndim != 1 or bins < 1:": "p and outcome have one shape here",
    "statistics.py: error += n / len(p) * abs(confidence - observed)"
    "  ->  error += n / len(outcome) * abs(confidence - observed)": "p and outcome have one length here",
    "statistics.py: mass = (u.cos() ** (freedom - 1)).cumsum(0)"
    "  ->  mass = (u.cos() ** (freedom - 1)).cumsum(-1)": "u has one axis",
    "temperature.py: while low < (middle := ((low + high) / 2)) < high:"
    "  ->  while low <= (middle := ((low + high) / 2)) < high:": "once more, where no number lies between",
    "temperature.py: slope = (z * (torch.sigmoid(middle * z) - y)).sum()"
    "  ->  slope = (z * (torch.sigmoid(middle * z) - y)).mean()": "the sign alone is read",
}

OPERATORS: dict[type[ast.AST], list[type[Any]]] = {
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Div],
    ast.Div: [ast.Mult],
    ast.BitAnd: [ast.BitOr],
    ast.BitOr: [ast.BitAnd],
    ast.And: [ast.Or],
    ast.Or: [ast.And],
    ast.Lt: [ast.Gt, ast.LtE],
    ast.Gt: [ast.Lt, ast.GtE],
    ast.LtE: [ast.GtE, ast.Lt],
    ast.GtE: [ast.LtE, ast.Gt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
}
PAIRS = [("maximum", "minimum"), ("max", "min"), ("sum", "mean"), ("exp", "expm1"), ("rsqrt", "sqrt")]
PAIRS += [("log_softmax", "softmax"), ("new_zeros", "new_ones")]
NAMES = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}

COMMUTATIVE = {"max", "min", "maximum", "minimum"}

Change = tuple[str, Any]


def changes(node: ast.AST) -> Iterator[Change]:
    """(kind, what stands in the node's place) for every way to break this node."""
    if isinstance(node, ast.BinOp):
        for operator in OPERATORS.get(type(node.op), []):
            yield "operator", ast.BinOp(node.left, operator(), node.right)
        yield "drop factor, term or mask", node.left
        if isinstance(node.op, ast.Mult | ast.Add | ast.Sub | ast.BitAnd):
            yield "drop factor, term or mask", node.right
    elif isinstance(node, ast.UnaryOp):
        yield "sign or not", node.operand
    elif isinstance(node, ast.Compare):
        for i, old in enumerate(node.ops):
            for operator in OPERATORS[type(old)]:
                ops = [*node.ops[:i], operator(), *node.ops[i + 1 :]]
                yield "comparison", ast.Compare(node.left, ops, node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield "and, or", ast.BoolOp(OPERATORS[type(node.op)][0](), node.values)
        for i in range(len(node.values)):
            yield "and, or", ast.BoolOp(node.op, node.values[:i] + node.values[i + 1 :])
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield "True, False", ast.Constant(not node.value)
        elif isinstance(node.value, int):
            yield "index or number by one", ast.Constant(node.value + 1)
            yield "index or number by one", ast.Constant(node.value - 1)
        elif isinstance(node.value, float):
            yield "number", ast.Constant(node.value * 1.1 if node.value else 1.0)
    elif isinstance(node, ast.Call):
        yield from call_changes(node)
    elif isinstance(node, ast.FunctionDef):
        yield from other_arguments(node)
    elif isinstance(node, ast.If):
        yield "condition", ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.IfExp):
        yield "condition", node.body
        yield "condition", node.orelse
    elif isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load) and len(node.elts) == 2:
        yield "order", ast.Tuple(node.elts[::-1], ast.Load())
    elif isinstance(node, ast.Expr | ast.Raise | ast.Continue | ast.AugAssign | ast.Assign):
        yield "drop statement", ast.Pass()


def other_arguments(node: ast.FunctionDef) -> Iterator[Change]:
    """Each use of an argument, with the function's next argument in its place until the next is asked for."""
    names = [a.arg for a in [*node.args.args, *node.args.kwonlyargs] if a.arg != "self"]
    for use in ast.walk(node) if len(names) > 1 else []:
        if isinstance(use, ast.Name) and use.id in names and isinstance(use.ctx, ast.Load):
            name, use.id = use.id, names[(names.index(use.id) + 1) % len(names)]
            yield "another argument", node
            use.id = name


def call_changes(node: ast.Call) -> Iterator[Change]:
    """Another function, a lost argument, or the call's input in its place: a mask, a clamp, a flip is dropped."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if other := NAMES.get(name):
        function = ast.Attribute(node.func.value, other) if isinstance(node.func, ast.Attribute) else ast.Name(other)
        yield "function", ast.Call(function, node.args, node.keywords)
    if name == "where":
        condition, first, second = node.args
        yield "drop factor, term or mask", first
        yield "drop factor, term or mask", second
        yield "order", ast.Call(node.func, [condition, second, first], [])
    elif isinstance(node.func, ast.Attribute) and not is_torch(node.func.value):
        yield "drop call", node.func.value
    elif node.args:
        yield "drop call", node.args[0]
    for i in range(len(node.keywords)):
        yield "drop argument", ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :])
    if len(node.args) == 2 and name not in COMMUTATIVE:
        yield "order", ast.Call(node.func, node.args[::-1], node.keywords)


def is_torch(node: ast.AST) -> bool:
    return ast.unparse(node).split(".")[0] == "torch"


def sites(holder: Any, key: Any) -> Iterator[tuple[Any, Any]]:
    """The places holder[key] of the nodes that compute: no docstrings, imports, annotations, caches, errors' words."""
    node = holder[key]
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    if not isinstance(node, ast.AST) or docstring or is_alias(node):
        return
    yield holder, key
    if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom):
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in range(len(value)) if isinstance(value, list) else [field]:
            yield from sites(value if isinstance(value, list) else vars(node), child)


def is_alias(node: ast.AST) -> bool:
    """A type or a constant at a module's top, such as `Numbers = Tensor | Sequence[float]` or `STAKES = 50`."""
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0])[0].isupper()


@dataclass(frozen=True)
class Mutant:
    """One change to one module; `source` is the module's whole text after it."""

    module: str
    line: int
    kind: str
    before: str
    after: str
    source: str

    @property
    def label(self) -> str:
        return f"{self.module}: {self.before}  ->  {self.after}"


def mutants(path: Path) -> Iterator[Mutant]:
    """Each change is made in the tree, written out, and undone."""
    body = ast.parse(path.read_text()).body
    texts = [ast.unparse(statement) for statement in body]
    for i, original in enumerate(texts):
        seen = {original}
        for holder, key in sites(body, i):
            node = holder[key]
            for kind, new in changes(node):
                holder[key] = new
                text = ast.unparse(body[i])
                holder[key] = node
                if text not in seen:
                    seen.add(text)
                    before, after = difference(original, text)
                    source = "\n".join([*texts[:i], text, *texts[i + 1 :]])
                    yield Mutant(path.name, getattr(node, "lineno", 0), kind, before, after, source)


def difference(before: str, after: str) -> tuple[str, str]:
    """The lines that differ, on one line each."""
    a, b = before.splitlines(), after.splitlines()
    while a and b and a[0] == b[0]:
        a, b = a[1:], b[1:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return " ".join(line.strip() for line in a), " ".join(line.strip() for line in b)


def install(mutant: Mutant) -> None:
    """Puts the mutant's code into the functions that are loaded, wherever else they are held by name."""
    module = sys.modules[f"trueup.math.{Path(mutant.module).stem}"]
    fresh: dict[str, Any] = {"__name__": module.__name__}
    exec(compile(mutant.source, mutant.module, "exec"), fresh)
    for name, new in fresh.items():
        old = getattr(module, name, None)
        if getattr(new, "__module__", None) != module.__name__:
            continue
        if isinstance(unwrap(new), FunctionType):
            take_code(unwrap(old), unwrap(new))
        elif isinstance(new, type):
            for key, method in vars(new).items():
                if isinstance(method, FunctionType):
                    take_code(vars(old)[key], method)


def take_code(old: Any, new: FunctionType) -> None:
    old.__code__, old.__defaults__, old.__kwdefaults__ = new.__code__, new.__defaults__, new.__kwdefaults__


class Forks:
    """A pytest plugin: collects the tests once, then runs them in a fork for each mutant, up to its first failure."""

    def __init__(self, todo: list[Mutant], jobs: int, report: Callable[[Mutant, str], None]) -> None:
        self.todo, self.jobs, self.report = todo, jobs, report
        self.running: dict[int, tuple[Mutant | None, int]] = {}
        self.failed = ""
        self.seconds: dict[pytest.Item, float] = {}  # of each test, without a mutant

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> pytest.TestReport:
        """Without the traceback, which would take longer than most tests."""
        if call.excinfo and not self.failed:
            self.failed = item.name
        outcome: Literal["passed", "failed"] = "failed" if call.excinfo else "passed"
        when: Any = call.when
        return pytest.TestReport(item.nodeid, item.location, {}, outcome, None, when)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed or not session.items:
            raise pytest.UsageError("the tests cannot be collected")
        self.start(session, None)
        _, answer = self.wait()
        if not answer.startswith("["):
            raise pytest.UsageError(f"a test fails without any mutant: {answer}")
        self.seconds = dict(zip(session.items, json.loads(answer), strict=True))
        print(f"{len(self.todo)} mutants against {len(session.items)} tests", flush=True)
        queue = iter(self.todo)
        for done in range(len(self.todo)):
            while len(self.running) < self.jobs and (mutant := next(queue, None)):
                self.start(session, mutant)
            mutant, failed = self.wait()
            assert mutant is not None
            self.report(mutant, failed)
            if sys.stdout.isatty():
                print(f"{done + 1}/{len(self.todo)}", end="\r", flush=True)
        return True

    def start(self, session: pytest.Session, mutant: Mutant | None) -> None:
        answer, write = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            os.close(write)
            self.running[pid] = (mutant, answer)
            return
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            os.write(write, self.answer(session.items, mutant).encode())
            code = 0
        finally:
            os._exit(code)

    def answer(self, items: list[pytest.Item], mutant: Mutant | None) -> str:
        """The name of the first test that fails, empty when all pass; without a mutant a list of the tests' seconds."""
        if mutant:
            try:
                install(mutant)
            except Exception as error:
                return f"import: {error!r}"
            # The likeliest to fail and the quickest first.
            own = {item: item.path.name == f"test_math_{Path(mutant.module).stem}.py" for item in items}
            items = [item for item in items if own[item] or self.seconds[item] < SLOW]
            items.sort(key=lambda item: (self.seconds[item] >= SLOW, not own[item], self.seconds[item]))
        for item, following in zip(items, [*items[1:], None], strict=True):
            began = time.monotonic()
            signal.alarm(HANGS + int(HANGS * self.seconds.get(item, 60)))
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                return self.failed
            self.seconds[item] = time.monotonic() - began
        return "" if mutant else json.dumps(list(self.seconds.values()))

    def wait(self) -> tuple[Mutant | None, str]:
        """Waits for a fork to end: the mutant, and the test that failed."""
        pid, status = os.wait()
        mutant, answer = self.running.pop(pid)
        with os.fdopen(answer) as file:
            failed = file.read()
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGALRM:
            failed = "no end"
        elif code:
            raise pytest.UsageError(f"the run of the tests itself broke: exit {code}, {mutant and mutant.label}")
        return mutant, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default=[""], nargs="+", help="mutants whose label holds one of these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="every mutant and the test that killed it")
    args = parser.parse_args()

    began = time.monotonic()
    torch.set_num_threads(1)
    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], deadline=None, database=None)
    settings.load_profile("mutants")
    # What these import late, they import before the forks.
    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))
    given(booleans())(lambda _: None)()
    sys.path.insert(0, str(SOURCE.parents[1]))

    paths = sorted(p for p in SOURCE.glob("*.py") if p.name != "__init__.py")
    todo = [m for path in paths for m in mutants(path) if any(text in m.label for text in args.only)]
    tally: Counter[tuple[str, str]] = Counter()

    def report(mutant: Mutant, failed: str) -> None:
        verdict = "killed" if failed else "equivalent" if mutant.label in EQUIVALENT else "survived"
        tally[mutant.kind, verdict] += 1
        if args.list or verdict == "survived":
            change = f"{mutant.before}  ->  {mutant.after}"
            print(f"{verdict:10} {mutant.module}:{mutant.line}  {change}  [{failed}]", flush=True)

    options = ["--capture=no", "-p", "no:terminal", "-p", "no:cacheprovider"]
    options += ["-c", os.devnull, f"--rootdir={ROOT}", f"--confcutdir={TESTS}", str(TESTS)]
    if pytest.main(options, plugins=[Forks(todo, args.jobs, report)]) != pytest.ExitCode.OK or not todo:
        print("no verdict: the tests could not be run, or no mutant was chosen")
        return 1

    verdicts = ("killed", "survived", "equivalent")
    print("\n" + "kind".ljust(28) + "".join(verdict.rjust(12) for verdict in verdicts))
    for kind in [*sorted({mutant.kind for mutant in todo}), "all"]:
        counts = (sum(n for key, n in tally.items() if key[1] == v and kind in (key[0], "all")) for v in verdicts)
        print(kind.ljust(28) + "".join(str(n).rjust(12) for n in counts))
    print(f"{time.monotonic() - began:.0f} s")
    stale = set() if any(args.only) else EQUIVALENT.keys() - {mutant.label for mutant in todo}
    for label in stale:
        print(f"EQUIVALENT names a mutant that is none: {label}")
    return 1 if stale or any(verdict == "survived" for _, verdict in tally) else 0


if __name__ == "__main__":
    sys.exit(main())
