#!/usr/bin/env python3
"""Counters over TCP, in Python, updated while they are counted: what examples/c-counter is in C, with the same protocol, the
same state and the same carry, so that a service can be updated from one to the other.

    INCR name    adds one, answers the new value
    GET name     answers the value
    INFO         answers version, generation, connections and counters

Two selectors: `serving` has everything, `waiting` only the conversation with the supervisor. The owner waits on the first,
a follower on the second, so it can hold every connection without ever touching one.
"""

import os
import selectors
import signal
import socket
import struct
import sys

import warmswap
from warmswap import BecomeOwner, ConnectionArrived, ConnectionCarry, ConnectionClosed, ControlLost, Quiesce, Retire

VERSION = os.environ.get("VERSION", "1")
LINE_LEN_MAX = 64 * 1024  # a longer line ends its connection
OUTPUT_LEN_MAX = 1 << 20  # a client that does not read its answers is not read from
HEAD = struct.Struct("<BI")  # of a carry: whether the connection is closing, the length of the input


class Connection:
    """A client: what it has sent that is no whole line yet, and what it has not been sent yet."""

    def __init__(self, sock: socket.socket):
        self.socket = sock
        self.input = b""
        self.output = b""
        self.closing = False  # once the output is sent

    def give(self) -> bytes:
        """Everything that is not in the socket; it is not here any more."""
        if not (self.closing or self.input or self.output):
            return b""
        carry = HEAD.pack(self.closing, len(self.input)) + self.input + self.output
        self.take(b"")
        return carry

    def take(self, carry: bytes) -> None:
        """Replaces everything that is not in the socket."""
        self.input, self.output, self.closing = b"", b"", False
        if not carry:
            return
        closing, length = HEAD.unpack_from(carry) if len(carry) >= HEAD.size else (True, len(carry))
        if HEAD.size + length > len(carry):
            self.closing = True  # not from a program of this family: better an end than a mix of two answers
            return
        self.closing = bool(closing)
        self.input, self.output = carry[HEAD.size : HEAD.size + length], carry[HEAD.size + length :]


