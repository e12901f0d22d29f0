"""`dar` without its imports' seconds: tasks of SLURM whose process is forked from the tests' server of killable.

What a task starts is CLIENT, a few lines of Python without imports of ours. It asks for a process that has imported
everything, in the namespaces of the task's node, with its environment, folder and output; hands on the signals that it
gets; and ends as that process does. When it dies, that process does, too.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import struct
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path

from killable import context

HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# `dar`, and the Python that is asked for `-m dar_lightning`.
CLIENT = f"""#!{sys.executable} -IS
import os, signal, socket, sys
if sys.argv[0].endswith("python") and sys.argv[1:3] != ["-m", "dar_lightning"]:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({{address!r}})
for number in {[int(number) for number in HANDED_ON]}:
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
status = int(server.recv(9))
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


class QuickDar:
    """Serves clients. `folder` is for PATH: it has `dar` and `python`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(folder / "socket"))
        self.socket.listen()
        for name in ("dar", "python"):
            (folder / name).write_text(CLIENT.format(address=str(folder / "socket")))
            (folder / name).chmod(0o755)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.socket.accept()
            except OSError:  # closed
                return
            context.Process(target=_serve, args=(client,)).start()
            client.close()

    def close(self) -> None:
        """Serve no more."""
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def _serve(client: socket.socket) -> None:
    """Stands between a client and the process that it has asked for."""
    pid, *_ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    task = Path(f"/proc/{pid}")
    spaces = [os.open(task / "ns" / name, os.O_RDONLY) for name in ("pid", "mnt")]
    libc = ctypes.CDLL(None, use_errno=True)
    words = task.joinpath("cmdline").read_bytes().decode().split("\0")[2:-1]  # without the interpreter and its option
    variables = dict(word.split("=", 1) for word in task.joinpath("environ").read_bytes().decode().split("\0")[:-1])
    output = [os.open(task / "fd" / str(number), os.O_WRONLY | os.O_APPEND) for number in (1, 2)]
    place = os.readlink(task / "cwd")
    for space in spaces:
        assert libc.setns(space, 0) == 0, os.strerror(ctypes.get_errno())
    child = os.fork()
    if child == 0:
        client.close()
        _become(words, variables, output, place)
    ended = os.pidfd_open(child)
    while True:
        ready, *_ = select.select([client, ended], [], [])
        if ended in ready:
            break
        received = client.recv(1)
        os.kill(child, received[0] if received else signal.SIGKILL)
        if not received:
            break
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(BrokenPipeError):  # it was killed
        client.send(b"%d" % status)
    os._exit(0)


def _become(words: list[str], variables: dict[str, str], output: list[int], place: str) -> None:
    for number, file in enumerate(output, start=1):
        os.dup2(file, number)
    os.chdir(place)
    os.environ.clear()
    os.environ |= variables
    program, *options = words
    sys.executable = str(Path(program).with_name("python"))
    sys.argv = [program, *(options[2:] if options[:1] == ["-m"] else options)]
    status = 1
    try:
        from dar_lightning.cli import main

        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
