"""A `python` for shell scripts: what they start of this project is forked from the process that has the libraries.

The command is a small client: it hands its output streams and its environment to a thread of the tests, passes signals
on and ends as the forked process did. Anything else (`python -m …`, `python -c …`) is the real Python.
"""

import json
import os
import shlex
import signal
import socket
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

REPOSITORY = Path(__file__).resolve().parents[2]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class ForkedPython:
    """The command lies in `folder`, to be put first in PATH.

    Args:
        folder: an absolute path of at most 90 characters, as those of sockets must be short.
    """

    def __init__(self, folder: Path):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "socket"))
        self.listener.listen(16)
        words = [sys.executable, "-I", "-S", __file__, str(folder / "socket"), sys.executable]
        self.command = folder / "python"
        self.command.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        self.command.chmod(0o755)
        Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            client, _ = self.listener.accept()
            Thread(target=self._run, args=(client,), daemon=True).start()

    def _run(self, client: socket.socket) -> None:
        """Fork one script, and send it the client's signals: SIGKILL when the client is gone."""
        from robustness.forked import Run  # the client knows no other module

        _, streams, _, _ = socket.recv_fds(client, 1, 2)
        lines = client.makefile("r")
        request = json.loads(lines.readline())
        writers = [Connection(stream, readable=False) for stream in streams]
        run = Run(**request, streams=writers, python=str(self.command))

        def wait() -> None:
            status = run.wait()
            with suppress(OSError):
                client.sendall(f"{status}\n".encode())
                client.shutdown(socket.SHUT_RDWR)

        Thread(target=wait, daemon=True).start()
        for line in lines:
            run.send(int(line))
        run.send(signal.SIGKILL)
        client.close()


def main(path: str, python: str, *arguments: str) -> None:
    """The client."""
    script = Path(arguments[0]).resolve() if arguments else REPOSITORY
    if script.suffix != ".py" or script.parent not in (REPOSITORY, REPOSITORY / "scripts"):
        os.execv(python, [python, *arguments])
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)
    request = {"script": str(script), "arguments": arguments[1:], "folder": os.getcwd(), "environment": {**os.environ}}
    socket.send_fds(server, [b" "], [1, 2])
    server.sendall(json.dumps(request).encode() + b"\n")
    for number in SIGNALS:
        signal.signal(number, lambda received, frame: server.sendall(f"{received}\n".encode()))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    answer = server.makefile("r").readline()
    status = int(answer or 1)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