class Server:
    def __init__(self, address: str):
        self.service = warmswap.Service(schema=1)
        self.counters = self.service.counters("counters")
        self.service.listen("counter", address)
        self.service.join()
        self.connections: dict[int, Connection] = {}
        self.serving, self.waiting = selectors.DefaultSelector(), selectors.DefaultSelector()
        for number, (_, listener) in enumerate(self.service.listeners()):
            self.serving.register(listener, selectors.EVENT_READ, ("listener", number))
        if self.service.control_fd is not None:
            self.serving.register(self.service.control_fd, selectors.EVENT_READ, ("control", 0))
            self.waiting.register(self.service.control_fd, selectors.EVENT_READ, ("control", 0))

    def run(self) -> None:
        self.service.ready()
        while not self.converse():
            if self.service.is_owner:
                self.turn(self.serving.select(self.service.wake_within))
            elif self.waiting.get_map():
                self.waiting.select(self.service.wake_within)
            else:
                return  # a follower that nobody will ever speak to again

    def converse(self) -> bool:
        """What the supervisor wants. True when the process is to end."""
        try:
            for event in self.service.events():
                match event:
                    case ConnectionArrived():
                        self.add(event.cookie, event.socket).take(event.carry)
                    case ConnectionCarry() if event.cookie in self.connections:
                        self.connections[event.cookie].take(event.carry)
                    case ConnectionClosed():
                        self.forget(event.cookie)
                    case BecomeOwner():
                        self.service.serving()
                        for connection in self.connections.values():
                            self.execute(connection)
                        self.reply(list(self.connections))
                    case Quiesce():
                        self.reply(list(self.connections))
                        for cookie, connection in self.connections.items():
                            if carry := connection.give():
                                self.service.carry(cookie, carry)
                        self.service.yielded()
                    case Retire():
                        if self.service.is_owner:
                            self.reply(list(self.connections))
                        self.service.drained()
                        return True
                    case ControlLost():
                        self.serving.unregister(event.fd)
                        self.waiting.unregister(event.fd)
        except warmswap.Error as error:
            if error.code != warmswap.SUPERVISOR:
                raise
            # It cannot be understood any more; the clients can. ControlLost comes next.
            print(f"counter: {error}", file=sys.stderr)
            return self.converse()
        return False

    def turn(self, ready) -> None:
        """Reads and executes whatever is ready, publishes, then answers."""
        cookies = []
        for key, _ in ready:
            kind, number = key.data
            if kind == "listener":
                self.accept(key.fileobj, number)
            elif kind == "connection":
                connection = self.connections[number]
                self.receive(connection)
                self.execute(connection)
                cookies.append(number)
        self.reply(cookies)
        self.service.maintain()

    def accept(self, listener: socket.socket, number: int) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return  # whoever waited has gone
        sock.setblocking(False)
        self.add(self.service.connection_opened(sock, number), sock)

    def add(self, cookie: int, sock: socket.socket) -> Connection:
        self.connections[cookie] = Connection(sock)
        self.serving.register(sock, selectors.EVENT_READ, ("connection", cookie))
        return self.connections[cookie]

    def forget(self, cookie: int) -> None:
        if connection := self.connections.pop(cookie, None):
            # Another process may have a duplicate, which would keep it registered.
            self.serving.unregister(connection.socket)
            connection.socket.close()

    def receive(self, connection: Connection) -> None:
        if connection.closing or len(connection.output) >= OUTPUT_LEN_MAX:
            return
        try:
            got = connection.socket.recv(16 * 1024)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            got = b""
        connection.input += got
        connection.closing = not got  # a client that closed its side only still gets its answers

    def execute(self, connection: Connection) -> None:
        """Answers every whole line in the input, as long as the client takes its answers."""
        while len(connection.output) < OUTPUT_LEN_MAX:
            line, end, rest = connection.input.partition(b"\n")
            if not end:
                break
            connection.input = rest
            connection.output += self.answer(line.removesuffix(b"\r"))
        if len(connection.input) > LINE_LEN_MAX and len(connection.output) < OUTPUT_LEN_MAX:
            connection.input, connection.closing = b"", True
            connection.output += b"ERR the line is too long\n"

    def answer(self, line: bytes) -> bytes:
        try:
            match line.split(b" ", 1):
                case [b"INCR", name] if name:
                    return b"%d\n" % self.counters.add(name)
                case [b"GET", name] if name:
                    return b"%d\n" % self.counters.get(name)
                case [b"INFO"]:
                    about = (VERSION, self.service.generation, self.service.connections, len(self.counters), os.getpid())
                    return b"python-counter %s generation %d connections %d counters %d pid %d\n" % (
                        about[0].encode(), *about[1:]
                    )
        except warmswap.Error as error:
            return f"ERR {error}\n".encode()
        return b"ERR known are INCR name, GET name and INFO\n"

    def reply(self, cookies: list[int]) -> None:
        """Publishes the state, then sends what was answered: what is not published is never seen by a client."""
        self.service.commit()
        if not self.service.may_write():
            return  # somebody else owns: the answers stay for a carry
        for cookie in cookies:
            self.deliver(cookie, self.connections[cookie])

    def deliver(self, cookie: int, connection: Connection) -> None:
        gone = False
        try:
            while connection.output:
                connection.output = connection.output[connection.socket.send(connection.output) :]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            gone = True
        # A whole line that waits was left because there was too much output.
        waits = bool(connection.output) or b"\n" in connection.input
        if gone or (connection.closing and not waits):
            self.forget(cookie)
            self.service.connection_closed(cookie)
            return
        reads = not connection.closing and len(connection.output) < OUTPUT_LEN_MAX
        events = (selectors.EVENT_WRITE if waits else 0) | (selectors.EVENT_READ if reads else 0)
        if self.serving.get_key(connection.socket).events != events:
            self.serving.modify(connection.socket, events, ("connection", cookie))


def main() -> None:
    # Process 1 of a container hears of no signal that it does not ask for.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    Server(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:7000").run()


if __name__ == "__main__":
    main()
