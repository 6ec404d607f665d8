/*
 * Calls libwarmswap in every way that the header allows, and in those that it refuses.
 *
 *     contract alone     no supervisor, an address of its own
 *     contract passed    a listener in LISTEN_FDS
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <warmswap.h>

#define CHECK(condition)                                                                            \
    do {                                                                                            \
        if (!(condition)) {                                                                         \
            fprintf(stderr, "line %d: %s (last error: %s)\n", __LINE__, #condition, ws_error());    \
            exit(1);                                                                                \
        }                                                                                           \
    } while (0)
/* Fails with this code, and says something that has this text in it. */
#define FAILS(call, code, text) CHECK((call) == (code) && strstr(ws_error(), text))
#define KEY(text) text, sizeof(text) - 1

static int null_is_refused(void) {
    const ws_event *event;
    const void *value;
    size_t len;
    uint64_t number;
    int64_t counter;
    ws_stats stats;
    ws_place place = {0};
    const int codes[] = {
        ws_close(NULL),
        ws_map(NULL, "a"),
        ws_counters(NULL, "a"),
        ws_log(NULL, "a"),
        ws_record(NULL, "a"),
        ws_listen(NULL, "a", "127.0.0.1:1"),
        ws_join(NULL),
        ws_listeners(NULL),
        ws_listener_fd(NULL, 0),
        ws_control_fd(NULL),
        ws_wake_within_ms(NULL),
        ws_poll(NULL, &event),
        ws_ready(NULL),
        ws_serving(NULL),
        ws_carry(NULL, 1, "a", 1),
        ws_yielded(NULL),
        ws_drained(NULL),
        ws_is_owner(NULL),
        ws_may_write(NULL),
        (int)ws_generation(NULL),
        ws_connection_opened(NULL, 0, 0, &number),
        ws_connection_closed(NULL, 1),
        (int)ws_connections(NULL),
        ws_commit(NULL),
        ws_maintain(NULL),
        ws_statistics(NULL, &stats, sizeof stats),
        ws_map_get(NULL, 0, KEY("a"), &value, &len),
        ws_map_put(NULL, 0, KEY("a"), KEY("a")),
        ws_map_remove(NULL, 0, KEY("a")),
        (int)ws_map_count(NULL, 0),
        ws_map_each(NULL, 0, NULL, NULL),
        ws_map_walk(NULL, 0, &place, 1, NULL, NULL),
        ws_counter_get(NULL, 0, KEY("a"), &counter),
        ws_counter_add(NULL, 0, KEY("a"), 1, NULL),
        ws_counter_set(NULL, 0, KEY("a"), 1),
        ws_counter_remove(NULL, 0, KEY("a")),
        (int)ws_counter_count(NULL, 0),
        ws_counter_each(NULL, 0, NULL, NULL),
        ws_log_append(NULL, 0, KEY("a"), NULL),
        ws_log_get(NULL, 0, 0, &value, &len),
        ws_log_range(NULL, 0, &number, &number),
        ws_log_trim(NULL, 0, 0),
        ws_record_get(NULL, 0, &value, &len),
        ws_record_set(NULL, 0, KEY("a")),
        ws_record_clear(NULL, 0),
    };
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
        if (codes[i] != WS_ERROR_ARGUMENT) {
            fprintf(stderr, "call %zu without a service returned %d\n", i, codes[i]);
            return 0;
        }
    CHECK(ws_listener_name(NULL, 0) == NULL);
    FAILS(ws_commit(NULL), WS_ERROR_ARGUMENT, "ws_commit: the service is NULL");
    return 1;
}

static void before_join(ws_service *service) {
    const ws_event *event;
    char name[300];
    memset(name, 'n', sizeof name);
    name[sizeof name - 1] = 0;
    FAILS(ws_map(service, NULL), WS_ERROR_ARGUMENT, "the name is NULL");
    FAILS(ws_map(service, "\xff"), WS_ERROR_ARGUMENT, "UTF-8");
    FAILS(ws_map(service, name), WS_ERROR_ARGUMENT, "longer than 255");
    FAILS(ws_listen(service, "web", "localhost"), WS_ERROR_ARGUMENT, "no address");
    FAILS(ws_listen(service, "web", NULL), WS_ERROR_ARGUMENT, "the address is NULL");
    FAILS(ws_commit(service), WS_ERROR_ORDER, "ws_join");
    FAILS(ws_poll(service, &event), WS_ERROR_ORDER, "ws_join");
    FAILS(ws_ready(service), WS_ERROR_ORDER, "ws_join");
    FAILS(ws_may_write(service), WS_ERROR_ORDER, "ws_join");
    CHECK(ws_listener_name(service, 0) == NULL);
}

