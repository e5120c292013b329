/*
 * order_gate.c - ask the kill switch before an order, from any compiled language: HTTP/1.1 over its Unix socket.
 *
 * Use: order_gate SOCKET [--cancel]      exit code 0 sent, 3 blocked
 *
 * C11 and POSIX, no library. For microseconds use state_page.h instead; for a kept connection read Content-Length bytes
 * of body after the headers and ask again on the same socket.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define TIMEOUT_MS 250 /* for all of it: connecting, asking, and the whole answer however slowly it drips */
#define MOST_ANSWER 8192

static long long now_ms(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (long long)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Wait until the socket is ready for `events`; false when the time is over. */
static bool ready(int fd, short events, long long deadline)
{
    for (;;) {
        long long left = deadline - now_ms();
        if (left <= 0)
            return false;
        struct pollfd waiting = {.fd = fd, .events = events};
        int found = poll(&waiting, 1, (int)left);
        if (found > 0)
            return true;
        if (found == 0 || errno != EINTR)
            return false;
    }
}

/* Connect without blocking; -1 when the sidecar is not there. */
static int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        return -1;
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0)
        return -1;
    /* A full backlog is EAGAIN, which is an answer in no time, and so a denial. */
    if (fcntl(fd, F_SETFL, O_NONBLOCK) != 0 || fcntl(fd, F_SETFD, FD_CLOEXEC) != 0 ||
        connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
        (void)close(fd);
        return -1;
    }
    return fd;
}

/* Send the question and read until the end of the headers; false when that is not all there in time. */
static bool exchange(int fd, char *answer, long long deadline)
{
    static const char question[] = "GET /gate HTTP/1.1\r\nHost: localhost\r\nX-Order-Intent: new\r\nConnection: close\r\n\r\n";
    for (size_t sent = 0; sent < sizeof question - 1;) {
        if (!ready(fd, POLLOUT, deadline))
            return false;
        ssize_t count = send(fd, question + sent, sizeof question - 1 - sent, MSG_NOSIGNAL);
        if (count < 0 && errno != EAGAIN && errno != EINTR)
            return false;
        sent += count > 0 ? (size_t)count : 0;
    }
    for (size_t have = 0; have < MOST_ANSWER - 1;) {
        if (!ready(fd, POLLIN, deadline))
            return false;
        ssize_t count = recv(fd, answer + have, MOST_ANSWER - 1 - have, 0);
        if (count == 0 || (count < 0 && errno != EAGAIN && errno != EINTR))
            return false;
        have += count > 0 ? (size_t)count : 0;
        answer[have] = '\0';
        if (strstr(answer, "\r\n\r\n"))
            return true;
    }
    return false; /* no gate answers with so many headers */
}

/* Whether a header line of the answer begins with `name`. */
static bool has_header(const char *answer, const char *name)
{
    for (const char *line = strstr(answer, "\r\n"); line && strncmp(line, "\r\n\r\n", 4) != 0; line = strstr(line + 2, "\r\n"))
        if (strncasecmp(line + 2, name, strlen(name)) == 0)
            return true;
    return false;
}

/* Whether a new order may go out. Everything but a 200 of a kill switch, in time, is no. */
static bool may_trade(const char *path)
{
    char answer[MOST_ANSWER] = "";
    long long deadline = now_ms() + TIMEOUT_MS;
    int fd = connect_to(path);
    if (fd < 0)
        return false;
    bool answered = exchange(fd, answer, deadline);
    (void)close(fd);
    return answered && strncmp(answer, "HTTP/1.1 200 ", 13) == 0 && has_header(answer, "X-Killswitch-Switch:");
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return 2;
    bool cancel = argc > 2 && strcmp(argv[2], "--cancel") == 0;
    if (!cancel && !may_trade(argv[1])) { /* cancels always pass, and need no answer */
        puts("blocked");
        return 3;
    }
    puts(cancel ? "sent cancel" : "sent new"); /* here stands the call that sends the order */
    return 0;
}
