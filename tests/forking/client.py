"""Stands for a command that `server.py` runs: `python -I -S client.py SOCKET INTERPRETER PROGRAM ARGUMENTS`.

INTERPRETER: the one that seems to run it, of a virtual environment; "" is the server's own. PROGRAM: "hyperion", or
"python", of which ARGUMENTS are `-c CODE …` or `FILE …`.
"""

import json
import os
import signal
import socket
import struct
import sys
from types import FrameType


def main(arguments: list[str]) -> int:
    address, interpreter, program, *given = arguments
    asked = {"interpreter": interpreter, "program": program, "arguments": given}
    content = json.dumps({**asked, "folder": os.getcwd(), "environ": dict(os.environ)}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)

        def hand_on(number: int, frame: "FrameType | None") -> None:
            connection.sendall(bytes([number]))

        socket.send_fds(connection, [struct.pack("!Q", len(content))], [0, 1, 2])
        connection.sendall(content)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, hand_on)
        (status,) = struct.unpack("!i", connection.recv(4, socket.MSG_WAITALL))
    if status < 0:  # it was killed: so is this
        if status != -signal.SIGKILL:  # which cannot be handled
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