static int stop_at_two(void *context, const void *key, size_t key_len, const void *value, size_t value_len) {
    (void)key, (void)key_len, (void)value, (void)value_len;
    return ++*(int *)context == 2;
}

struct inside {
    ws_service *service;
    int map, seen;
};

static int call_inside(void *context, const void *key, size_t key_len, const void *value, size_t value_len) {
    struct inside *inside = context;
    ws_service *copy = inside->service;
    (void)value, (void)value_len;
    FAILS(ws_map_remove(inside->service, inside->map, key, key_len), WS_ERROR_BUSY, "visitor");
    FAILS(ws_map_count(inside->service, inside->map), WS_ERROR_BUSY, "visitor");
    FAILS(ws_close(&copy), WS_ERROR_BUSY, "visitor");
    CHECK(copy == inside->service);
    inside->seen++;
    return 0;
}

static int sum(void *context, const void *name, size_t name_len, int64_t value) {
    (void)name, (void)name_len;
    *(int64_t *)context += value;
    return 0;
}

static void maps(ws_service *service, int map, int log) {
    const void *value;
    size_t len;
    CHECK(ws_map_get(service, map, KEY("absent"), &value, &len) == 0 && value == NULL && len == 0);
    CHECK(ws_map_put(service, map, KEY("a\0b"), KEY("\0\1\2")) == 0);
    CHECK(ws_map_put(service, map, KEY("a"), KEY("one")) == 0);
    CHECK(ws_map_put(service, map, KEY("a"), KEY("two!")) == 1);
    CHECK(ws_map_put(service, map, NULL, 0, NULL, 0) == 0);
    CHECK(ws_map_get(service, map, KEY("a"), &value, &len) == 1 && len == 4 && memcmp(value, "two!", 4) == 0);
    CHECK(ws_map_get(service, map, KEY("a\0b"), &value, &len) == 1 && len == 3 && memcmp(value, "\0\1\2", 3) == 0);
    CHECK(ws_map_get(service, map, NULL, 0, &value, &len) == 1 && len == 0);
    CHECK(ws_map_count(service, map) == 3);

    /* What is refused changes nothing. */
    static char large[5 << 20];
    FAILS(ws_map_put(service, map, KEY("a"), NULL, 3), WS_ERROR_ARGUMENT, "the value is NULL");
    FAILS(ws_map_put(service, map, NULL, 1, KEY("x")), WS_ERROR_ARGUMENT, "the key is NULL");
    FAILS(ws_map_put(service, map, KEY("a"), "x", SIZE_MAX), WS_ERROR_ARGUMENT, "longer than");
    FAILS(ws_map_put(service, map, "a", SIZE_MAX / 2, KEY("x")), WS_ERROR_ARGUMENT, "longer than");
    FAILS(ws_map_put(service, map, KEY("a"), large, sizeof large), WS_ERROR_ARGUMENT, "longer than");
    FAILS(ws_map_put(service, map, large, 70000, KEY("x")), WS_ERROR_ARGUMENT, "longer than");
    FAILS(ws_map_get(service, map, KEY("a"), NULL, &len), WS_ERROR_ARGUMENT, "NULL");
    FAILS(ws_map_get(service, map, KEY("a"), &value, NULL), WS_ERROR_ARGUMENT, "NULL");
    FAILS(ws_map_get(service, log, KEY("a"), &value, &len), WS_ERROR_ARGUMENT, "a log, not a map");
    FAILS(ws_map_get(service, -1, KEY("a"), &value, &len), WS_ERROR_ARGUMENT, "no collection -1");
    FAILS(ws_map_get(service, 99, KEY("a"), &value, &len), WS_ERROR_ARGUMENT, "no collection 99");
    FAILS(ws_map_each(service, map, NULL, NULL), WS_ERROR_ARGUMENT, "the visitor is NULL");
    CHECK(ws_map_get(service, map, KEY("a"), &value, &len) == 1 && len == 4 && ws_map_count(service, map) == 3);

    int seen = 0;
    CHECK(ws_map_each(service, map, stop_at_two, &seen) == 1 && seen == 2);
    struct inside inside = {service, map, 0};
    CHECK(ws_map_each(service, map, call_inside, &inside) == 0 && inside.seen == 3);
    ws_place place = {0};
    seen = 2;
    CHECK(ws_map_walk(service, map, &place, 1 << 20, stop_at_two, &seen) == 0 && seen == 2);
    CHECK(ws_commit(service) == 0);
    CHECK(ws_map_walk(service, map, &place, 1 << 20, stop_at_two, &seen) == 0 && seen == 5);
    FAILS(ws_map_walk(service, map, NULL, 1, stop_at_two, &seen), WS_ERROR_ARGUMENT, "NULL");
    CHECK(ws_map_remove(service, map, KEY("a")) == 1 && ws_map_remove(service, map, KEY("a")) == 0);
    CHECK(ws_map_count(service, map) == 2);
}

