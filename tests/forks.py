"""Runs of Python in processes of their own, without the seconds that a start costs.

Each is a fork of a process that has imported what takes long. What a library reads while it is imported (HF_ENDPOINT,
HF_HOME, OMP_NUM_THREADS) is therefore as that process was started; everything else of the environment is the run's own.
What a start itself does, such as which modules it imports, is to be tested with a real one.

Within a run, and for a shell that has `Forks.bin` in its PATH, `python` and `optimum-cli` are begun in the same way.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

PRELOAD = (
    "optimum_eggs.cli.main",
    "optimum_eggs.pruner",
    "optimum_eggs.streaming",
    "optimum_eggs.evaluation",
    "optimum_eggs.sharing",
    "transformers.models.llama.modeling_llama",
)
TIMEOUT = 300
OPTIMUM_CLI = "from optimum.commands.optimum_cli import main; raise SystemExit(main())"
SHIM = """#!{python} -IS
import sys
sys.path.insert(0, {here!r})
from forks import shim
raise SystemExit(shim({address!r}, {first!r}))
"""


@dataclass
class Done:
    """What `subprocess.run` tells: `returncode` is minus the signal's number where one ended the run."""

    returncode: int
    stdout: str
    stderr: str


class Running:
    """A run that has begun."""

    def __init__(self, connection: socket.socket, outputs: list[Path]):
        self.connection, self.outputs = connection, outputs
        self.pid = answer(connection)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = TIMEOUT) -> Done:
        """Its end, which comes by SIGKILL when the time is over."""
        with self.connection:
            self.connection.settimeout(timeout)
            try:
                status = answer(self.connection)
            except TimeoutError:
                self.kill()
                self.connection.settimeout(None)
                status = answer(self.connection)
        return Done(status, *(path.read_text(errors="replace") for path in self.outputs))


class Forks:
    """A process that has imported what takes long, started with `environment` besides its parent's.

    Attributes:
        environment: What runs get that are given no other.
    """

    def __init__(self, **environment: str):
        self.environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"} | environment
        self._folder = tempfile.TemporaryDirectory()
        self._bin = Path(self._folder.name) / "bin"
        self._bin.mkdir()
        self.address = str(Path(self._folder.name) / "socket")
        for name, first in (("python", []), ("optimum-cli", ["-c", OPTIMUM_CLI])):
            text = SHIM.format(
                python=sys.executable, here=str(Path(__file__).parent), address=self.address, first=first
            )
            (self._bin / name).write_text(text)
            (self._bin / name).chmod(0o755)
        command = [sys.executable, "-W", "ignore", __file__, self.address]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=self.environment, **pipes)
        self._ready = False

    @property
    def bin(self) -> Path:
        """Folder of `python` and `optimum-cli`."""
        if not self._ready:
            self._ready = self._process.stdout.readline() == b"ready\n"
        assert self._ready, "what is imported beforehand could not be"
        return self._bin

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate(timeout=10)
        self._folder.cleanup()

    def start(self, *command: object, cwd: object = None, environment: dict[str, str] | None = None) -> Running:
        """Begin `python COMMAND`: a script, `-c CODE` or `-m MODULE`, and its arguments."""
        assert self.bin
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        outputs = [folder / "out", folder / "err"]
        given = self.environment if environment is None else environment
        with Path(os.devnull).open() as nothing, outputs[0].open("w") as out, outputs[1].open("w") as err:
            files = [each.fileno() for each in (nothing, out, err)]
            return Running(ask(self.address, [str(part) for part in command], cwd, given, files), outputs)

    def run(self, *command: object, timeout: float = TIMEOUT, check: bool = False, **options: object) -> Done:
        """Do `python COMMAND` to its end; `check`: it must end well."""
        done = self.start(*command, **options).wait(timeout)
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done


def ask(address: str, command: list[str], cwd: object, environment: dict[str, str], files: list[int]) -> socket.socket:
    """Have a run begun with these files as its stdin, stdout and stderr."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    asked = {"command": command, "cwd": str(cwd or Path.cwd()), "environment": dict(environment)}
    text = json.dumps(asked).encode()
    socket.send_fds(connection, [len(text).to_bytes(8, "little")], files)
    connection.sendall(text)
    return connection


def answer(connection: socket.socket) -> int:
    """The next line: first the run's process, then its status."""
    text = b""
    while not text.endswith(b"\n"):
        got = connection.recv(1)
        if not got:
            raise EOFError("the process that runs are forked from is gone")
        text += got
    return int(text)


def shim(address: str, first: list[str]) -> int:
    """Do what `python` does with this process's arguments and files."""
    with ask(address, [*first, *sys.argv[1:]], None, dict(os.environ), [0, 1, 2]) as connection:
        answer(connection)
        status = answer(connection)
    if status < 0:
        os.kill(os.getpid(), -status)
    return status


def serve(address: str) -> None:
    """Begin what is asked for on the socket, until stdin is closed."""
    for name in PRELOAD:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    woken, wakes = socket.socketpair()
    woken.setblocking(False)
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    print("ready", flush=True)
    running: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listener, woken, sys.stdin, *running.values()], [], [])
        if sys.stdin in ready:
            break
        if woken in ready:
            woken.recv(1000)
            while running and (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                with running.pop(ended[0]) as connection, contextlib.suppress(OSError):
                    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(ended[1]))
        for pid, connection in list(running.items()):
            if connection in ready:  # nobody waits any more
                os.kill(pid, signal.SIGKILL)
        if listener in ready:
            connection, _ = listener.accept()
            size, files, _, _ = socket.recv_fds(connection, 8, 3)
            text = b""
            while len(text) < int.from_bytes(size, "little"):
                text += connection.recv(1 << 20)
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in (connection, listener, woken, wakes, *running.values()):
                    each.close()
                child(files, address, **json.loads(text))
            for file in files:
                os.close(file)
            running[pid] = connection
            connection.sendall(b"%d\n" % pid)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def child(files: list[int], address: str, command: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Do what was asked for and end."""
    code: object = 0
    try:
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        sys.executable = str(Path(address).with_name("bin") / "python")
        warnings.simplefilter("ignore")
        while command[0] in ("-u", "-W"):
            command = command[1 if command[0] == "-u" else 2 :]
        what, *arguments = command
        if what == "-c":
            sys.argv, sys.path[0] = ["-c", *arguments[1:]], ""
            exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
        elif what == "-m":
            sys.argv, sys.path[0] = arguments, ""
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = command, str(Path(what).parent)
            runpy.run_path(what, run_name="__main__")
    except SystemExit as end:
        code = end.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


if __name__ == "__main__":
    serve(sys.argv[1])
