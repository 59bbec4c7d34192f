"""What somebody else's function raised, told in one line: which function, what, and where in their own file."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trueup.records import UserError

NOT_THEIRS = tuple(
    str(Path(folder).resolve())
    for folder in (str(Path(__file__).parent), *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))
)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Around code that somebody else wrote: what it raises comes out as UserError, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise fault(what, error) from None


def fault(what: str, error: BaseException) -> UserError:
    """`what` raised `error`: the error to show instead."""
    said = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    if isinstance(error, SyntaxError) and error.filename:
        where = f" ({error.filename}, line {error.lineno})"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [f for f in frames if not f.filename.startswith(("<", *NOT_THEIRS))]
        where = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
    return UserError(f"{what} failed: {said[:300]}{where}")
