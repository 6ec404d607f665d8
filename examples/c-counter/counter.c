/*
 * Counters over TCP, in C, updated while they are counted: a service on the full rung with its state and its connections.
 *
 *     INCR name    adds one, answers the new value
 *     GET name     answers the value
 *     INFO         answers version, generation, connections and counters
 *
 * A line each way; an answer that is no number begins with "ERR" or a letter. To see the connections move, a client may send
 * half a line before an update and the rest after it.
 *
 * One thread, poll(2) around one epoll set: the set has the listeners and connections of this process, and is looked at only
 * while the process owns. So a follower can hold every connection without ever touching one, and nothing has to be
 * registered when it becomes owner.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <warmswap.h>

#ifndef VERSION
#define VERSION "1"
#endif

enum {
    LINE_LEN_MAX = 64 * 1024, /* a longer line ends its connection */
    OUTPUT_LEN_MAX = 1 << 20, /* a client that does not read its answers is not read from */
    READY_MAX = 256,
    BUCKETS = 1024,
};
/* Listener n is LISTENER - n in the set; cookies count up from 1 and never come near. */
static const uint64_t LISTENER = UINT64_MAX;

struct buffer {
    char *bytes;
    size_t len, room;
};

struct connection {
    uint64_t cookie;
    int fd;
    int closing; /* once the output is sent */
    uint32_t interest; /* what the set watches for */
    struct buffer in, out;
    struct connection *next;
};

static ws_service *service;
static int counters;
static int set;
static struct connection *connections[BUCKETS];

static void die(const char *what, const char *why) {
    fprintf(stderr, "c-counter: cannot %s: %s\n", what, why);
    exit(1);
}

/* For calls that fail only when the process cannot go on; the supervisor starts it again with its state. */
static int must(int result, const char *what) {
    if (result < 0)
        die(what, ws_error());
    return result;
}

static void append(struct buffer *to, const void *bytes, size_t len) {
    if (to->len + len > to->room) {
        to->room = (to->len + len) * 2;
        to->bytes = realloc(to->bytes, to->room);
        if (!to->bytes)
            die("answer", "no memory");
    }
    if (len > 0)
        memcpy(to->bytes + to->len, bytes, len);
    to->len += len;
}

static void drop_front(struct buffer *from, size_t len) {
    from->len -= len;
    if (len > 0 && from->len > 0)
        memmove(from->bytes, from->bytes + len, from->len);
}

/* ---- Connections ---- */

static struct connection *find(uint64_t cookie) {
    struct connection *at = connections[cookie % BUCKETS];
    while (at && at->cookie != cookie)
        at = at->next;
    return at;
}

static void watch(int operation, int fd, uint64_t who, uint32_t events) {
    struct epoll_event event = {.events = events, .data.u64 = who};
    if (epoll_ctl(set, operation, fd, &event) == -1)
        die("watch a socket", strerror(errno));
}

static void add(uint64_t cookie, int fd) {
    struct connection *new = calloc(1, sizeof *new);
    if (!new)
        die("keep a connection", "no memory");
    new->cookie = cookie;
    new->fd = fd;
    new->interest = EPOLLIN;
    new->next = connections[cookie % BUCKETS];
    connections[cookie % BUCKETS] = new;
    watch(EPOLL_CTL_ADD, fd, cookie, EPOLLIN);
}

static void forget(uint64_t cookie) {
    struct connection **at = &connections[cookie % BUCKETS];
    while (*at && (*at)->cookie != cookie)
        at = &(*at)->next;
    struct connection *gone = *at;
    if (!gone)
        return;
    *at = gone->next;
    /* Another process may have a duplicate, which would keep it in the set. */
    epoll_ctl(set, EPOLL_CTL_DEL, gone->fd, NULL);
    close(gone->fd);
    free(gone->in.bytes);
    free(gone->out.bytes);
    free(gone);
}

/* What moves with a connection: whether it is closing, the length of the input, the input, the output. */
static void give(struct connection *from) {
    if (!from->closing && from->in.len == 0 && from->out.len == 0)
        return;
    struct buffer carry = {0};
    uint32_t len = (uint32_t)from->in.len;
    unsigned char head[5] = {(unsigned char)from->closing, len & 255, len >> 8 & 255, len >> 16 & 255, len >> 24};
    append(&carry, head, sizeof head);
    append(&carry, from->in.bytes, from->in.len);
    append(&carry, from->out.bytes, from->out.len);
    must(ws_carry(service, from->cookie, carry.bytes, carry.len), "carry a connection over");
    free(carry.bytes);
    from->in.len = from->out.len = 0;
    from->closing = 0;
}

