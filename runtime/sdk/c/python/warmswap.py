"""warmswap for Python: a service that is updated while it serves, with its connections and its state.

One file over ``libwarmswap.so.0`` (ctypes, nothing else): install the SDK, or put this file beside your program and say
where the library lies in ``WARMSWAP_LIBRARY``. What it means to own, to follow and to be handed over is told at the head of
``warmswap.h``; the names here are those of the header without ``ws_``.

    service = Service(schema=1)
    visits = service.counters("visits")
    service.listen("web", "127.0.0.1:7000")     # used when nobody passes listeners
    service.join()
    service.ready()
    while True:
        for event in service.events():
            match event:
                case ConnectionArrived(): ...    # keep event.socket, read nothing from it yet
                case ConnectionCarry(): ...      # keep event.carry for that connection
                case ConnectionClosed(): ...     # close yours
                case BecomeOwner(): ...          # service.serving(); go on with what was carried over
                case Quiesce(): ...              # send what is left; service.carry(...); service.yielded()
                case Retire(): ...               # service.drained(); exit
                case ControlLost(): ...          # stop watching event.fd
        # wait for service.control_fd, and for everything else if service.is_owner, at most service.wake_within seconds
        # as owner: accept, read, change the state; service.commit(); answer if service.may_write(); service.maintain()

Keys and values are bytes and are copied into Python. Times are seconds. Failures raise :class:`Error`. A service is for one
thread at a time.
"""

from __future__ import annotations

import ctypes
import os
import socket as _socket
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Iterator, Optional

__all__ = [
    "BecomeOwner", "ConnectionArrived", "ConnectionCarry", "ConnectionClosed", "ControlLost", "Counters", "Error", "Log",
    "Map", "Quiesce", "Record", "Retire", "Service", "is_supervised", "version",
]


class Error(Exception):
    """Why a call failed; ``code`` is one of ``WS_ERROR_…`` in the header."""

    def __init__(self, code: int, text: str):
        super().__init__(text)
        self.code = code


ARGUMENT, ORDER, BUSY, NOT_OWNER, OVERFLOW, STATE, SYSTEM, SUPERVISOR, BUG = range(-10, -19, -1)


# What ws_poll() shows.


@dataclass
class ConnectionArrived:
    """A connection that the owner serves: keep it, touch nothing before :class:`BecomeOwner`."""

    cookie: int
    socket: _socket.socket
    listener: str
    carry: bytes


@dataclass
class ConnectionCarry:
    """What was carried over for a connection that is here already; replaces what came before."""

    cookie: int
    carry: bytes


@dataclass
class ConnectionClosed:
    """Close this connection: it has ended in the owner, or cannot be continued."""

    cookie: int


@dataclass
class BecomeOwner:
    """Call :meth:`Service.serving`, take up what was carried over, serve."""

    handover: int


@dataclass
class Quiesce:
    """Stop taking work, send what can be sent ``within`` seconds, :meth:`Service.carry`, :meth:`Service.yielded`."""

    handover: int
    within: float


@dataclass
class Retire:
    """Finish ``within`` seconds, call :meth:`Service.drained` and exit."""

    within: float


@dataclass
class ControlLost:
    """No supervisor will ever speak again: stop watching ``fd``. An owner goes on serving."""

    fd: int


class _Event(ctypes.Structure):
    _fields_ = [
        ("kind", c_int),
        ("fd", c_int),
        ("cookie", c_uint64),
        ("handover", c_uint64),
        ("within_us", c_uint64),
        ("listener", c_char_p),
        ("carry", c_void_p),
        ("carry_len", c_size_t),
    ]


class _Stats(ctypes.Structure):
    _fields_ = [
        (name, c_uint64)
        for name in ("records", "living_bytes", "segment_bytes", "segments", "copied_bytes", "segments_retired")
    ]


_VISIT = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t)
_VISIT_COUNTER = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t, c_int64)
_KEY = [c_char_p, c_size_t]
_FOUND = [POINTER(c_void_p), POINTER(c_size_t)]