static void counters(ws_service *service, int counters) {
    int64_t value = -1, total = 0;
    CHECK(ws_counter_get(service, counters, KEY("n"), &value) == 0 && value == 0);
    CHECK(ws_counter_add(service, counters, KEY("n"), 5, &value) == 0 && value == 5);
    CHECK(ws_counter_add(service, counters, KEY("n"), -7, NULL) == 0);
    CHECK(ws_counter_get(service, counters, KEY("n"), &value) == 0 && value == -2);
    CHECK(ws_counter_set(service, counters, KEY("m"), INT64_MAX) == 0);
    FAILS(ws_counter_add(service, counters, KEY("m"), 1, &value), WS_ERROR_OVERFLOW, "64 bits");
    CHECK(ws_counter_get(service, counters, KEY("m"), &value) == 0 && value == INT64_MAX);
    FAILS(ws_counter_get(service, counters, KEY("m"), NULL), WS_ERROR_ARGUMENT, "NULL");
    CHECK(ws_counter_set(service, counters, KEY("m"), 44) == 0 && ws_counter_count(service, counters) == 2);
    CHECK(ws_counter_each(service, counters, sum, &total) == 0 && total == 42);
    CHECK(ws_counter_remove(service, counters, KEY("m")) == 1 && ws_counter_remove(service, counters, KEY("m")) == 0);
    CHECK(ws_counter_count(service, counters) == 1);
}

static void logs(ws_service *service, int log) {
    const void *value;
    size_t len;
    uint64_t first, next, number;
    CHECK(ws_log_range(service, log, &first, &next) == 0 && first == 0 && next == 0);
    for (uint64_t i = 0; i < 10; i++)
        CHECK(ws_log_append(service, log, &i, sizeof i, &number) == 0 && number == i);
    CHECK(ws_log_append(service, log, NULL, 0, NULL) == 0);
    CHECK(ws_log_trim(service, log, 7) == 0);
    CHECK(ws_log_range(service, log, &first, &next) == 0 && first == 7 && next == 11);
    CHECK(ws_log_get(service, log, 6, &value, &len) == 0 && value == NULL);
    CHECK(ws_log_get(service, log, 8, &value, &len) == 1 && len == sizeof number);
    memcpy(&number, value, sizeof number);
    CHECK(number == 8);
    CHECK(ws_log_get(service, log, 10, &value, &len) == 1 && len == 0);
    FAILS(ws_log_range(service, log, NULL, &next), WS_ERROR_ARGUMENT, "NULL");
}

static void records(ws_service *service, int record) {
    const void *value;
    size_t len;
    CHECK(ws_record_get(service, record, &value, &len) == 0);
    CHECK(ws_record_set(service, record, KEY("first")) == 0 && ws_record_set(service, record, KEY("second")) == 1);
    CHECK(ws_record_get(service, record, &value, &len) == 1 && len == 6 && memcmp(value, "second", 6) == 0);
    CHECK(ws_record_clear(service, record) == 1 && ws_record_clear(service, record) == 0);
}

