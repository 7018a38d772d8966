"""Python that starts at once: a server that has imported the large libraries forks for each command.

A command runs in a process of its own, in the folder, environment and files of whoever calls it; only the time of imports is
saved. It is a script with its arguments, or the words of ``palate``, with or without ``-m palate`` before them. The program
that the shell starts hands its files to the server and waits; a signal that ends it ends the command.
"""

from __future__ import annotations

import array
import json
import os
import runpy
import signal
import socket
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]
CLIENT = """\
#!{python} -SE
import array, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
told = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
server.sendmsg([len(told).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
server.sendall(told)
pid = int.from_bytes(server.recv(4), "big")
for one in (signal.SIGTERM, signal.SIGINT):
    signal.signal(one, lambda number, _: os.kill(pid, number))
sys.exit((server.recv(1) or b"\\1")[0])
"""


def write_client(path: Path, address: str) -> None:
    """The program that asks the server at ``address``."""
    path.write_text(CLIENT.format(python=sys.executable, address=address))
    path.chmod(0o755)


def serve(address: str) -> None:
    """For ever. Nothing may be computed here: a fork has one thread, whatever its parent had."""
    import torch
    import transformers
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPModel, CLIPTextModel  # noqa: F401

    import palate.runs.train  # noqa: F401

    assert torch.get_num_threads() == 1, transformers.__version__
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _answer(client)
        client.close()


def _answer(client: socket.socket) -> None:
    """In a fork: the command in a fork of its own, whose end is told."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    files = array.array("i")
    length, told, _, _ = client.recvmsg(4, socket.CMSG_SPACE(3 * files.itemsize))
    files.frombytes(told[0][2])
    data = b""
    while len(data) < int.from_bytes(length, "big"):
        data += client.recv(65536)
    words, folder, environment = json.loads(data)
    if pid := os.fork():
        for file in files:
            os.close(file)
        client.sendall(pid.to_bytes(4, "big"))
        ended = threading.Event()
        threading.Thread(target=_end_with, args=(client, pid, ended), daemon=True).start()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        ended.set()
        client.sendall(bytes([code & 255]))
        os._exit(0)
    client.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # As a fresh Python would find what lies in the folder, and the modules that the environment names.
    sys.path[:0] = [folder, *environment.get("PYTHONPATH", "").split(os.pathsep)]
    code = 1
    try:
        code = _run(words)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_with(client: socket.socket, pid: int, ended: threading.Event) -> None:
    """The command ends with the program that asked for it, of which nothing more comes than its end."""
    client.recv(1)
    if not ended.is_set():
        os.kill(pid, signal.SIGKILL)


def _run(words: list[str]) -> int:
    if words[0].endswith(".py"):
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
        return 0
    from palate.cli import main

    return main(words[words.index("palate") + 1 :] if "-m" in words else words)


if __name__ == "__main__":
    serve(sys.argv[1])