# Every function takes the service first, and returns an int, unless it says otherwise.
_FUNCTIONS: dict[str, list] = {
    "map": [c_char_p],
    "counters": [c_char_p],
    "log": [c_char_p],
    "record": [c_char_p],
    "listen": [c_char_p, c_char_p],
    "join": [],
    "listeners": [],
    "listener_fd": [c_int],
    "listener_name": [c_int],
    "control_fd": [],
    "wake_within_ms": [],
    "poll": [POINTER(POINTER(_Event))],
    "ready": [],
    "serving": [],
    "carry": [c_uint64, *_KEY],
    "yielded": [],
    "drained": [],
    "is_owner": [],
    "may_write": [],
    "generation": [],
    "connection_opened": [c_int, c_int, POINTER(c_uint64)],
    "connection_closed": [c_uint64],
    "connections": [],
    "commit": [],
    "maintain": [],
    "statistics": [POINTER(_Stats), c_size_t],
    "map_get": [c_int, *_KEY, *_FOUND],
    "map_put": [c_int, *_KEY, *_KEY],
    "map_remove": [c_int, *_KEY],
    "map_count": [c_int],
    "map_each": [c_int, _VISIT, c_void_p],
    "counter_get": [c_int, *_KEY, POINTER(c_int64)],
    "counter_add": [c_int, *_KEY, c_int64, POINTER(c_int64)],
    "counter_set": [c_int, *_KEY, c_int64],
    "counter_remove": [c_int, *_KEY],
    "counter_count": [c_int],
    "counter_each": [c_int, _VISIT_COUNTER, c_void_p],
    "log_append": [c_int, *_KEY, POINTER(c_uint64)],
    "log_get": [c_int, c_uint64, *_FOUND],
    "log_range": [c_int, POINTER(c_uint64), POINTER(c_uint64)],
    "log_trim": [c_int, c_uint64],
    "record_get": [c_int, *_FOUND],
    "record_set": [c_int, *_KEY],
    "record_clear": [c_int],
}
_LONG = ("generation", "connections", "map_count", "counter_count")


def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(os.environ.get("WARMSWAP_LIBRARY", "libwarmswap.so.0"))
    for name, arguments in _FUNCTIONS.items():
        function = getattr(library, f"ws_{name}")
        function.argtypes = [c_void_p, *arguments]
        function.restype = c_int64 if name in _LONG else c_char_p if name == "listener_name" else c_int
    library.ws_new.argtypes, library.ws_new.restype = [c_uint32], c_void_p
    library.ws_close.argtypes, library.ws_close.restype = [POINTER(c_void_p)], c_int
    library.ws_error.argtypes, library.ws_error.restype = [], c_char_p
    library.ws_version.argtypes, library.ws_version.restype = [], c_char_p
    library.ws_is_supervised.argtypes, library.ws_is_supervised.restype = [], c_int
    return library


_library = _load()


def version() -> str:
    """The version of the library."""
    return _library.ws_version().decode()


def is_supervised() -> bool:
    """Whether a warmswap supervisor started this process."""
    return bool(_library.ws_is_supervised())


def _failed(code: int) -> Error:
    return Error(code, _library.ws_error().decode(errors="replace"))


