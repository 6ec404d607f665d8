/*
 * warmswap.h: a service, written in C or whatever can call C, that is updated while it serves.
 *
 * A service consists of processes. One of them owns: it accepts, reads, changes the state and answers. During an update a
 * second one follows: it reads the same state from shared memory and holds duplicates of the same connections, and touches
 * neither until it is told to own. Who owns is decided by the supervisor (the warmswap agent); the process only asks
 * ws_poll() what to do. There is no event loop and no thread in here that calls you: watch one more descriptor in your own loop.
 *
 *     service = ws_new(1);
 *     visits = ws_counters(service, "visits");
 *     ws_listen(service, "web", "127.0.0.1:7000");      used when nobody passes listeners
 *     ws_join(service);
 *     ws_ready(service);
 *     for (;;) {
 *         while (ws_poll(service, &event) == 1)
 *             switch (event->kind) {
 *             case WS_CONNECTION_ARRIVED:  keep event->fd, read nothing from it yet
 *             case WS_CONNECTION_CARRY:    keep event->carry for that connection
 *             case WS_CONNECTION_CLOSED:   close yours
 *             case WS_BECOME_OWNER:        ws_serving(service); go on with what was carried over
 *             case WS_QUIESCE:             send what is left to send; ws_carry(…) for each connection; ws_yielded(service)
 *             case WS_RETIRE:              ws_drained(service); exit
 *             case WS_CONTROL_LOST:        stop watching event->fd
 *             }
 *         poll(…, ws_wake_within_ms(service));           ws_control_fd(service); and, if ws_is_owner(), everything else
 *         if (ws_is_owner(service)) {
 *             accept, read, change the state
 *             ws_commit(service);                        before anything about it is answered
 *             if (ws_may_write(service)) answer; else keep the answers for ws_carry()
 *             ws_maintain(service);
 *         }
 *     }
 *
 * Link with `pkg-config --cflags --libs warmswap`. A complete service is examples/c-counter in the sources of warmswap.
 *
 * RETURN VALUES. Functions that return int or int64_t return a negative number when they fail, one of WS_ERROR_…, and then
 * have changed nothing unless they say so. -1 is none of these: it stands for "none" where a descriptor or a time is
 * returned. Functions that return a pointer return NULL when they fail. ws_error() says why.
 *
 * ARGUMENTS. NULL where something is needed, an unknown collection or listener, a text that is no UTF-8 or longer than
 * 255 bytes are WS_ERROR_ARGUMENT. Names and addresses are UTF-8 with a zero at the end; keys and values are any bytes, of
 * which NULL with the length 0 is none. A pointer that is neither NULL nor valid cannot be told from a good one.
 *
 * OWNERSHIP. What you pass is copied, descriptors apart. What you get a `const` pointer to belongs to the service, and each
 * function says how long it stays. Descriptors: those of listeners and the control descriptor belong to the service, never
 * close them; those of connections belong to you, whether you accepted them or got them with WS_CONNECTION_ARRIVED. Close a
 * connection with close() alone, never with shutdown(): the other process has a duplicate. Take it out of an epoll set
 * before that, for the same reason.
 *
 * THREADS. A service may be used from any thread, by one call at a time: a second call at the same time, and one from inside
 * a visitor, is refused with WS_ERROR_BUSY. One thread in the background makes memory ready ahead; block signals before
 * ws_new() if you want them in your own threads only. Do not use a service after fork().
 *
 * C++ exceptions and longjmp() must not leave a visitor.
 *
 * UNITS are in the names: _ms milliseconds, _us microseconds, _len and _bytes bytes.
 */
#ifndef WARMSWAP_H
#define WARMSWAP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The version of this header; ws_version() has that of the library. */
#define WS_VERSION "0.1.0"

/* An argument cannot be what it is: see ARGUMENTS. Also a key above 65,535 bytes, or a record above 4 MiB. */
#define WS_ERROR_ARGUMENT (-10)
/* Not now: before ws_join(), or after it, or without a WS_QUIESCE. */
#define WS_ERROR_ORDER (-11)
/* Another call uses the service: see THREADS. */
#define WS_ERROR_BUSY (-12)
/* Only the owner may change the state. */
#define WS_ERROR_NOT_OWNER (-13)
/* A counter would leave the range of int64_t. */
#define WS_ERROR_OVERFLOW (-14)
/* The state cannot be read or written: no memory, or it is damaged. */
#define WS_ERROR_STATE (-15)
/* The system refused something, an address cannot be listened on, or the environment names descriptors that are not there. */
#define WS_ERROR_SYSTEM (-16)
/* The conversation with the supervisor broke. An owner may go on serving; WS_CONTROL_LOST is the last event. */
#define WS_ERROR_SUPERVISOR (-17)
/* A mistake in warmswap. The service can only be closed from now on; end the process, and it is started again with its state. */
#define WS_ERROR_BUG (-18)

