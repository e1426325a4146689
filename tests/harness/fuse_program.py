# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program of a Fuse: a filesystem of one file, spoken to the kernel over /dev/fuse.

Its arguments are the directory to mount on, the type to show, the size of the file, which is called
`file` and all zeroes until written, what it answers to FLUSH (an errno), and the number of a socket
to the test, of whole messages.  It says there that it is mounted, and takes the orders of a Fuse:
which requests to keep without an answer, and when to answer them at last.
"""

import ctypes
import errno
import os
import select
import socket
import stat
import struct
import sys
from collections import Counter

LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, STATFS = 1, 2, 3, 4, 14, 15, 16, 17
RELEASE, FSYNC, FLUSH, INIT, INTERRUPT, BATCH_FORGET = 18, 20, 25, 26, 36, 42
_REQUESTS = "LOOKUP GETATTR SETATTR OPEN READ WRITE STATFS RELEASE FSYNC FLUSH"
NAMES = {globals()[name]: name for name in _REQUESTS.split()}
ROOT, FILE = 1, 2
HEADER = struct.Struct("IIQQIIIHH")
MS_NOSUID, MS_NODEV = 2, 4


def attributes(node: int, size: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == ROOT else stat.S_IFREG | 0o666
    return struct.pack(
        "QQQQQQIIIIIIIIII", node, size, (size + 511) // 512, *[0] * 6, mode, 1, 0, 0, 0, 4096, 0
    )


class Server:
    """Answers one request after the other, but for those it is to keep."""

    def __init__(self, fuse_fd: int, size: int, flush: int, orders: socket.socket) -> None:
        self.fd = fuse_fd
        self.data = bytearray(size)
        self.flush = flush
        self.orders = orders
        self.hanging: set[str] = set()
        self.before = 0
        self.kept: list[bytes] = []
        self.seen: Counter[str] = Counter()

    def serve(self) -> None:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.register(self.orders, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd != self.fd:
                    self.obey()
                    continue
                try:
                    request = os.read(self.fd, (1 << 20) + 4096)
                except OSError as exc:
                    if exc.errno in (errno.EINTR, errno.ENOENT):
                        continue
                    return  # unmounted
                self.take(request)

    def obey(self) -> None:
        order, *words = self.orders.recv(4096).decode().split()
        answer = "done"
        if order == "hang":
            before, *names = words
            self.hanging, self.before = set(names), int(before)
        elif order == "release":
            self.hanging, kept, self.kept = set(), self.kept, []
            for request in kept:
                self.serve_one(request)
        elif order == "seen":
            answer, self.seen = " ".join(self.seen.elements()), Counter()
        self.orders.send(f"answer {answer}".encode())

    def take(self, request: bytes) -> None:
        opcode = HEADER.unpack_from(request)[1]
        if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
            return
        name = NAMES.get(opcode, str(opcode))
        self.seen[name] += 1
        if name in self.hanging and self.before == 0:
            self.kept.append(request)
            self.orders.send(f"kept {name}".encode())
            return
        self.before -= name in self.hanging
        self.serve_one(request)

    def serve_one(self, request: bytes) -> None:
        _, opcode, unique, node, *_ = HEADER.unpack_from(request)
        code, answer = self.answer(opcode, node, request[HEADER.size :])
        os.write(self.fd, struct.pack("IiQ", 16 + len(answer), -code, unique) + answer)

    def answer(self, opcode: int, node: int, body: bytes) -> tuple[int, bytes]:
        size = 0 if node == ROOT else len(self.data)
        if opcode == INIT:
            return 0, struct.pack("IIIIHHIIHHI28x", 7, 31, 1 << 17, 0, 12, 9, 1 << 17, 1, 0, 0, 0)
        if opcode == LOOKUP and (node, body) == (ROOT, b"file\0"):
            return 0, struct.pack("QQQQII", FILE, 0, 0, 0, 0, 0) + attributes(FILE, len(self.data))
        if opcode == LOOKUP:
            return errno.ENOENT, b""
        if opcode in (GETATTR, SETATTR):
            return 0, struct.pack("QII", 0, 0, 0) + attributes(node, size)
        if opcode == OPEN:
            return 0, struct.pack("QII", 0, 0, 0)
        if opcode == READ:
            _, offset, length = struct.unpack_from("QQI", body)
            return 0, bytes(self.data[offset : offset + length])
        if opcode == WRITE:
            _, offset, length = struct.unpack_from("QQI", body)
            self.data[offset : offset + length] = body[40 : 40 + length]
            return 0, struct.pack("II", length, 0)
        if opcode == STATFS:
            return 0, struct.pack("QQQQQIIII24x", 1024, 512, 512, 10, 5, 4096, 255, 4096, 0)
        if opcode == FLUSH:
            return self.flush, b""
        if opcode in (RELEASE, FSYNC):
            return 0, b""
        return errno.ENOSYS, b""


def main(directory: str, kind: str, size: str, flush: str, orders_fd: str) -> None:
    """Mount and serve until unmounted."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other"
    libc = ctypes.CDLL(None, use_errno=True)
    strings = (each.encode() for each in ("test", directory, kind))
    if libc.mount(*strings, MS_NOSUID | MS_NODEV, options.encode()):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), directory)
    with socket.socket(fileno=int(orders_fd)) as orders:
        orders.send(b"answer mounted")
        Server(fd, int(size), int(flush), orders).serve()


main(*sys.argv[1:])
