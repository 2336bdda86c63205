"""`keepstep` without its imports: commands are forked by a process that has made them.

    python -m tests.helpers.warm SOCKET        the process; it ends with its stdin
    python tests/helpers/warm.py SOCKET ARG…   one command: its output, its exit status

The command is the real one, in a process, a folder and an environment of its own; `check` alone
takes ten seconds to import torch and TRL.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path


class Warm:
    """The process, and a folder with a `keepstep` that asks it."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        place, script = folder / "socket", self.bin / "keepstep"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "{place}" "$@"\n')
        script.chmod(0o755)
        command = [sys.executable, "-m", "tests.helpers.warm", str(place)]
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        said = iter(self._process.stdout.readline, b"")  # libraries say something, too
        assert b"listening\n" in said, f"exit status {self._process.wait(300)}"

    def path(self) -> str:
        """PATH with that `keepstep` first."""
        return f"{self.bin}{os.pathsep}{os.environ['PATH']}"

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(300)


def ask(place: str, argv: list[str]) -> int:
    """Run one command there, on this process's streams."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(place)
        request = {"argv": argv, "folder": os.getcwd(), "environment": dict(os.environ)}
        socket.send_fds(connection, [b"!"], [0, 1, 2])
        connection.sendall(json.dumps(request).encode())
        connection.shutdown(socket.SHUT_WR)
        return int(connection.makefile().read())


def serve(place: str) -> None:
    gc.disable()
    import keepstep.recipe.parse  # what `check` imports when it is called
    import keepstep.trainer.publish_callback  # noqa: F401
    from keepstep.cli.main import main

    gc.freeze()
    gc.enable()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen()
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    print("listening", flush=True)
    while True:
        connection, _ = listener.accept()
        _, streams, *_ = socket.recv_fds(connection, 1, 3)
        request = json.loads(connection.makefile().read())
        pid = os.fork()
        if pid == 0:
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            sys.stdin, sys.stdout, sys.stderr = map(os.fdopen, range(3), "rww", (-1, -1, 1))
            os.environ.clear()
            os.environ.update(request["environment"])
            os.chdir(request["folder"])
            sys.argv = ["keepstep", *request["argv"]]
            code = 0
            try:
                main()
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                code = 1
            sys.stdout.flush()
            os._exit(code)
        for stream in streams:
            os.close(stream)
        _, status = os.waitpid(pid, 0)
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        connection.close()


if __name__ == "__main__":
    if __package__:
        serve(sys.argv[1])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