/* A service, as far as this process has a part in it. */
typedef struct ws_service ws_service;

/* Why the last function that failed in this thread did: what was tried and what stood against it, on one line. Never NULL;
 * empty before the first failure. Valid until the next failure in this thread. */
const char *ws_error(void);

/* The version of the library. Valid for ever. */
const char *ws_version(void);

/* ---- Beginning and end ---- */

/* 1 when a warmswap supervisor started this process, else 0. */
int ws_is_supervised(void);

/* A service with an empty state. `schema` is the version of the layout of all values: a process with another schema can
 * not take the state over, and an update to it is refused. Close it with ws_close().
 * NULL: WS_ERROR_STATE. */
ws_service *ws_new(uint32_t schema);

/* Ends this process's part, closes the listeners, frees everything and sets *service to NULL; nothing happens when it is NULL
 * already. Connections stay yours. Copies of the pointer must not be used any more.
 * WS_ERROR_BUSY: nothing is closed. */
int ws_close(ws_service **service);

/* Declare a collection of the state before ws_join(), each under a name of its own; every version of the service finds it
 * under the same name and kind. Collections that this version does not declare are kept as they are for those that do.
 * Return a number for the functions below, from 0. Kinds: see "State".
 * WS_ERROR_ARGUMENT also when the name is taken, WS_ERROR_ORDER after ws_join(). */
int ws_map(ws_service *service, const char *name);
int ws_counters(ws_service *service, const char *name);
int ws_log(ws_service *service, const char *name);
int ws_record(ws_service *service, const char *name);

/* An address like "127.0.0.1:7000" to listen on when nobody passes listeners (no supervisor and no LISTEN_FDS); any number.
 * WS_ERROR_ARGUMENT also when it is no address, WS_ERROR_ORDER after ws_join(). */
int ws_listen(ws_service *service, const char *name, const char *address);

/* Takes part as the environment says: under a supervisor, or with the listeners of LISTEN_FDS, or alone on the addresses
 * of ws_listen(). Waits up to 10 s for the supervisor's welcome. Without a supervisor this process owns at once. Descriptors
 * can be taken from the environment once per process.
 * WS_ERROR_SYSTEM, WS_ERROR_SUPERVISOR, WS_ERROR_STATE: the service can only be closed then. WS_ERROR_ORDER: joined already. */
int ws_join(ws_service *service);

/* ---- Listeners ---- */

/* How many there are; numbered from 0 in the order of their names in the service file.
 * From here on: WS_ERROR_ORDER before ws_join(). */
int ws_listeners(const ws_service *service);

/* Its descriptor, non-blocking. The owner accepts from it, nobody else touches it. */
int ws_listener_fd(const ws_service *service, int listener);

/* Its name in the service file. Valid until ws_close(). */
const char *ws_listener_name(const ws_service *service, int listener);

/* ---- The loop ---- */

/* Something to do. Never copy it: later versions may be longer. */
typedef struct ws_event {
    /* One of the following. */
    int kind;
    /* WS_CONNECTION_ARRIVED: the connection, yours from now on. WS_CONTROL_LOST: not to be watched any more, the service's.
     * Else -1. */
    int fd;
    /* WS_CONNECTION_…: names the connection, the same number in every process. */
    uint64_t cookie;
    /* WS_BECOME_OWNER, WS_QUIESCE: the number of the handover. */
    uint64_t handover;
    /* WS_QUIESCE, WS_RETIRE: time left, from the return of ws_poll(). */
    uint64_t within_us;
    /* WS_CONNECTION_ARRIVED: the name of the listener that accepted it. Else empty. */
    const char *listener;
    /* WS_CONNECTION_ARRIVED, WS_CONNECTION_CARRY: what the other process gave to ws_carry(), carry_len bytes. */
    const void *carry;
    size_t carry_len;
} ws_event;