static void take(struct connection *to, const void *carry, size_t carry_len) {
    const unsigned char *head = carry;
    to->in.len = to->out.len = 0;
    to->closing = 0;
    if (carry_len == 0)
        return;
    size_t len = carry_len < 5 ? SIZE_MAX : head[1] | head[2] << 8 | head[3] << 16 | (uint32_t)head[4] << 24;
    if (carry_len < 5 || len > carry_len - 5) {
        /* Not from a program of this family. An end is better for the client than a mix of two answers. */
        to->closing = 1;
        return;
    }
    to->closing = head[0] != 0;
    append(&to->in, head + 5, len);
    append(&to->out, head + 5 + len, carry_len - 5 - len);
}

/* ---- Commands ---- */

static void answer(struct connection *to, const char *line, size_t len) {
    char text[160];
    int64_t value = 0;
    int failed = 0;
    if (len > 5 && memcmp(line, "INCR ", 5) == 0) {
        failed = ws_counter_add(service, counters, line + 5, len - 5, 1, &value);
        snprintf(text, sizeof text, "%" PRId64 "\n", value);
    } else if (len > 4 && memcmp(line, "GET ", 4) == 0) {
        failed = ws_counter_get(service, counters, line + 4, len - 4, &value);
        snprintf(text, sizeof text, "%" PRId64 "\n", value);
    } else if (len == 4 && memcmp(line, "INFO", 4) == 0) {
        snprintf(text, sizeof text,
                 "c-counter %s generation %" PRId64 " connections %" PRId64 " counters %" PRId64 " pid %d\n", VERSION,
                 ws_generation(service), ws_connections(service), ws_counter_count(service, counters), (int)getpid());
    } else {
        snprintf(text, sizeof text, "ERR known are INCR name, GET name and INFO\n");
    }
    if (failed < 0)
        snprintf(text, sizeof text, "ERR %s\n", ws_error());
    append(&to->out, text, strlen(text));
}

/* Answers every whole line in the input, as long as the client takes its answers. */
static void execute(struct connection *to) {
    size_t done = 0;
    char *end;
    while (to->out.len < OUTPUT_LEN_MAX && done < to->in.len &&
           (end = memchr(to->in.bytes + done, '\n', to->in.len - done)) != NULL) {
        char *line = to->in.bytes + done;
        size_t len = (size_t)(end - line);
        done += len + 1;
        answer(to, line, len > 0 && line[len - 1] == '\r' ? len - 1 : len);
    }
    drop_front(&to->in, done);
    if (to->in.len > LINE_LEN_MAX && to->out.len < OUTPUT_LEN_MAX) {
        append(&to->out, "ERR the line is too long\n", 25);
        to->in.len = 0;
        to->closing = 1;
    }
}

static void receive(struct connection *from) {
    char bytes[16 * 1024];
    if (from->closing || from->out.len >= OUTPUT_LEN_MAX)
        return;
    ssize_t got = recv(from->fd, bytes, sizeof bytes, MSG_DONTWAIT);
    if (got > 0)
        append(&from->in, bytes, (size_t)got);
    else if (got == 0 || (errno != EAGAIN && errno != EINTR))
        from->closing = 1; /* a client that closed its side only still gets its answers */
}