class Service:
    """A service, as far as this process has a part in it."""

    def __init__(self, schema: int):
        """With an empty state; ``schema`` is the version of the layout of all values."""
        self._pointer = c_void_p(_library.ws_new(schema))
        if not self._pointer:
            raise _failed(STATE)

    def _call(self, name: str, *arguments) -> int:
        result = getattr(_library, f"ws_{name}")(self._pointer, *arguments)
        if result <= ARGUMENT:
            raise _failed(result)
        return result

    def close(self) -> None:
        """Ends this process's part and closes the listeners. Connections stay open. Nothing else may be called then."""
        result = _library.ws_close(byref(self._pointer))
        if result < 0:
            raise _failed(result)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Before join().

    def map(self, name: str) -> Map:
        """Declares a map: from bytes to bytes."""
        return Map(self, self._call("map", name.encode()))

    def counters(self, name: str) -> Counters:
        """Declares counters: from bytes to a number."""
        return Counters(self, self._call("counters", name.encode()))

    def log(self, name: str) -> Log:
        """Declares a log: entries in order."""
        return Log(self, self._call("log", name.encode()))

    def record(self, name: str) -> Record:
        """Declares a record: one value, or none."""
        return Record(self, self._call("record", name.encode()))

    def listen(self, name: str, address: str) -> None:
        """An address like ``127.0.0.1:7000`` for when nobody passes listeners."""
        self._call("listen", name.encode(), address.encode())

    def join(self) -> None:
        """Takes part, as the environment says."""
        self._call("join")

    # The loop.

    def listeners(self) -> list[tuple[str, _socket.socket]]:
        """Names and sockets, which are duplicates and yours to close."""
        return [
            (
                _library.ws_listener_name(self._pointer, at).decode(),
                _socket.socket(fileno=os.dup(self._call("listener_fd", at))),
            )
            for at in range(self._call("listeners"))
        ]

    @property
    def control_fd(self) -> Optional[int]:
        """What to watch for reading, if there is anything (any more)."""
        fd = self._call("control_fd")
        return None if fd == -1 else fd

    @property
    def wake_within(self) -> Optional[float]:
        """The longest time to sleep before the next :meth:`events`; ``None`` is as long as you like."""
        within_ms = self._call("wake_within_ms")
        return None if within_ms == -1 else within_ms / 1000

    def events(self) -> Iterator[object]:
        """Everything to do now. In every turn of the loop, to its end. Raises :class:`Error` with the code ``SUPERVISOR``
        when the conversation broke; :class:`ControlLost` comes with the next call then."""
        shown = POINTER(_Event)()
        while self._call("poll", byref(shown)) == 1:
            yield _event(shown.contents)

    def ready(self) -> None:
        """This process is initialised and could own."""
        self._call("ready")

    def serving(self) -> None:
        """After :class:`BecomeOwner`, before anything is served."""
        self._call("serving")

    def carry(self, cookie: int, carry: bytes) -> None:
        """Between :class:`Quiesce` and :meth:`yielded`: what the successor must know of a connection."""
        self._call("carry", cookie, carry, len(carry))

    def yielded(self) -> None:
        """After :class:`Quiesce`: this process serves nothing any more and follows."""
        self._call("yielded")

    def drained(self) -> None:
        """After :class:`Retire`: the process is about to exit."""
        self._call("drained")

    @property
    def is_owner(self) -> bool:
        """Whether this process owns."""
        return self._call("is_owner") == 1

    def may_write(self) -> bool:
        """Whether anything may leave that a client can see. Ask after :meth:`commit`, once per turn."""
        return self._call("may_write") == 1

    @property
    def generation(self) -> int:
        """The number of this process's generation; 0 without a supervisor."""
        return self._call("generation")

    def connection_opened(self, connection: _socket.socket, listener: int) -> int:
        """A connection was accepted from listener number ``listener``. Returns the cookie that names it in every process."""
        cookie = c_uint64()
        self._call("connection_opened", connection.fileno(), listener, byref(cookie))
        return cookie.value

    def connection_closed(self, cookie: int) -> None:
        """The owner has closed it."""
        self._call("connection_closed", cookie)

    @property
    def connections(self) -> int:
        """How many connections this process holds."""
        return self._call("connections")

    def commit(self) -> None:
        """Publishes what was changed, before any answer about it leaves."""
        self._call("commit")

    def maintain(self) -> None:
        """Keeps the memory bounded: once per turn of the owner's loop."""
        self._call("maintain")

    def statistics(self) -> dict[str, int]:
        """What the state holds, as ``ws_stats`` has it."""
        stats = _Stats()
        self._call("statistics", byref(stats), ctypes.sizeof(stats))
        return {name: getattr(stats, name) for name, _ in _Stats._fields_}

    def _found(self, name: str, *arguments) -> Optional[bytes]:
        value, value_len = c_void_p(), c_size_t()
        if self._call(name, *arguments, byref(value), byref(value_len)) == 0:
            return None
        return ctypes.string_at(value.value or 0, value_len.value) if value_len.value else b""


