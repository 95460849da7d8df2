/* A load client: one epoll loop, one JSON object on standard output at the end.

   load_client requests PORTS CONNECTIONS SECONDS BODIES          a closed loop of kept connections
   load_client streams  PORTS STREAMS SECONDS RAMP_SECONDS BODIES one stream a connection, all running in the window

   PORTS is a first and a last port, FIRST-LAST; connections take them in turn. BODIES holds one request body a line,
   taken in turn. The window begins when every connection has had its first token (streams) or answer (requests), and
   lasts SECONDS; at its begin and its end the line "window" is printed, so that others can look at their clocks too. */
#include "wire.h"

#define MAX_EVENTS 512
#define MAX_BODIES 4096
#define IN_BYTES (64 * 1024)
#define WARM_ANSWERS 20

enum part { HEAD, COUNTED, CHUNK_SIZE, CHUNK, CHUNK_END, TRAILER };

struct connection {
    int fd;
    enum part part;
    bool chunked, done;
    size_t left, line_bytes;
    int64_t sent_ns, first_ns, last_ns, last_stamp_ns;
    int answers;
    char line[16 * 1024]; /* the head, a chunk's size, or an event, as far as it has come */
};

struct values {
    double *at;
    size_t count, room;
};

static int epoll, connection_count, port_first, port_last, body_count, next_body, started, ready_count;
static bool streams;
static char *bodies[MAX_BODIES];
static struct connection *connections;
static bool in_window;
static int64_t window_begin_ns, window_end_ns;
static struct { long answers, tokens, errors, bytes; } seen;
static struct values latency_ms, first_token_ms, transit_ms, added_gap_ms;

static void add(struct values *values, double value) {
    if (values->count == values->room) {
        values->room = values->room ? 2 * values->room : 4096;
        values->at = realloc(values->at, values->room * sizeof *values->at);
    }
    values->at[values->count++] = value;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double quantile(struct values *values, double share) {
    return values->count ? values->at[(size_t)(share * (double)(values->count - 1))] : 0;
}

static void print_quantiles(const char *name, struct values *values) {
    qsort(values->at, values->count, sizeof *values->at, ascending);
    printf(", \"%s_p50\": %.4f, \"%s_p99\": %.4f", name, quantile(values, 0.5), name, quantile(values, 0.99));
}

static void fail(struct connection *c, const char *why) {
    seen.errors++;
    if (seen.errors <= 3) fprintf(stderr, "load_client: %s: %.200s\n", why, c->line);
    close(c->fd);
    c->fd = -1;
    c->done = true;
}

static void send_request(struct connection *c) {
    char request[IN_BYTES];
    const char *body = bodies[next_body];
    next_body = (next_body + 1) % body_count;
    int length = snprintf(request, sizeof request,
                          "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer bench-key\r\n"
                          "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s", strlen(body), body);
    c->part = HEAD;
    c->line_bytes = 0;
    c->first_ns = 0;
    c->sent_ns = now_ns();
    if (write(c->fd, request, (size_t)length) != length) fail(c, "the request could not be written at once");
}

static void open_connection(struct connection *c) {
    struct sockaddr_in address = loopback(port_first + started++ % (port_last - port_first + 1));
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&address, sizeof address)) die("connect");
    no_delay(c->fd);
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event)) die("epoll_ctl");
    send_request(c);
}

static void on_event(struct connection *c, int64_t now) {
    const char *text = strstr(c->line, STAMP_MARK);
    if (!text) return;
    int64_t stamp_ns = strtoll(text + strlen(STAMP_MARK), NULL, 10);
    bool first = c->first_ns == 0;
    if (first) {
        c->first_ns = now;
        ready_count += streams;
        if (streams || in_window) add(&first_token_ms, (double)(now - c->sent_ns) / 1e6);
    }
    if (in_window) {
        seen.tokens++;
        add(&transit_ms, (double)(now - stamp_ns) / 1e6);
        if (!first) add(&added_gap_ms, (double)((now - c->last_ns) - (stamp_ns - c->last_stamp_ns)) / 1e6);
    }
    c->last_ns = now;
    c->last_stamp_ns = stamp_ns;
}

static void on_answer(struct connection *c, int64_t now) {
    if (streams) {
        c->done = true;
        close(c->fd);
        c->fd = -1;
        return;
    }
    if (++c->answers == WARM_ANSWERS) ready_count++;
    if (in_window) {
        seen.answers++;
        add(&latency_ms, (double)(now - c->sent_ns) / 1e6);
    }
    if (window_end_ns) c->done = true; else send_request(c);
}

static void on_head(struct connection *c) {
    c->line[c->line_bytes] = 0;
    if (strncmp(c->line + strcspn(c->line, " "), " 200", 4)) {
        fail(c, "an answer that is not 200");
        return;
    }
    const char *length = header(c->line, "\ncontent-length:");
    c->chunked = !length;
    c->left = length ? (size_t)atol(length) : 0;
    c->part = c->chunked ? CHUNK_SIZE : COUNTED;
    c->line_bytes = 0;
}

/* One byte of a line, kept; true when it ends with `end`. */
static bool line_ends(struct connection *c, char byte, const char *end) {
    size_t length = strlen(end);
    if (c->line_bytes + 1 >= sizeof c->line) c->line_bytes = 0;
    c->line[c->line_bytes++] = byte;
    c->line[c->line_bytes] = 0;
    return c->line_bytes >= length && !memcmp(c->line + c->line_bytes - length, end, length);
}

