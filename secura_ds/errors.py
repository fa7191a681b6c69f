"""The one kind of error a user may cause, and how commands show it."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable, Sequence

from secura_ds.environment import is_main_process
from secura_ds.stopping import Interrupted, exit_status, interruptible

SILENCE = 5.0  # seconds that ranks other than the main one wait before they report an error


_CREDENTIALS = re.compile(r"(\w+:/{1,2})[^\s/\"']+@")


def redacted(text: str) -> str:
    """`text` with the name and password of every URL in it replaced: `https://***@host/path`."""
    return _CREDENTIALS.sub(r"\1***@", text)


class UserError(Exception):
    """Something the user can mend. The message says what was given, where, and what to change.

    It ends up in terminals, logs and other ranks' messages, so credentials in it are redacted.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class Diverged(UserError):
    """Training has left the finite numbers: the loss, or a trained parameter."""


class RankError(UserError):
    """Another rank of the run has failed or died; the message says which, and why."""

    def __init__(self, message: str, *, loud: bool, status: int = 2) -> None:
        """`loud` is True on the one rank that tells the user, at once: a launcher ends it soon."""
        super().__init__(message)
        self.loud, self.status = loud, status


def run_command(main: Callable[[Sequence[str] | None], int], arguments: Sequence[str] | None = None) -> int:
    """Run a command's `main`; show a `UserError` as one `error:` line instead of a traceback.

    Returns:
        The exit status: what `main` returned, 2 after a `UserError`, 130 after Ctrl-C, `REQUEUE` after a
        signal of a cluster.
    """
    try:
        with interruptible():
            return main(arguments)
    except UserError as error:
        if not (error.loud if isinstance(error, RankError) else is_main_process()):
            # Nearly always the main rank has met the same error, and the launcher ends the others with it.
            time.sleep(SILENCE)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.status if isinstance(error, RankError) else 2
    except KeyboardInterrupt as interrupt:
        number = interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT
        print(f"interrupted by {signal.Signals(number).name}", file=sys.stderr, flush=True)
        return exit_status(number)


def shown(given: object, width: int = 80) -> str:
    """What was given as one line of at most `width` characters, control characters escaped."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(given)[: width + 1])
    return text if len(text) <= width else f"{text[: width - 3]}..."


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, redacted, else the name of its kind."""
    lines = [line.strip() for line in redacted(str(error)).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