static void connections(ws_service *service) {
    int pair[2], file = open("/dev/null", O_RDONLY);
    uint64_t cookie = 0, other = 0;
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0 && file >= 0);
    CHECK(ws_connection_opened(service, pair[0], 0, &cookie) == 0 && cookie != 0);
    CHECK(ws_connection_opened(service, pair[1], 0, &other) == 0 && other != cookie);
    CHECK(ws_connections(service) == 2);
    FAILS(ws_connection_opened(service, file, 0, &cookie), WS_ERROR_SYSTEM, "identify a socket");
    FAILS(ws_connection_opened(service, 12345, 0, &cookie), WS_ERROR_SYSTEM, "identify a socket");
    FAILS(ws_connection_opened(service, -1, 0, &cookie), WS_ERROR_ARGUMENT, "no descriptor");
    FAILS(ws_connection_opened(service, pair[0], 7, &cookie), WS_ERROR_ARGUMENT, "no listener 7");
    FAILS(ws_connection_opened(service, pair[0], -1, &cookie), WS_ERROR_ARGUMENT, "no listener -1");
    FAILS(ws_connection_opened(service, pair[0], 0, NULL), WS_ERROR_ARGUMENT, "NULL");
    CHECK(ws_connection_closed(service, cookie) == 0 && ws_connection_closed(service, 999999) == 0);
    CHECK(ws_connection_closed(service, other) == 0 && ws_connections(service) == 0);
    close(pair[0]), close(pair[1]), close(file);
}

static void statistics(ws_service *service, int map) {
    /* Overwritten until there is too much of it: maintenance frees what is dead. */
    static char value[4096];
    for (int i = 0; i < 40000; i++) {
        CHECK(ws_map_put(service, map, KEY("again"), value, sizeof value) >= 0);
        if (i % 64 == 0)
            CHECK(ws_commit(service) == 0 && ws_maintain(service) == 0);
    }
    struct {
        ws_stats known;
        uint64_t newer;
    } large = {.newer = 7};
    uint64_t small[2] = {7, 7};
    CHECK(ws_statistics(service, &large.known, sizeof large) == 0 && large.newer == 0);
    CHECK(large.known.records > 0 && large.known.segments > 0 && large.known.segments_retired > 0);
    CHECK(large.known.segment_bytes < (uint64_t)40000 * sizeof value);
    CHECK(ws_statistics(service, (ws_stats *)small, sizeof *small) == 0);
    CHECK(small[0] == large.known.records && small[1] == 7);
    FAILS(ws_statistics(service, NULL, sizeof large), WS_ERROR_ARGUMENT, "NULL");
}

struct adder {
    ws_service *service;
    int counters, added, refused;
};

static void *add(void *context) {
    struct adder *adder = context;
    CHECK(*ws_error() == 0); /* of this thread */
    for (int i = 0; i < 100000; i++) {
        int result = ws_counter_add(adder->service, adder->counters, KEY("threads"), 1, NULL);
        CHECK(result == 0 || result == WS_ERROR_BUSY);
        *(result == 0 ? &adder->added : &adder->refused) += 1;
    }
    return NULL;
}

static void threads(ws_service *service, int counters) {
    struct adder adders[2] = {{service, counters, 0, 0}, {service, counters, 0, 0}};
    pthread_t running[2];
    int64_t value;
    FAILS(ws_map(service, "late"), WS_ERROR_ORDER, "before");
    for (int i = 0; i < 2; i++)
        CHECK(pthread_create(&running[i], NULL, add, &adders[i]) == 0);
    for (int i = 0; i < 2; i++)
        CHECK(pthread_join(running[i], NULL) == 0);
    CHECK(strstr(ws_error(), "ws_map")); /* no other thread's */
    CHECK(ws_counter_get(service, counters, KEY("threads"), &value) == 0);
    CHECK(value == adders[0].added + adders[1].added && value > 0);
}