/* A connection that the owner serves: keep it, touch nothing before WS_BECOME_OWNER. */
#define WS_CONNECTION_ARRIVED 1
/* What the owner carried over for a connection that is here already; replaces what came before, also by nothing. */
#define WS_CONNECTION_CARRY 2
/* Close this connection: it has ended in the owner, or cannot be continued. */
#define WS_CONNECTION_CLOSED 3
/* Call ws_serving(), take up what was carried over, serve. Comes to an owner too, when answers were held back. */
#define WS_BECOME_OWNER 4
/* Stop taking work; send what can be sent; ws_carry() for each connection that needs it; ws_yielded(). */
#define WS_QUIESCE 5
/* Finish, call ws_drained() and exit. */
#define WS_RETIRE 6
/* No supervisor will ever speak again: stop watching `fd`. An owner goes on serving. */
#define WS_CONTROL_LOST 7

/* What to watch for reading besides your own descriptors; -1 when there is nothing (any more). */
int ws_control_fd(const ws_service *service);

/* The longest time to sleep before the next ws_poll(), as poll(2) and epoll_wait(2) take it: -1 is as long as you like. */
int ws_wake_within_ms(const ws_service *service);

/* The next thing to do: 1 and *event, or 0 and *event = NULL when there is nothing left to do now. Never blocks. Everything that
 * *event points to is valid until the next ws_poll(). Call it until it returns 0, in every turn of the loop.
 * WS_ERROR_SUPERVISOR: call again, WS_CONTROL_LOST follows. */
int ws_poll(ws_service *service, const ws_event **event);

/* This process is initialised and could own. Once, before the loop. */
int ws_ready(ws_service *service);

/* After WS_BECOME_OWNER, before anything is served. */
int ws_serving(ws_service *service);

/* Between WS_QUIESCE and ws_yielded(): what the successor must know of a connection: input that is no whole request yet, output
 * that is not sent yet, in an encoding of your own; up to 64 MiB. At most once per connection; for the rest nothing is
 * carried.
 * WS_ERROR_ORDER without a WS_QUIESCE. */
int ws_carry(ws_service *service, uint64_t cookie, const void *carry, size_t carry_len);

/* After WS_QUIESCE: this process serves nothing any more and follows. It may be told to own again at any time, with its own
 * carries when nobody else has served in between: keep the connections and forget what was carried.
 * WS_ERROR_ORDER without a WS_QUIESCE. */
int ws_yielded(ws_service *service);

/* After WS_RETIRE: the process is about to exit. */
int ws_drained(ws_service *service);

/* 1 when this process owns, else 0. */
int ws_is_owner(const ws_service *service);

/* 1 when something may leave that a client can see. Ask after ws_commit() and before the answers are sent, once per turn: it costs
 * one load from memory. 0: somebody else owns, or is about to; keep the answers for ws_carry(). */
int ws_may_write(const ws_service *service);

/* The number of this process's generation; 0 without a supervisor. */
int64_t ws_generation(const ws_service *service);

/* ---- Connections ---- */

/* The owner has accepted `fd` from a listener. Keep it open until ws_connection_closed() with the cookie that is put into
 * *cookie.
 * WS_ERROR_ARGUMENT also for a negative descriptor, WS_ERROR_SYSTEM when it is no socket. */
int ws_connection_opened(ws_service *service, int fd, int listener, uint64_t *cookie);

/* The owner has closed it. Nothing happens when the cookie is not known. Not for WS_CONNECTION_CLOSED. */
int ws_connection_closed(ws_service *service, uint64_t cookie);

/* How many connections this process holds. */
int64_t ws_connections(const ws_service *service);

/* ---- State ----
 *
 * Every change is a record in a log in shared memory, so nothing is half written whoever dies when, and the next owner has
 * it without copying. Values are read where they lie: a pointer to a value is valid until the next ws_poll(), ws_commit(), ws_maintain(),
 * ws_close() or change of the state. It may be aligned to nothing. A follower can read too, but sees changes only after
 * ws_poll().
 *
 * Only the owner changes: WS_ERROR_NOT_OWNER for anybody else, WS_ERROR_STATE when memory is missing.
 * A Rust service has the same collections as Map<Vec<u8>>, Counters, Log<Vec<u8>> and Record<Vec<u8>>.
 */

/* Publishes what was changed since the last call, all of it or, if this process dies before, nothing. Before any answer about
 * it leaves. */
int ws_commit(ws_service *service);

/* Keeps the memory bounded: a piece of work that is never longer than reading four times what was appended since the last call,
 * or 64 KiB. Once per turn of the owner's loop. WS_ERROR_STATE: no memory now; the state is whole. */
