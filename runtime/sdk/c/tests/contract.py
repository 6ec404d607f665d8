"""Calls warmswap.py in every way, alone: no supervisor, an address of its own."""

import os
import socket
import sys

import warmswap


def fails(code, text, call, *arguments):
    try:
        call(*arguments)
    except warmswap.Error as error:
        assert error.code == code and text in str(error), f"{error.code} {error}, not {code} {text}"
    else:
        raise AssertionError(f"{call} did not fail with {text}")


assert warmswap.version() == sys.argv[1], warmswap.version()
assert not warmswap.is_supervised()
with warmswap.Service(schema=1) as service:
    fails(warmswap.ORDER, "ws_join", service.commit)
    fails(warmswap.ARGUMENT, "no address", service.listen, "web", "nowhere")
    names, visits, events, motto = (
        service.map("names"),
        service.counters("visits"),
        service.log("events"),
        service.record("motto"),
    )
    fails(warmswap.ARGUMENT, "declared twice", service.log, "names")
    fails(warmswap.NOT_OWNER, "owner", names.put, b"a", b"b")
    service.listen("web", "127.0.0.1:0")
    service.join()
    assert service.control_fd is None and service.wake_within is None
    assert list(service.events()) == [warmswap.BecomeOwner(0)] and list(service.events()) == []
    service.serving()
    service.ready()
    assert service.is_owner and service.may_write() and service.generation == 0

    assert names.get(b"absent") is None and not names.put(b"a\0b", b"\0\1") and not names.put(b"", b"")
    assert names.get(b"a\0b") == b"\0\1" and names.get(b"") == b"" and names.put(b"", b"x") and len(names) == 2
    assert sorted(names.items()) == [(b"", b"x"), (b"a\0b", b"\0\1")]
    assert names.remove(b"") and not names.remove(b"") and len(names) == 1
    fails(warmswap.ARGUMENT, "longer than", names.put, b"a", bytes(5 << 20))

    assert visits.get(b"n") == 0 and visits.add(b"n") == 1 and visits.add(b"n", -3) == -2
    visits.set(b"m", (1 << 63) - 1)
    fails(warmswap.OVERFLOW, "64 bits", visits.add, b"m")
    assert sorted(visits.items()) == [(b"m", (1 << 63) - 1), (b"n", -2)] and len(visits) == 2
    assert visits.remove(b"m") and not visits.remove(b"m")

    assert [events.append(b"%d" % n) for n in range(5)] == [0, 1, 2, 3, 4]
    events.trim(3)
    assert events.range() == range(3, 5) and len(events) == 2 and events.get(4) == b"4" and events.get(2) is None

    assert motto.get() is None and not motto.set(b"") and motto.get() == b"" and motto.set(b"on")
    assert motto.get() == b"on" and motto.clear() and not motto.clear()
    service.commit()
    service.maintain()
    assert service.statistics()["records"] > 3 and service.statistics()["segments"] == 1

    ((name, listener),) = service.listeners()
    client = socket.create_connection(listener.getsockname())
    accepted, _ = listener.accept()
    cookie = service.connection_opened(accepted, 0)
    assert name == "web" and cookie > 0 and service.connections == 1
    fails(warmswap.ORDER, "nobody asked", service.carry, cookie, b"half a line")
    fails(warmswap.ORDER, "nobody asked", service.yielded)
    service.connection_closed(cookie)
    assert service.connections == 0
    service.drained()
    for sock in (listener, client, accepted):
        sock.close()
fails(warmswap.ARGUMENT, "NULL", service.commit)
service.close()

# What only a supervisor brings about, as it is shown.
ours, theirs = socket.socketpair()
carry = b"half\0 a line"
kept = warmswap.ctypes.create_string_buffer(carry, len(carry))
shown = warmswap._Event(
    1, os.dup(ours.fileno()), 7, 0, 0, b"web", warmswap.ctypes.addressof(kept), len(carry)
)
event = warmswap._event(shown)
assert (event.cookie, event.listener, event.carry) == (7, "web", carry) and not event.socket.getblocking()
event.socket.send(b"x")
assert theirs.recv(1) == b"x"
for sock in (ours, theirs, event.socket):
    sock.close()
shown.carry_len = 0
assert [warmswap._event(shown) for shown.kind in (2, 3)] == [
    warmswap.ConnectionCarry(7, b""), warmswap.ConnectionClosed(7),
]
shown.within_us = 1500
assert [warmswap._event(shown) for shown.kind in (5, 6)] == [warmswap.Quiesce(0, 0.0015), warmswap.Retire(0.0015)]
print("as the header says")
