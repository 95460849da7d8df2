/* What the mock fleet and the load client share: sockets, the clock, and finding things in HTTP heads. */
#ifndef WIRE_H
#define WIRE_H

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define LENGTH(array) ((int)(sizeof(array) / sizeof((array)[0])))

/* A token's event starts its text with the time at which the worker wrote it: STAMP_DIGITS digits of nanoseconds. */
#define STAMP_MARK "\"text\":\""
#define STAMP_DIGITS 19

static inline void die(const char *what) {
    perror(what);
    exit(1);
}

static inline int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static inline struct sockaddr_in loopback(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

static inline void no_delay(int fd) {
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

/* Waits for events, to the nanosecond; a negative wait waits for ever. */
static inline int wait_events(int epoll, struct epoll_event *events, int most, int64_t wait_ns) {
    struct timespec t = {.tv_sec = wait_ns / 1000000000LL, .tv_nsec = wait_ns % 1000000000LL};
    int count = epoll_pwait2(epoll, events, most, wait_ns < 0 ? NULL : &t, NULL);
    if (count < 0 && errno != EINTR) die("epoll_pwait2");
    return count;
}

/* The value of a header in a head that ends with an empty line, or NULL. `name` starts with \n and ends with a colon. */
static inline const char *header(const char *head, const char *name) {
    const char *found = strcasestr(head, name);
    if (!found) return NULL;
    found += strlen(name);
    return found + strspn(found, " ");
}

/* A whole file, ended by a zero byte. */
static inline char *read_file(const char *path, size_t *length) {
    FILE *file = fopen(path, "rb");
    struct stat status;
    if (!file || fstat(fileno(file), &status)) die(path);
    char *data = malloc((size_t)status.st_size + 1);
    *length = fread(data, 1, (size_t)status.st_size, file);
    data[*length] = 0;
    fclose(file);
    return data;
}

/* Splits a file of lines in place; returns how many there are. */
static inline int split_lines(char *data, char **lines, int most) {
    int count = 0;
    for (char *rest = data, *line; count < most && (line = strsep(&rest, "\n"));)
        if (*line) lines[count++] = line;
    return count;
}

#endif
