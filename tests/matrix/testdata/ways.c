/* Makes a TCP connection in one of many ways, has random bytes echoed over it,
 * and prints what it saw as a line of JSON, one for each connection.
 *
 *	ways FAMILY WAY DESTINATION PORT
 *
 * FAMILY is 4, 6, mapped or v6only: the socket's; the destination is a literal
 * address of that family. By the environment come SOURCE, SOURCE_PORT, FOREIGN
 * (an address that nobody here has), OTHER (a second destination), DEVICE, and
 * the directories of two cgroups, INSIDE and OUTSIDE.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "ring.h"

/* What one of the two C libraries has no name for. */
enum {
	MPTCP = 262,
	BIND_ADDRESS_NO_PORT = 24,
	FASTOPEN = 0x20000000,
	FASTOPEN_CONNECT = 30,
	V6_TRANSPARENT = 75,
	V6_FREEBIND = 78,
	SYN_DATA = 32, /* of tcpi_options */
};

#define SIZE 150001 /* of what is echoed: more than a buffer, and odd */
#define EARLY 7 /* of them before all others, where a way sends some itself */
#define LIMIT 30 /* seconds for everything, where the environment has none */
#define THREADS 6

struct end {
	struct sockaddr_storage addr;
	socklen_t len;
};

struct conn {
	int fd;
	int first; /* errno of a call that did not wait */
	int err; /* errno of the connection */
	int again; /* errno of one more connect */
	const char *ready;
	size_t sent, got; /* bytes so far */
	bool same;
	char peer[64], own[64]; /* whom the kernel names, once connected */
	int peer_port, own_port;
};

struct way {
	const char *name;
	int protocol;
	void (*prepare)(int fd);
	void (*dial)(struct conn *c, const struct end *to);
	void (*run)(const struct way *w); /* the whole of it */
};

static const char *program, *family, *port;
static struct end dest;
static unsigned char data[SIZE];

static void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

static const char *env(const char *name)
{
	const char *value = getenv(name);

	if (!value || !*value) {
		fprintf(stderr, "%s is not set\n", name);
		exit(64);
	}
	return value;
}

static struct end parse(const char *host, const char *service)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM,
				  .ai_flags = AI_NUMERICHOST }, *list;
	struct end e = {};

	hints.ai_family = *family == '4' ? AF_INET : AF_INET6;
	if (getaddrinfo(host, service, &hints, &list)) {
		fprintf(stderr, "%s is no address\n", host);
		exit(64);
	}
	e.len = list->ai_addrlen;
	memcpy(&e.addr, list->ai_addr, e.len);
	freeaddrinfo(list);
	return e;
}

static const struct sockaddr *sa(const struct end *e)
{
	return (const struct sockaddr *)&e->addr;
}

static void set(int fd, int level, int name, int value)
{
	if (setsockopt(fd, level, name, &value, sizeof(value)))
		die("setsockopt");
}

static int get(int fd, int level, int name)
{
	int value = -1;
	socklen_t len = sizeof(value);

	if (getsockopt(fd, level, name, &value, &len))
		return -errno;
	return value;
}

