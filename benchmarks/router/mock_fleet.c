/* A fleet of mock prefill and decode workers: one process, one port a worker, one epoll loop.

   mock_fleet FIRST_PORT PREFILL DECODE TOKENS_PER_S HANDOFFS

   Ports FIRST_PORT.. are the prefill workers, the ports after them the decode workers. HANDOFFS holds one prefill
   answer (a JSON object) a line; they are given out in turn. A decode worker answers `"stream":true` with max_tokens
   events, the first at once and one every 1/TOKENS_PER_S after it, each a chunk and a write of its own, as vLLM does.
   SIGTERM prints what was served as JSON and ends. */
#include "wire.h"

#include <stddef.h>

#define MAX_EVENTS 512
#define MAX_HANDOFFS 4096
#define IN_BYTES (64 * 1024)

enum role { LISTEN_PREFILL, LISTEN_DECODE, PREFILL, DECODE };

struct connection {
    enum role role;
    int fd;
    bool open, streaming, behind;
    size_t in_bytes, out_bytes, out_sent, out_room;
    int tokens_left;
    int64_t due_ns;
    struct connection *next_due;
    char *out;
    char in[IN_BYTES];
};

static const char EVENT[] =
    "data: {\"id\":\"cmpl-0123456789abcdef0123456789abcdef\",\"object\":\"text_completion\",\"created\":1790000000,"
    "\"model\":\"mock\",\"choices\":[{\"index\":0," STAMP_MARK "%019lld token\",\"logprobs\":null,"
    "\"finish_reason\":null,\"stop_reason\":null}],\"usage\":null}\n\n";
static const char STREAM_HEAD[] =
    "HTTP/1.1 200 OK\r\ndate: Sat, 21 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
    "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