/* A piece of a chunk's data. Events may be cut anywhere, chunk ends included. */
static void on_data(struct connection *c, const char *data, size_t length, int64_t now) {
    for (const char *end = data + length; data < end;) {
        const char *newline = memchr(data, '\n', (size_t)(end - data));
        size_t piece = (size_t)((newline ? newline + 1 : end) - data);
        if (c->line_bytes + piece >= sizeof c->line) c->line_bytes = 0;
        memcpy(c->line + c->line_bytes, data, piece);
        c->line_bytes += piece;
        c->line[c->line_bytes] = 0;
        data += piece;
        if (newline && c->line_bytes >= 2 && c->line[c->line_bytes - 2] == '\n') {
            on_event(c, now);
            c->line_bytes = 0;
        }
    }
}

static void take(struct connection *c, const char *data, size_t length, int64_t now) {
    static char size_line[16];
    for (size_t at = 0; at < length && c->fd >= 0 && !c->done;) {
        size_t piece;
        switch (c->part) {
        case HEAD:
            if (line_ends(c, data[at++], "\r\n\r\n")) on_head(c);
            break;
        case COUNTED:
            piece = length - at < c->left ? length - at : c->left;
            at += piece;
            c->left -= piece;
            if (!c->left) on_answer(c, now);
            break;
        case CHUNK_SIZE: /* `left` gathers the size */
            if (data[at] == '\n') {
                c->part = c->left ? CHUNK : TRAILER;
            } else if (data[at] != '\r') {
                size_line[0] = data[at];
                c->left = 16 * c->left + strtoul(size_line, NULL, 16);
            }
            at++;
            break;
        case CHUNK:
            piece = length - at < c->left ? length - at : c->left;
            on_data(c, data + at, piece, now);
            at += piece;
            c->left -= piece;
            if (!c->left) c->part = CHUNK_END;
            break;
        case CHUNK_END:
            if (data[at++] == '\n') c->part = CHUNK_SIZE;
            break;
        case TRAILER:
            if (data[at++] == '\n') on_answer(c, now);
            break;
        }
    }
}

static void receive(struct connection *c) {
    static char data[IN_BYTES];
    ssize_t got = read(c->fd, data, sizeof data);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        fail(c, "the connection closed before the end of the answer");
        return;
    }
    if (in_window) seen.bytes += got;
    take(c, data, (size_t)got, now_ns());
}

static void begin_or_end_window(int64_t window_ns) {
    int64_t now = now_ns();
    if (!in_window && !window_end_ns && ready_count >= connection_count) {
        in_window = true;
        window_begin_ns = now;
    } else if (in_window && now >= window_begin_ns + window_ns) {
        in_window = false;
        window_end_ns = now;
    } else {
        return;
    }
    puts("window");
    fflush(stdout);
}

static bool all_done(void) {
    for (int i = 0; i < connection_count; i++)
        if (!connections[i].done) return false;
    return true;
}

static void run(int64_t window_ns, int64_t ramp_ns) {
    int64_t begin_ns = now_ns();
    struct epoll_event events[MAX_EVENTS];
    while (started < connection_count || !window_end_ns || !all_done()) {
        int64_t next_ns = begin_ns + ramp_ns * started / connection_count;
        while (started < connection_count && next_ns <= now_ns()) {
            open_connection(&connections[started]);
            next_ns = begin_ns + ramp_ns * started / connection_count;
        }
        int count = wait_events(epoll, events, MAX_EVENTS, started < connection_count ? 200000 : 10000000);
        for (int i = 0; i < count; i++)
            if (!((struct connection *)events[i].data.ptr)->done) receive(events[i].data.ptr);
        begin_or_end_window(window_ns);
        if (seen.errors && all_done()) break;
        if (seen.errors > connection_count / 2) break;
    }
}

int main(int argc, char **argv) {
    streams = argc == 7 && !strcmp(argv[1], "streams");
    if (argc < 6 || (!streams && strcmp(argv[1], "requests")) || sscanf(argv[2], "%d-%d", &port_first, &port_last) != 2) {
        fprintf(stderr, "usage: load_client requests FIRST-LAST CONNECTIONS SECONDS BODIES\n"
                        "       load_client streams FIRST-LAST STREAMS SECONDS RAMP_SECONDS BODIES\n");
        return 2;
    }
    connection_count = atoi(argv[3]);
    connections = calloc((size_t)connection_count, sizeof *connections);
    size_t length;
    body_count = split_lines(read_file(argv[argc - 1], &length), bodies, MAX_BODIES);
    signal(SIGPIPE, SIG_IGN);
    epoll = epoll_create1(0);
    run((int64_t)(atof(argv[4]) * 1e9), streams ? (int64_t)(atof(argv[5]) * 1e9) : 0);
    printf("{\"seconds\": %.6f, \"answers\": %ld, \"tokens\": %ld, \"errors\": %ld, \"bytes\": %ld",
           (double)(window_end_ns - window_begin_ns) / 1e9, seen.answers, seen.tokens, seen.errors, seen.bytes);
    print_quantiles("latency_ms", &latency_ms);
    print_quantiles("first_token_ms", &first_token_ms);
    print_quantiles("transit_ms", &transit_ms);
    print_quantiles("added_gap_ms", &added_gap_ms);
    puts("}");
    return seen.errors > 0;
}