static int new_socket(const struct way *w)
{
	int fd = socket(dest.addr.ss_family, SOCK_STREAM, w->protocol);

	if (fd < 0)
		die("socket");
	if (!strcmp(family, "v6only"))
		set(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
	if (w->prepare)
		w->prepare(fd);
	return fd;
}

/* -- what it saw -- */

static const char *error_name(int err)
{
	switch (err) {
	case 0:
		return "";
	case EINPROGRESS:
		return "EINPROGRESS";
	case EALREADY:
		return "EALREADY";
	case EISCONN:
		return "EISCONN";
	case ENOTCONN:
		return "ENOTCONN";
	case ENETUNREACH:
		return "ENETUNREACH";
	case EHOSTUNREACH:
		return "EHOSTUNREACH";
	case ECONNREFUSED:
		return "ECONNREFUSED";
	case ECONNRESET:
		return "ECONNRESET";
	case EADDRNOTAVAIL:
		return "EADDRNOTAVAIL";
	case EINVAL:
		return "EINVAL";
	case ETIMEDOUT:
		return "ETIMEDOUT";
	}
	return strerror(err);
}

static void name_of(int no, const struct end *e, char *text, size_t size,
		    int *port)
{
	char service[8];

	*port = 0;
	if (no) {
		snprintf(text, size, "%s", error_name(errno));
		return;
	}
	if (getnameinfo(sa(e), e->len, text, size, service, sizeof(service),
			NI_NUMERICHOST | NI_NUMERICSERV))
		die("getnameinfo");
	*port = atoi(service);
}

/* note is called before the first byte has moved, where the way lets it. */
static void note(struct conn *c)
{
	struct end e = { .len = sizeof(e.addr) };
	int no = getpeername(c->fd, (void *)&e.addr, &e.len);

	name_of(no, &e, c->peer, sizeof(c->peer), &c->peer_port);
	e.len = sizeof(e.addr);
	no = getsockname(c->fd, (void *)&e.addr, &e.len);
	name_of(no, &e, c->own, sizeof(c->own), &c->own_port);
}

/* report is a single write: threads and processes report too. */
static void report(const struct conn *c, const struct end *to)
{
	char asked[64], line[1024];
	int n;
	struct tcp_info info = {};
	socklen_t len = sizeof(info);

	if (getnameinfo(sa(to), to->len, asked, sizeof(asked), NULL, 0,
			NI_NUMERICHOST))
		die("getnameinfo");
	getsockopt(c->fd, IPPROTO_TCP, TCP_INFO, &info, &len);
	n = snprintf(line, sizeof(line),
		     "{\"to\": \"%s\", \"first\": \"%s\", \"error\": \"%s\", "
		     "\"again\": \"%s\", \"ready\": \"%s\", "
		     "\"peer\": \"%s\", \"peer_port\": %d, \"own\": \"%s\", "
		     "\"own_port\": %d, \"protocol\": %d, \"mark\": %d, "
		     "\"device\": %d, \"pending\": %d, \"syn_data\": %d, "
		     "\"sent\": %zu, \"got\": %zu, \"same\": %s}\n",
		     asked, error_name(c->first), error_name(c->err),
		     error_name(c->again), c->ready ? c->ready : "",
		     c->peer, c->peer_port, c->own, c->own_port,
		     get(c->fd, SOL_SOCKET, SO_PROTOCOL),
		     get(c->fd, SOL_SOCKET, SO_MARK),
		     get(c->fd, SOL_SOCKET, SO_BINDTOIFINDEX),
		     get(c->fd, SOL_SOCKET, SO_ERROR),
		     !!(info.tcpi_options & SYN_DATA), c->sent, c->got,
		     c->same ? "true" : "false");
	if (write(STDOUT_FILENO, line, n) != n)
		die("write");
}

/* echo sends and reads at once, so that no buffer fills up, ends its side, and
 * reads to the end. It goes on where the way itself has stopped.
 */
static void echo(struct conn *c)
{
	static __thread unsigned char back[SIZE + 1];
	bool over = false;

	c->same = true;
	while (!over) {
		bool more = c->sent < SIZE;
		struct pollfd p = { .fd = c->fd,
				    .events = POLLIN | (more ? POLLOUT : 0) };
		ssize_t n;

		if (poll(&p, 1, LIMIT * 1000) != 1)
			die("poll");
		if (more && p.revents & POLLOUT) {
			n = send(c->fd, data + c->sent, SIZE - c->sent,
				 MSG_DONTWAIT | MSG_NOSIGNAL);
			if (n < 0 && errno != EAGAIN)
				break;
			c->sent += n > 0 ? n : 0;
			if (c->sent == SIZE && shutdown(c->fd, SHUT_WR))
				break;
		}
		if (!(p.revents & (POLLIN | POLLHUP | POLLERR)))
			continue;
		n = recv(c->fd, back, sizeof(back), MSG_DONTWAIT);
		if (n < 0 && errno != EAGAIN)
			break;
		over = n == 0;
		if (n > 0 && (c->got + n > SIZE ||
			      memcmp(data + c->got, back, n)))
			c->same = false;
		c->got += n > 0 ? n : 0;
	}
	if (!over)
		c->err = errno;
	c->same = c->same && over && c->sent == SIZE && c->got == SIZE;
}

/* hear waits for what was sent early. */
static void hear(struct conn *c)
{
	char back[EARLY];

	while (c->got < c->sent) {
		ssize_t n = recv(c->fd, back, c->sent - c->got, 0);

		if (n <= 0 || memcmp(back, data + c->got, n)) {
			c->err = n < 0 ? errno : EPIPE;
			return;
		}
		c->got += n;
	}
}

#include "dial.h"
#include "shapes.h"

int main(int argc, char **argv)
{
	const struct way *w = ways;
	unsigned int x = getpid() | 1;

	if (argc != 5)
		return 64;
	alarm(getenv("LIMIT") ? atoi(getenv("LIMIT")) : LIMIT);
	program = argv[0];
	family = argv[1];
	port = argv[4];
	dest = parse(argv[3], port);
	for (size_t i = 0; i < SIZE; i++) { /* xorshift */
		x ^= x << 13;
		x ^= x >> 17;
		x ^= x << 5;
		data[i] = x;
	}
	while (w->name && strcmp(w->name, argv[2]))
		w++;
	if (!w->name) {
		fprintf(stderr, "no such way: %s\n", argv[2]);
		return 64;
	}
	if (w->run)
		w->run(w);
	else
		use(w, new_socket(w), &dest);
	return 0;
}
