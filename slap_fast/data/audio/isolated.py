"""Decoding in a process of its own: a file that crashes or hangs the decoder costs only itself.

The process does not import torch, starts in a fraction of a second and is restarted when it dies.
It may use 1 GiB of address space, write no file, and spend on one item 5 s of processor time and
1 s more per 4 MiB of it; beyond that the kernel ends it (POSIX), or the parent on the wall clock.

Requests and replies are frames on its standard input and output: two lengths, a JSON header, bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from slap_fast.data.audio.decode import Audio, Inspection, decode, inspect, probe
from slap_fast.data.audio.track import AudioError, AudioInfo, Source

MEMORY_BYTES = 1 << 30
CPU_SECONDS = 5.0
BYTES_PER_SECOND = 4 << 20
"""Processor time grows by one second for this many bytes of the file."""
WALL_FACTOR = 12.0
"""The parent waits this many times the processor seconds: on a busy machine they last longer."""
COMMAND = ("-m", "slap_fast.data.audio.isolated")
LENGTHS = struct.Struct("<II")
FUNCTIONS = {"decode": decode, "probe": probe, "inspect": inspect}


class IsolatedDecoder:
    """A :class:`slap_fast.data.audio.decode.Decoder` whose process starts with the first item.

    Raises AudioError as the functions do, and E_CRASH for an item that ended the process; one that
    did so twice is not tried again. Threads take turns; a forked or unpickled decoder starts a
    process of its own.
    """

    def __init__(self, cpu_seconds: float = CPU_SECONDS) -> None:
        self.cpu_seconds = cpu_seconds
        self._process: subprocess.Popen | None = None
        self._owner = 0
        self._lock = threading.Lock()
        self._crashes: Counter[str] = Counter()

    def __reduce__(self) -> tuple[Any, ...]:
        return IsolatedDecoder, (self.cpu_seconds,)

    def decode(self, source: Source, **options: float | None) -> Audio:
        """As :func:`slap_fast.data.audio.decode.decode`, of a path or bytes."""
        fields, waveform = self._request("decode", source, options)
        return Audio(np.frombuffer(waveform, np.float32), **_tuples(fields))

    def probe(self, source: Source) -> AudioInfo:
        """As :func:`slap_fast.data.audio.decode.probe`."""
        return AudioInfo(**self._request("probe", source, {})[0])

    def inspect(self, source: Source, **options: float | None) -> Inspection:
        """As :func:`slap_fast.data.audio.decode.inspect`."""
        return Inspection(**_tuples(self._request("inspect", source, options)[0]))

    def close(self) -> None:
        """Ends the process; the next item starts another."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _request(self, function: str, source: Source, options: dict) -> tuple[dict, bytearray]:
        path = None if isinstance(source, bytes) else os.fspath(source)
        name = path or "<bytes>"
        if self._crashes and self._crashes[_key(source)] > 1:
            raise AudioError("E_CRASH", name, "a file that crashed twice", "one that decodes")
        seconds = self.cpu_seconds + _size(source) / BYTES_PER_SECOND
        request = {"function": function, "path": path, "options": options, "cpu_seconds": seconds}
        with self._lock:
            process = self._running()
            try:
                write_frame(process.stdin, request, source if path is None else b"")
                _wait(process, WALL_FACTOR * seconds)
                reply, body = read_frame(process.stdout)
            except (EOFError, OSError):
                process.wait()
                self._crashes[_key(source)] += 1
                found = f"a decoder that {_how_it_ended(process.returncode)}"
                raise AudioError("E_CRASH", name, found, "a file that decodes") from None
        if "error" in reply:
            raise AudioError(*reply["error"])
        return reply["fields"], body

    def _running(self) -> subprocess.Popen:
        if self._process is not None and self._owner == os.getpid():
            if self._process.poll() is None:
                return self._process
            self._process.communicate()  # closes the pipes
        package = str(Path(__file__).parents[3])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, *COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pipesize=1 << 20,
            start_new_session=True,  # Ctrl-C is the parent's to handle
            # Idle threads would take up the address space.
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "OPENBLAS_NUM_THREADS": "1",
                "OMP_NUM_THREADS": "1",
            },
        )
        self._owner = os.getpid()
        try:
            read_frame(self._process.stdout)
        except EOFError:
            raise RuntimeError("the decoder process does not start; see above") from None
        return self._process


def _wait(process: subprocess.Popen, seconds: float) -> None:
    """Waits for a reply; kills the process when its time is over."""
    if os.name == "posix" and not select.select([process.stdout], [], [], seconds)[0]:
        process.kill()


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def _key(source: Source) -> str:
    return hashlib.sha1(source).hexdigest() if isinstance(source, bytes) else os.fspath(source)


def _size(source: Source) -> int:
    if isinstance(source, bytes):
        return len(source)
    try:
        return os.stat(source).st_size
    except OSError:
        return 0


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


def write_frame(file: BinaryIO, header: dict[str, Any], body: bytes | memoryview = b"") -> None:
    """Sends a header and bytes."""
    head = json.dumps(header).encode()
    file.write(LENGTHS.pack(len(head), len(body)) + head)
    file.write(body)
    file.flush()


def read_frame(file: BinaryIO) -> tuple[dict[str, Any], bytearray]:
    """Receives what :func:`write_frame` sent. Raises EOFError where it ends early."""
    head, body = LENGTHS.unpack(_read(file, LENGTHS.size))
    return json.loads(_read(file, head)), _read(file, body)


def _read(file: BinaryIO, size: int) -> bytearray:
    data = bytearray(size)
    if file.readinto(data) < size:
        raise EOFError
    return data


def serve() -> None:
    """Answers requests on standard input until it ends: the process's side."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM sends it to every process of a job
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    write_frame(replies, {})
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # decoders print warnings about files
    os.dup2(silence, 2)
    _limit_memory()
    while True:
        try:
            request, data = read_frame(requests)
        except EOFError:
            return
        _limit_time(request["cpu_seconds"])
        source = bytes(data) if request["path"] is None else request["path"]
        try:
            result = FUNCTIONS[request["function"]](source, **request["options"])
        except AudioError as error:
            write_frame(replies, {"error": error.args})
            continue
        fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
        waveform = fields.pop("waveform", np.zeros(0, np.float32))
        write_frame(replies, {"fields": fields}, waveform.data.cast("B"))


def _limit_memory() -> None:
    with contextlib.suppress(ImportError):  # no such module on Windows
        import resource

        for limit, value in (
            (resource.RLIMIT_AS, MEMORY_BYTES),
            (resource.RLIMIT_FSIZE, 0),
            (resource.RLIMIT_CORE, 0),
        ):
            with contextlib.suppress(ValueError, OSError):  # macOS does not limit addresses
                resource.setrlimit(limit, (value, value))


def _limit_time(seconds: float) -> None:
    with contextlib.suppress(ImportError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds), hard))


if __name__ == "__main__":
    serve()
