"""Ctrl-C and SIGTERM in the training loop: a checkpoint first, then the end; the second one ends it at once.

first signal   the optimizer step that is under way is finished, an evaluation is left (a resumed run makes it
               again), a checkpoint is written, and `Interrupted` is raised
second signal  `KeyboardInterrupt` where the program stands; the last complete checkpoint is whole
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from typing_extensions import Self

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_AT_ONCE = "a second signal ends it at once"


class Interrupted(KeyboardInterrupt):
    """A signal ended the run. `checkpoint` is where it can go on, None where there was nothing to keep."""

    def __init__(self, signum: int, checkpoint: Path | None = None) -> None:
        super().__init__(
            f"{_NAMES.get(signal.Signals(signum), signum)}: "
            + (f"the run can go on from {checkpoint}" if checkpoint else "no optimizer step was made yet")
        )
        self.signum = signum
        self.checkpoint = checkpoint


class EvaluationLeft(Interrupted):
    """An evaluation was left in the middle."""


def terminate(signum: int, frame: Any) -> NoReturn:
    """A handler for SIGTERM that cleans up as Ctrl-C does."""
    raise Interrupted(signum)


class Interruption:
    """Inside the context, the first signal is remembered, and the second one raises.

    Only handlers that are Python's own, or `terminate`, are replaced, and only in the main thread, where alone Python
    allows it: who has handlers of their own, or ignores a signal (nohup), keeps that.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._process = os.getpid()
        self._replaced: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in _NAMES:
                if signal.getsignal(signum) in (signal.default_int_handler, signal.SIG_DFL, terminate):
                    self._replaced[signum] = signal.signal(signum, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._replaced.items():
            signal.signal(signum, handler)
        self._replaced = {}

    @property
    def requested(self) -> bool:
        return self.signum is not None

    def leave_evaluation(self) -> None:
        """Raises EvaluationLeft when the end was asked for."""
        if self.signum is not None:
            raise EvaluationLeft(self.signum)

    def _remember(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a worker that was forked off: it ends as it would have
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        name = _NAMES[signal.Signals(signum)]
        text = f"\n{name}: a checkpoint is written when this optimizer step is done, then the run ends ({_AT_ONCE})\n"
        with suppress(OSError):
            os.write(2, text.encode())  # a handler may have interrupted a print: no buffer of Python's is safe here