static const char STREAM_END[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
static const char WHOLE[] =
    "{\"id\":\"cmpl-0123456789abcdef0123456789abcdef\",\"object\":\"text_completion\",\"created\":1790000000,"
    "\"model\":\"mock\",\"choices\":[{\"index\":0,\"text\":\" token\",\"logprobs\":null,\"finish_reason\":\"length\","
    "\"stop_reason\":null}],\"usage\":{\"prompt_tokens\":500,\"completion_tokens\":1,\"total_tokens\":501},"
    "\"kv_transfer_params\":null}";
static const char MODELS[] =
    "{\"object\":\"list\",\"data\":[{\"id\":\"mock\",\"object\":\"model\",\"owned_by\":\"mock\",\"max_model_len\":8192}]}";
/* What sglang-router asks a worker about itself. */
static const char INFO[] = "{\"model_path\":\"mock\",\"served_model_name\":\"mock\",\"is_generation\":true,\"dp_size\":1}";

static int epoll;
static int64_t gap_ns;
static char *handoffs[MAX_HANDOFFS];
static int handoff_count, next_handoff;
static struct connection *first_due, *last_due;
static volatile sig_atomic_t stopping;
static struct { long prefills, decodes, decodes_with_handoff, tokens; int64_t late_ns; } served;

static void on_signal(int number) {
    (void)number;
    stopping = 1;
}

static void watch(struct connection *connection, uint32_t events, int operation) {
    struct epoll_event event = {.events = events, .data.ptr = connection};
    if (epoll_ctl(epoll, operation, connection->fd, &event)) die("epoll_ctl");
}

static void flush(struct connection *c) {
    if (!c->open) return;
    while (c->out_sent < c->out_bytes) {
        ssize_t sent = write(c->fd, c->out + c->out_sent, c->out_bytes - c->out_sent);
        if (sent < 0) {
            if (errno != EAGAIN) c->open = false;
            else if (!c->behind) watch(c, EPOLLIN | EPOLLOUT | EPOLLRDHUP, EPOLL_CTL_MOD);
            c->behind = true;
            return;
        }
        c->out_sent += (size_t)sent;
    }
    if (c->behind) watch(c, EPOLLIN | EPOLLRDHUP, EPOLL_CTL_MOD);
    c->behind = false;
    c->out_bytes = c->out_sent = 0;
}

static void put(struct connection *c, const char *data, size_t length) {
    if (c->out_bytes + length > c->out_room) {
        c->out_room = 2 * (c->out_bytes + length);
        c->out = realloc(c->out, c->out_room);
    }
    memcpy(c->out + c->out_bytes, data, length);
    c->out_bytes += length;
}

static void answer(struct connection *c, const char *body) {
    char head[256];
    int length = snprintf(head, sizeof head,
                          "HTTP/1.1 200 OK\r\ndate: Sat, 21 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
                          "content-length: %zu\r\ncontent-type: application/json\r\n\r\n", strlen(body));
    put(c, head, (size_t)length);
    put(c, body, strlen(body));
    flush(c);
}

static void put_token(struct connection *c) {
    char event[512], head[16];
    int length = snprintf(event, sizeof event, EVENT, (long long)now_ns());
    put(c, head, (size_t)snprintf(head, sizeof head, "%x\r\n", (unsigned)length));
    put(c, event, (size_t)length);
    put(c, "\r\n", 2);
    served.tokens++;
    c->tokens_left--;
}

/* All streams have the same gap, so that a queue keeps them in the order in which they are due. */
static void queue_due(struct connection *c) {
    c->next_due = NULL;
    if (last_due) last_due->next_due = c; else first_due = c;
    last_due = c;
}

static void end_stream(struct connection *c) {
    put(c, STREAM_END, sizeof STREAM_END - 1);
    c->streaming = false;
    flush(c);
}

static void begin_stream(struct connection *c, int tokens) {
    put(c, STREAM_HEAD, sizeof STREAM_HEAD - 1);
    flush(c);
    c->tokens_left = tokens;
    c->due_ns = now_ns() + gap_ns;
    c->streaming = true;
    put_token(c);
    flush(c);
    if (c->tokens_left > 0) queue_due(c); else end_stream(c);
}

static void release(struct connection *c) {
    close(c->fd);
    free(c->out);
    free(c);
}

static void send_due(void) {
    int64_t now = now_ns();
    while (first_due && first_due->due_ns <= now) {
        struct connection *c = first_due;
        first_due = c->next_due;
        if (!first_due) last_due = NULL;
        if (!c->open) {
            release(c);
            continue;
        }
        served.late_ns += now - c->due_ns;
        put_token(c);
        flush(c);
        c->due_ns += gap_ns;
        if (c->tokens_left > 0) queue_due(c); else end_stream(c);
    }
}

static void generate(struct connection *c, const char *body) {
    bool streams = strstr(body, "\"stream\":true");
    if (c->role == PREFILL) {
        served.prefills++;
        if (strstr(body, "\"do_remote_decode\":true")) {
            answer(c, handoffs[next_handoff]);
            next_handoff = (next_handoff + 1) % handoff_count;
        } else if (streams) {
            begin_stream(c, 1);
        } else {
            answer(c, WHOLE);
        }
        return;
    }
    served.decodes++;
    served.decodes_with_handoff += strstr(body, "\"do_remote_prefill\":true") || strstr(body, "\"bootstrap_room\"");
    const char *limit = strstr(body, "\"max_tokens\":");
    int tokens = limit ? atoi(limit + strlen("\"max_tokens\":")) : 16;
    if (streams) begin_stream(c, tokens); else answer(c, WHOLE);
}

/* Answers every complete request in `in`; false if the connection is to be closed. */
static bool take_requests(struct connection *c) {
    for (;;) {
        c->in[c->in_bytes] = 0;
        char *end = strstr(c->in, "\r\n\r\n");
        if (!end) return c->in_bytes < IN_BYTES - 1;
        size_t head_bytes = (size_t)(end + 4 - c->in);
        end[3] = 0;
        const char *length = header(c->in, "\ncontent-length:");
        size_t body_bytes = length ? (size_t)atol(length) : 0;
        bool chunked = header(c->in, "\ntransfer-encoding:") != NULL;
        end[3] = '\n';
        if (chunked) { /* from a gateway; nobody here minds the sizes within the body */
            char *last = strstr(end + 2, "\r\n0\r\n\r\n");
            if (!last) return c->in_bytes < IN_BYTES - 1;
            body_bytes = (size_t)(last + 7 - c->in) - head_bytes;
        }
        if (head_bytes + body_bytes >= IN_BYTES) return false;
        if (c->in_bytes < head_bytes + body_bytes) return true;
        char *body = c->in + head_bytes, after = body[body_bytes];
        body[body_bytes] = 0;
        if (!strncmp(c->in, "POST", 4)) generate(c, body);
        else if (strstr(c->in, " /v1/models")) answer(c, MODELS);
        else answer(c, INFO);
        body[body_bytes] = after;
        c->in_bytes -= head_bytes + body_bytes;
        memmove(c->in, body + body_bytes, c->in_bytes);
    }
}

static void close_connection(struct connection *c) {
    epoll_ctl(epoll, EPOLL_CTL_DEL, c->fd, NULL);
    c->open = false;
    if (!c->streaming) release(c); /* else when its next token is due */
}

static void receive(struct connection *c) {
    ssize_t got = read(c->fd, c->in + c->in_bytes, IN_BYTES - 1 - c->in_bytes);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        close_connection(c);
        return;
    }
    c->in_bytes += (size_t)got;
    if (!take_requests(c)) close_connection(c);
}