static void alone(void) {
    CHECK(*ws_error() == 0);
    CHECK(strcmp(ws_version(), WS_VERSION) == 0);
    CHECK(ws_is_supervised() == 0);
    CHECK(null_is_refused());
    ws_service *service = ws_new(1);
    CHECK(service);
    before_join(service);
    int map = ws_map(service, "map"), log = ws_log(service, "log"), record = ws_record(service, "record");
    int numbers = ws_counters(service, "counters");
    CHECK(map == 0 && log == 1 && record == 2 && numbers == 3);
    FAILS(ws_counters(service, "map"), WS_ERROR_ARGUMENT, "declared twice");
    FAILS(ws_map_put(service, map, KEY("a"), KEY("b")), WS_ERROR_NOT_OWNER, "owner");
    CHECK(ws_listen(service, "web", "127.0.0.1:0") == 0 && ws_listen(service, "admin", "[::1]:0") == 0);
    CHECK(ws_join(service) == 0);

    FAILS(ws_join(service), WS_ERROR_ORDER, "has joined");
    FAILS(ws_log(service, "more"), WS_ERROR_ORDER, "before the state arrives");
    FAILS(ws_listen(service, "more", "127.0.0.1:0"), WS_ERROR_ORDER, "before ws_join");
    FAILS(ws_carry(service, 1, "a", 1), WS_ERROR_ORDER, "nobody asked");
    FAILS(ws_carry(service, 1, "a", SIZE_MAX), WS_ERROR_ARGUMENT, "longer than");
    FAILS(ws_yielded(service), WS_ERROR_ORDER, "nobody asked");
    CHECK(ws_listeners(service) == 2 && ws_listener_fd(service, 1) >= 0);
    CHECK(fcntl(ws_listener_fd(service, 0), F_GETFL) & O_NONBLOCK);
    CHECK(strcmp(ws_listener_name(service, 0), "web") == 0 && strcmp(ws_listener_name(service, 1), "admin") == 0);
    FAILS(ws_listener_fd(service, 2), WS_ERROR_ARGUMENT, "no listener 2");
    CHECK(ws_listener_name(service, -1) == NULL);

    const ws_event *event = NULL;
    FAILS(ws_poll(service, NULL), WS_ERROR_ARGUMENT, "NULL");
    CHECK(ws_poll(service, &event) == 1 && event && event->kind == WS_BECOME_OWNER && event->fd == -1);
    CHECK(event->carry_len == 0 && event->listener && *event->listener == 0);
    CHECK(ws_poll(service, &event) == 0 && event == NULL);
    CHECK(ws_serving(service) == 0 && ws_ready(service) == 0);
    CHECK(ws_is_owner(service) == 1 && ws_may_write(service) == 1 && ws_generation(service) == 0);
    CHECK(ws_control_fd(service) == -1 && ws_wake_within_ms(service) == -1);

    maps(service, map, log);
    counters(service, numbers);
    logs(service, log);
    records(service, record);
    connections(service);
    CHECK(ws_commit(service) == 0);
    threads(service, numbers);
    statistics(service, map);
    CHECK(ws_drained(service) == 0);

    CHECK(ws_close(&service) == 0 && service == NULL);
    CHECK(ws_close(&service) == 0);
    FAILS(ws_commit(service), WS_ERROR_ARGUMENT, "NULL");
}

/* Descriptors are taken from the environment once. */
static void passed(void) {
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(bind(listener, (struct sockaddr *)&any, sizeof any) == 0 && listen(listener, 1) == 0);
    if (listener != 3)
        CHECK(dup2(listener, 3) == 3 && close(listener) == 0);
    CHECK(setenv("LISTEN_FDS", "1", 1) == 0 && setenv("LISTEN_FDNAMES", "passed", 1) == 0);

    /* Not for us. */
    CHECK(setenv("LISTEN_PID", "1", 1) == 0);
    ws_service *other = ws_new(1);
    CHECK(ws_join(other) == 0 && ws_listeners(other) == 0 && ws_close(&other) == 0);

    CHECK(unsetenv("LISTEN_PID") == 0);
    ws_service *first = ws_new(1), *second = ws_new(1);
    CHECK(ws_listen(first, "unused", "127.0.0.1:0") == 0);
    CHECK(ws_join(first) == 0 && ws_listeners(first) == 1 && ws_listener_fd(first, 0) == 3);
    CHECK(strcmp(ws_listener_name(first, 0), "passed") == 0);
    FAILS(ws_join(second), WS_ERROR_ORDER, "another service");
    CHECK(ws_close(&first) == 0 && ws_close(&second) == 0 && fcntl(3, F_GETFD) == -1);

    /* An address that cannot be had ends the attempt, and the service with it. */
    CHECK(unsetenv("LISTEN_FDS") == 0);
    ws_service *third = ws_new(1);
    CHECK(ws_listen(third, "far", "192.0.2.1:80") == 0);
    FAILS(ws_join(third), WS_ERROR_SYSTEM, "cannot listen on 192.0.2.1:80");
    FAILS(ws_join(third), WS_ERROR_ORDER, "close it");
    FAILS(ws_commit(third), WS_ERROR_ORDER, "close it");
    CHECK(ws_close(&third) == 0);
}

int main(int argc, char **argv) {
    const char *part = argc > 1 ? argv[1] : "";
    if (strcmp(part, "alone") == 0)
        alone();
    else if (strcmp(part, "passed") == 0)
        passed();
    else
        return 2;
    printf("%s: as the header says\n", part);
    return 0;
}
