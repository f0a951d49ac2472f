"""A DNS server for names under `stockrt.test`, and a mount namespace in which a process asks it.

It answers, or takes questions and says nothing, as a name server behind a broken route does. Needs root: port 53,
and the namespace in which /etc/resolv.conf is another file.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

ZONE = "stockrt.test"
PORT = 53
TTL = 0


class NoNamespace(Exception):
    """This machine does not let the tests make a mount namespace, or listen on port 53; says which."""


class NameServer:
    """Answers A with 127.0.0.1 for every name of the zone, and the SRV and TXT records given; thread-safe.

    `records`: (name, type) -> the texts of the records, such as ("_mongodb._tcp.db.stockrt.test", "SRV").
    """

    def __init__(self, records: Mapping[tuple[str, str], Sequence[str]] | None = None) -> None:
        self.records = dict(records or {})
        self.answers = True  # False: it takes questions and is silent
        self.asked: list[str] = []
        self.address = ""
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def __enter__(self) -> Self:
        self.address = self._bind()
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # it is not connected; this wakes the thread all the same
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _bind(self) -> str:
        """Take port 53 of an address of this machine that nobody else uses."""
        for _ in range(20):
            address = f"127.{random.randrange(1, 255)}.{random.randrange(256)}.{random.randrange(1, 255)}"
            try:
                self._socket.bind((address, PORT))
            except PermissionError as error:
                raise NoNamespace(f"port {PORT} is for root: {error}") from error
            except OSError:
                continue
            return address
        raise NoNamespace(f"no address of 127.0.0.0/8 has port {PORT} free")

    def wrapper(self, folder: Path) -> tuple[str, ...]:
        """The words in front of a command that make this its only name server. Raises NoNamespace."""
        if os.geteuid() != 0 or not shutil.which("unshare"):
            raise NoNamespace("a mount namespace needs root and unshare (util-linux)")
        settings = folder / "resolv.conf"
        settings.write_text(f"nameserver {self.address}\noptions timeout:1 attempts:1\n")
        switch = folder / "nsswitch.conf"
        switch.write_text("hosts: files dns\n")
        mounts = [f'mount --bind {path} "$(readlink -f /etc/{path.name})"' for path in (settings, switch)]
        wrapper = ("unshare", "--mount", "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh")
        done = subprocess.run([*wrapper, "true"], capture_output=True, text=True)
        if done.returncode:
            raise NoNamespace(f"no mount namespace can be made here: {done.stderr.strip()}")
        return wrapper

    def _serve(self) -> None:
        while True:
            try:
                data, peer = self._socket.recvfrom(4096)
            except OSError:
                return
            if data and self.answers:
                self._socket.sendto(self._answer(data), peer)

    def _answer(self, data: bytes) -> bytes:
        question = dns.message.from_wire(data)
        answer = dns.message.make_response(question, recursion_available=True)
        asked = question.question[0]
        name, kind = asked.name.to_text(omit_final_dot=True).lower(), dns.rdatatype.to_text(asked.rdtype)
        self.asked.append(f"{name} {kind}")
        texts = self.records.get((name, kind), ["127.0.0.1"] if kind == "A" and name.endswith(ZONE) else [])
        if texts:
            answer.answer.append(dns.rrset.from_text(asked.name, TTL, "IN", kind, *texts))
        elif not name.endswith(ZONE):
            answer.set_rcode(dns.rcode.NXDOMAIN)
        return answer.to_wire()