static void accept_all(struct connection *listener) {
    int fd;
    while ((fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        no_delay(fd);
        struct connection *c = malloc(sizeof *c);
        memset(c, 0, offsetof(struct connection, in));
        c->role = listener->role == LISTEN_PREFILL ? PREFILL : DECODE;
        c->fd = fd;
        c->open = true;
        watch(c, EPOLLIN | EPOLLRDHUP, EPOLL_CTL_ADD);
    }
}

static void listen_on(int port, enum role role) {
    struct connection *listener = calloc(1, sizeof *listener);
    struct sockaddr_in address = loopback(port);
    int on = 1;
    listener->role = role;
    listener->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(listener->fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener->fd, (struct sockaddr *)&address, sizeof address) || listen(listener->fd, 4096)) die("listen");
    watch(listener, EPOLLIN, EPOLL_CTL_ADD);
}

int main(int argc, char **argv) {
    if (argc != 6) {
        fprintf(stderr, "usage: mock_fleet FIRST_PORT PREFILL DECODE TOKENS_PER_S HANDOFFS\n");
        return 2;
    }
    int first_port = atoi(argv[1]), prefill = atoi(argv[2]), decode = atoi(argv[3]);
    gap_ns = (int64_t)(1e9 / atof(argv[4]));
    size_t length;
    handoff_count = split_lines(read_file(argv[5], &length), handoffs, MAX_HANDOFFS);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGTERM, on_signal);
    epoll = epoll_create1(0);
    for (int worker = 0; worker < prefill + decode; worker++)
        listen_on(first_port + worker, worker < prefill ? LISTEN_PREFILL : LISTEN_DECODE);
    puts("ready");
    fflush(stdout);
    struct epoll_event events[MAX_EVENTS];
    while (!stopping) {
        int64_t wait_ns = -1;
        if (first_due) {
            wait_ns = first_due->due_ns - now_ns();
            if (wait_ns < 0) wait_ns = 0;
        }
        int count = wait_events(epoll, events, MAX_EVENTS, wait_ns);
        for (int i = 0; i < count; i++) {
            struct connection *c = events[i].data.ptr;
            if (c->role <= LISTEN_DECODE) accept_all(c);
            else if (events[i].events & EPOLLIN) receive(c);
            else if (events[i].events & (EPOLLHUP | EPOLLERR | EPOLLRDHUP)) close_connection(c);
            else flush(c);
        }
        send_due();
    }
    printf("{\"prefills\": %ld, \"decodes\": %ld, \"decodes_with_handoff\": %ld, \"tokens\": %ld, "
           "\"mean_late_us\": %.1f}\n", served.prefills, served.decodes, served.decodes_with_handoff, served.tokens,
           served.tokens ? (double)served.late_ns / 1e3 / (double)served.tokens : 0.0);
    return 0;
}
