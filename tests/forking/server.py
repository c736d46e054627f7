"""Imports what `hyperion` needs, says "ready", and forks a child for each command that a `client.py` asks for.

It ends with its standard input. A client that goes away takes its child with it.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import site
import socket
import struct
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

_IMPORTED = (
    "hyperion.cli.main",
    "hyperion.engine.fit",
    "hyperion.pipeline",
    "hyperion.exporting",
    "hyperion.quantizing",
    "peft",
    "transformers.models.llama.modeling_llama",
)


def main(address: str) -> None:
    sys.path.remove(str(Path(__file__).parent))  # a script's own folder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as `hyperion` has it
    from hyperion_core.quiet import ON_IMPORT, errors_only

    with errors_only(*ON_IMPORT):
        for name in _IMPORTED:
            importlib.import_module(name)
    gc.freeze()  # a child copies what the collector touches
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        request = _next_child(listener)
    if request:
        _run(request)


def _next_child(listener: socket.socket) -> dict[str, Any] | None:
    """Serve until standard input ends: gives None then, and in each child what it is to run."""
    woken, wakes = socket.socketpair()
    for end in (listener, woken, wakes):
        end.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, socket.socket] = {}  # by process id
    with selectors.DefaultSelector() as selector:
        for readable in (listener, woken, sys.stdin):
            selector.register(readable, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    return None
                if key.fileobj is woken:
                    with suppress(BlockingIOError):
                        woken.recv(4096)
                    _report(children, selector)
                elif key.fileobj is listener:
                    connection, _ = listener.accept()
                    connection.setblocking(True)  # where it has that from the listener
                    try:
                        request, streams = _received(connection)
                    except (OSError, ValueError, struct.error):  # a client that was ended at once
                        connection.close()
                        continue
                    if child := os.fork():
                        children[child] = connection
                        selector.register(connection, selectors.EVENT_READ, child)
                        for stream in streams:
                            os.close(stream)
                    else:
                        for end in (woken, wakes, connection, *children.values()):
                            end.close()
                        _take_over(streams)
                        return request
                elif key.data in children:
                    numbers = key.fileobj.recv(16)  # type: ignore[union-attr]
                    for number in numbers or [signal.SIGKILL]:
                        os.kill(key.data, number)
                    if not numbers:
                        selector.unregister(key.fileobj)


def _take_over(streams: list[int]) -> None:
    """In a child: the client's standard streams are its own, and signals mean what they do to any process."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    for stream, number in zip(streams, range(3), strict=True):
        os.dup2(stream, number)
        os.close(stream)


def _received(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What is asked for, and the client's standard streams."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    content = connection.recv(struct.unpack("!Q", size)[0], socket.MSG_WAITALL)
    return json.loads(content), streams


def _report(children: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    """Tell clients how their children ended."""
    for child in list(children):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            connection = children.pop(child)
            with suppress(OSError):
                connection.sendall(struct.pack("!i", os.waitstatus_to_exitcode(status)))
            with suppress(KeyError):
                selector.unregister(connection)
            connection.close()


def _run(request: dict[str, Any]) -> NoReturn:
    """Be the program that was asked for, in the client's folder and environment."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environ"])
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:0] = [request["folder"], *(entry for entry in map(os.path.abspath, given) if entry not in sys.path)]
    if request["interpreter"]:
        sys.executable = request["interpreter"]
        prefix = Path(sys.executable).parent.parent
        if (prefix / "pyvenv.cfg").is_file():
            sys.prefix = sys.exec_prefix = str(prefix)
            for folder in site.getsitepackages([sys.prefix]):
                site.addsitedir(folder)
    importlib.invalidate_caches()
    code: object = 0
    try:
        _PROGRAMS[request["program"]](request["arguments"])
    except SystemExit as stop:
        code = stop.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    # As an interpreter ends, but for taking all modules down, for which each of their pages would be copied.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _hyperion(arguments: list[str]) -> None:
    from hyperion.cli.main import run

    sys.argv = ["hyperion", *arguments]
    run()


def _python(arguments: list[str]) -> None:
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")


_PROGRAMS = {"hyperion": _hyperion, "python": _python}


if __name__ == "__main__":
    main(sys.argv[1])