int ws_maintain(ws_service *service);

typedef struct ws_stats {
    /* Living records of all collections, also of those that this program does not declare. */
    uint64_t records;
    /* Of these records. */
    uint64_t living_bytes;
    /* Of all segments of shared memory, and how many there are. */
    uint64_t segment_bytes;
    uint64_t segments;
    /* That ws_maintain() has copied, and segments that it has freed, since this process became owner. */
    uint64_t copied_bytes;
    uint64_t segments_retired;
} ws_stats;

/* Call it with sizeof(ws_stats): what a newer library knows more is left away, what an older one does not know is 0. */
int ws_statistics(const ws_service *service, ws_stats *stats, size_t stats_size);

/* Sees one key and value, which are valid until it returns. Not 0: enough. Must not call anything with the same service. */
typedef int (*ws_visit)(void *context, const void *key, size_t key_len, const void *value, size_t value_len);
typedef int (*ws_visit_counter)(void *context, const void *name, size_t name_len, int64_t value);

/* -- Maps: from bytes to bytes -- */

/* 1 and the value; 0, NULL and length 0 when there is none. */
int ws_map_get(const ws_service *service, int map, const void *key, size_t key_len, const void **value, size_t *value_len);

/* Sets a value: 1 when there was one before, 0 when not. */
int ws_map_put(ws_service *service, int map, const void *key, size_t key_len, const void *value, size_t value_len);

/* 1 when there was a value, 0 when not. */
int ws_map_remove(ws_service *service, int map, const void *key, size_t key_len);

/* How many keys there are. */
int64_t ws_map_count(const ws_service *service, int map);

/* Shows every key and value, in no order: 1 when the visitor ended it, else 0. */
int ws_map_each(const ws_service *service, int map, ws_visit visit, void *context);

/* A place in the state. All zeros is the beginning. */
typedef struct ws_place {
    uint64_t segment;
    uint64_t offset;
} ws_place;

/* As ws_map_each(), for work that is spread over many turns, like removing what has expired: looks at about budget_bytes of the
 * state (other collections count too) from *from on, and puts there where to go on; after the end from the beginning again. What
 * is not committed is not seen. The visitor sees all of the stretch, whatever it returns; 1 when it returned anything but
 * 0. */
int ws_map_walk(const ws_service *service, int map, ws_place *from, size_t budget_bytes, ws_visit visit, void *context);

/* -- Counters: from bytes to a number; one that was never set is 0 -- */

int ws_counter_get(const ws_service *service, int counters, const void *name, size_t name_len, int64_t *value);

/* Puts the new value into *value, unless that is NULL. WS_ERROR_OVERFLOW. */
int ws_counter_add(ws_service *service, int counters, const void *name, size_t name_len, int64_t by, int64_t *value);

int ws_counter_set(ws_service *service, int counters, const void *name, size_t name_len, int64_t value);

/* 1 when it was there, 0 when not. */
int ws_counter_remove(ws_service *service, int counters, const void *name, size_t name_len);

/* How many there are, those that came back to 0 included. */
int64_t ws_counter_count(const ws_service *service, int counters);

/* Shows every counter, in no order: 1 when the visitor ended it, else 0. */
int ws_counter_each(const ws_service *service, int counters, ws_visit_counter visit, void *context);

/* -- Logs: entries in order, each with a number that is never given twice, not by a successor either -- */

/* Puts the number of the new entry into *number, unless that is NULL. */
int ws_log_append(ws_service *service, int log, const void *value, size_t value_len, uint64_t *number);

/* 1 and the entry; 0, NULL and length 0 when there is none. */
int ws_log_get(const ws_service *service, int log, uint64_t number, const void **value, size_t *value_len);

/* The number of the first entry that is kept, and the number that the next one gets; equal when there is none. */
int ws_log_range(const ws_service *service, int log, uint64_t *first, uint64_t *next);

/* Drops every entry below `before`. */
int ws_log_trim(ws_service *service, int log, uint64_t before);

/* -- Records: one value, or none -- */

/* 1 and the value; 0, NULL and length 0 when there is none. */
int ws_record_get(const ws_service *service, int record, const void **value, size_t *value_len);

/* 1 when there was a value before, 0 when not. */
int ws_record_set(ws_service *service, int record, const void *value, size_t value_len);

/* 1 when there was a value, 0 when not. */
int ws_record_clear(ws_service *service, int record);

#ifdef __cplusplus
}
#endif

#endif