/* Sends what the socket takes. The connection may be gone afterwards. */
static void deliver(struct connection *to) {
    size_t sent = 0;
    int gone = 0;
    while (sent < to->out.len && !gone) {
        ssize_t put = send(to->fd, to->out.bytes + sent, to->out.len - sent, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (put >= 0)
            sent += (size_t)put;
        else if (errno == EAGAIN)
            break;
        else if (errno != EINTR)
            gone = 1;
    }
    drop_front(&to->out, sent);
    /* A whole line that waits was left because there was too much output. */
    int waits = to->out.len > 0 || (to->in.len > 0 && memchr(to->in.bytes, '\n', to->in.len));
    if (gone || (to->closing && !waits)) {
        uint64_t cookie = to->cookie;
        forget(cookie);
        must(ws_connection_closed(service, cookie), "report a closed connection");
        return;
    }
    int reads = !to->closing && to->out.len < OUTPUT_LEN_MAX;
    uint32_t interest = (waits ? EPOLLOUT : 0) | (reads ? EPOLLIN : 0);
    if (interest != to->interest) {
        watch(EPOLL_CTL_MOD, to->fd, to->cookie, interest);
        to->interest = interest;
    }
}

static void accept_from(int listener) {
    for (int count = 0; count < 64; count++) {
        int fd = accept4(ws_listener_fd(service, listener), NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0)
            return; /* nobody waits any more, or the one who did has gone */
        uint64_t cookie;
        must(ws_connection_opened(service, fd, listener, &cookie), "report a connection");
        add(cookie, fd);
    }
}

/* ---- Turns ---- */

/* Publishes what was executed; 1 when it may be answered. What is not published is never seen by a client. */
static int publish(void) {
    must(ws_commit(service), "publish the state");
    return must(ws_may_write(service), "look at the control word");
}

/* Everything that was left over, of every connection. */
static void settle(int executing) {
    for (int bucket = 0; executing && bucket < BUCKETS; bucket++)
        for (struct connection *at = connections[bucket]; at; at = at->next)
            execute(at);
    if (!publish())
        return; /* somebody else owns: the answers stay for ws_carry() */
    for (int bucket = 0; bucket < BUCKETS; bucket++)
        for (struct connection *at = connections[bucket], *next; at; at = next) {
            next = at->next;
            if (at->out.len > 0 || at->closing)
                deliver(at);
        }
}

static void turn(void) {
    struct epoll_event ready[READY_MAX];
    int count = epoll_wait(set, ready, READY_MAX, 0);
    for (int i = 0; i < count; i++) {
        uint64_t who = ready[i].data.u64;
        if (who > LISTENER - (uint64_t)ws_listeners(service)) {
            accept_from((int)(LISTENER - who));
            continue;
        }
        struct connection *at = find(who);
        if (!at)
            continue;
        receive(at);
        execute(at);
    }
    int may_answer = publish();
    for (int i = 0; i < count && may_answer; i++) {
        struct connection *at = find(ready[i].data.u64);
        if (at)
            deliver(at);
    }
    ws_maintain(service); /* fails only for lack of memory; the next change that needs some says so to its client */
}

/* What the supervisor wants. 1 when the process is to end. */
static int converse(void) {
    const ws_event *event;
    int result;
    while ((result = ws_poll(service, &event)) != 0) {
        if (result < 0) {
            /* It cannot be understood any more; the clients can. WS_CONTROL_LOST comes next. */
            fprintf(stderr, "c-counter: %s\n", ws_error());
            continue;
        }
        struct connection *at = find(event->cookie);
        switch (event->kind) {
        case WS_CONNECTION_ARRIVED:
            add(event->cookie, event->fd);
            take(find(event->cookie), event->carry, event->carry_len);
            break;
        case WS_CONNECTION_CARRY:
            if (at)
                take(at, event->carry, event->carry_len);
            break;
        case WS_CONNECTION_CLOSED:
            forget(event->cookie);
            break;
        case WS_BECOME_OWNER:
            must(ws_serving(service), "say that this process serves");
            settle(1);
            break;
        case WS_QUIESCE:
            settle(0);
            for (int bucket = 0; bucket < BUCKETS; bucket++)
                for (at = connections[bucket]; at; at = at->next)
                    give(at);
            must(ws_yielded(service), "yield");
            break;
        case WS_RETIRE:
            if (ws_is_owner(service))
                settle(0);
            must(ws_drained(service), "say good-bye");
            return 1;
        }
    }
    return 0;
}

int main(int argc, char **argv) {
    /* Process 1 of a container hears of no signal that it does not ask for. Before any thread begins. */
    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    sigprocmask(SIG_BLOCK, &ends, NULL);
    int signals = signalfd(-1, &ends, SFD_CLOEXEC);
    set = epoll_create1(EPOLL_CLOEXEC);

    service = ws_new(1);
    if (!service)
        die("prepare the state", ws_error());
    counters = must(ws_counters(service, "counters"), "declare the counters");
    must(ws_listen(service, "counter", argc > 1 ? argv[1] : "127.0.0.1:7000"), "listen");
    must(ws_join(service), "join the service");
    for (int i = 0; i < ws_listeners(service); i++)
        watch(EPOLL_CTL_ADD, ws_listener_fd(service, i), LISTENER - (uint64_t)i, EPOLLIN);
    must(ws_ready(service), "say that this process is ready");

    while (!converse()) {
        int owner = must(ws_is_owner(service), "tell who owns");
        /* poll(2) leaves out what is negative. */
        struct pollfd wait[] = {
            {.fd = signals, .events = POLLIN},
            {.fd = ws_control_fd(service), .events = POLLIN},
            {.fd = owner ? set : -1, .events = POLLIN},
        };
        if (poll(wait, 3, ws_wake_within_ms(service)) == -1 && errno != EINTR)
            die("wait", strerror(errno));
        if (wait[0].revents)
            break;
        if (owner)
            turn();
    }
    ws_close(&service);
    return 0;
}
