"""The one exception for mistakes that the user can mend."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

LISTED = 60
"""Names that a message holds."""


class UserError(Exception):
    """Bad input, told in one line: which file or field, what is wrong, what to do.

    Anything else that escapes is a defect of ours and keeps its traceback.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint for a wrong name: the nearest known one, or all of them if they are few."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not known:
        return "there is none"
    return f"did you mean {near[0]!r}?" if near else f"there is: {listed(known, LISTED)}"


def listed(names: Sequence[str], at_most: int, between: str = ", ") -> str:
    """Names in one line; of many the first ones, and how many more there are."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return between.join(names[:at_most]) + more


def stage_item(known: Iterable[str]) -> str:
    """What a stage is asked to work on: its one argument.

    Args:
        known: what it can be.

    Raises:
        UserError: it is missing, or something else.
    """
    names, given, stage = sorted(known), sys.argv[1:], Path(sys.argv[0]).stem
    if len(given) == 1 and given[0] in names:
        return given[0]
    raise UserError(
        f"stage {stage}: `uv run dvc repro {stage}` runs all of it; by itself it takes one of: "
        f"{', '.join(names) or 'nothing in this study'}"
    )


def run_main(main: Callable[[], None]) -> None:
    """Run a program's ``main``; a :class:`UserError` becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        sys.exit(_fail(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(_fail("stopped", 130))


def _fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status