def _event(event: _Event) -> object:
    carry = ctypes.string_at(event.carry, event.carry_len) if event.carry_len else b""
    match event.kind:
        case 1:
            # Python makes its sockets blocking; the mode is shared with the other process, which wants it otherwise.
            arrived = _socket.socket(fileno=event.fd)
            arrived.setblocking(False)
            return ConnectionArrived(event.cookie, arrived, event.listener.decode(errors="replace"), carry)
        case 2:
            return ConnectionCarry(event.cookie, carry)
        case 3:
            return ConnectionClosed(event.cookie)
        case 4:
            return BecomeOwner(event.handover)
        case 5:
            return Quiesce(event.handover, event.within_us / 1e6)
        case 6:
            return Retire(event.within_us / 1e6)
        case 7:
            return ControlLost(event.fd)
    raise Error(BUG, f"libwarmswap {version()} shows an event {event.kind}, which warmswap.py does not know")


@dataclass(frozen=True)
class _Collection:
    _service: Service
    _number: int

    def _call(self, name: str, *arguments) -> int:
        return self._service._call(name, self._number, *arguments)


class Map(_Collection):
    """From bytes to bytes."""

    def __len__(self) -> int:
        return self._call("map_count")

    def get(self, key: bytes) -> Optional[bytes]:
        return self._service._found("map_get", self._number, key, len(key))

    def put(self, key: bytes, value: bytes) -> bool:
        """True when there was a value before."""
        return self._call("map_put", key, len(key), value, len(value)) == 1

    def remove(self, key: bytes) -> bool:
        """True when there was a value."""
        return self._call("map_remove", key, len(key)) == 1

    def items(self) -> list[tuple[bytes, bytes]]:
        """Every key and value, in no order."""
        found: list[tuple[bytes, bytes]] = []

        def visit(_, key, key_len, value, value_len):
            found.append((_bytes(key, key_len), _bytes(value, value_len)))
            return 0

        self._call("map_each", _VISIT(visit), None)
        return found


class Counters(_Collection):
    """From bytes to a number; one that was never set is 0."""

    def __len__(self) -> int:
        return self._call("counter_count")

    def get(self, name: bytes) -> int:
        value = c_int64()
        self._call("counter_get", name, len(name), byref(value))
        return value.value

    def add(self, name: bytes, by: int = 1) -> int:
        """Returns the new value."""
        value = c_int64()
        self._call("counter_add", name, len(name), by, byref(value))
        return value.value

    def set(self, name: bytes, value: int) -> None:
        self._call("counter_set", name, len(name), value)

    def remove(self, name: bytes) -> bool:
        """True when it was there."""
        return self._call("counter_remove", name, len(name)) == 1

    def items(self) -> list[tuple[bytes, int]]:
        """Every counter, in no order."""
        found: list[tuple[bytes, int]] = []

        def visit(_, name, name_len, value):
            found.append((_bytes(name, name_len), value))
            return 0

        self._call("counter_each", _VISIT_COUNTER(visit), None)
        return found


class Log(_Collection):
    """Entries in order, each with a number that is never given twice."""

    def range(self) -> range:
        """The numbers of the entries that are kept."""
        first, following = c_uint64(), c_uint64()
        self._call("log_range", byref(first), byref(following))
        return range(first.value, following.value)

    def __len__(self) -> int:
        return len(self.range())

    def append(self, value: bytes) -> int:
        """Returns the number of the entry."""
        number = c_uint64()
        self._call("log_append", value, len(value), byref(number))
        return number.value

    def get(self, number: int) -> Optional[bytes]:
        return self._service._found("log_get", self._number, number)

    def trim(self, before: int) -> None:
        """Drops every entry below ``before``."""
        self._call("log_trim", before)


class Record(_Collection):
    """One value, or none."""

    def get(self) -> Optional[bytes]:
        return self._service._found("record_get", self._number)

    def set(self, value: bytes) -> bool:
        """True when there was a value before."""
        return self._call("record_set", value, len(value)) == 1

    def clear(self) -> bool:
        """True when there was a value."""
        return self._call("record_clear") == 1


def _bytes(start: Optional[int], length: int) -> bytes:
    return ctypes.string_at(start, length) if length else b""
