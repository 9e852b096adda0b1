/* Connections that end in every way there is.
 *
 *   ends serve [ADDR]:PORT...    a server of all ways; ends with stdin
 *   ends end FAMILY COUNT VIP    COUNT connections, that all end
 *   ends load FAMILY PORT VIP    connections one by one, until stdin ends
 *
 * A client says with its first byte what the server is to do with the
 * connection. Ports of VIP: 80 serves, 81 refuses, 82 is silent, 83 has no
 * route, 84 is behind a router without one.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif

static void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

static void reset(int fd)
{
	struct linger l = { 1, 0 };

	setsockopt(fd, SOL_SOCKET, SO_LINGER, &l, sizeof(l));
	close(fd);
}

static void many_files(void)
{
	struct rlimit r;

	getrlimit(RLIMIT_NOFILE, &r);
	r.rlim_cur = r.rlim_max;
	setrlimit(RLIMIT_NOFILE, &r);
}

/* What a client asks for. */
#define ASK_WAIT 'w' /* read to the end, then close */
#define ASK_CLOSE 'c'
#define ASK_RESET 'r'
#define ASK_SPEAK 's' /* say something, then wait */
#define ASK_HALF 'h' /* say that it is the end, then wait */

static int serve(int n, char **ports)
{
	struct epoll_event e = { .events = EPOLLIN }, got[256];
	int ep = epoll_create1(0), one = 1, queue = 1024;
	char *listener = calloc(1 << 20, 1);

	many_files();
	e.data.fd = 0;
	if (epoll_ctl(ep, EPOLL_CTL_ADD, 0, &e))
		die("stdin");
	for (int i = 0; i < n; i++) {
		struct sockaddr_in6 a = { .sin6_family = AF_INET6,
					  .sin6_port = htons(atoi(strchr(ports[i], ':') + 1)) };
		int fd = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, IPPROTO_MPTCP);

		if (ports[i][0] != ':') {
			a.sin6_addr.s6_addr[10] = a.sin6_addr.s6_addr[11] = 0xff;
			*strchr(ports[i], ':') = 0;
			if (inet_pton(AF_INET, ports[i], &a.sin6_addr.s6_addr[12]) != 1)
				die("address");
		}
		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
		setsockopt(fd, IPPROTO_TCP, TCP_FASTOPEN, &queue, sizeof(queue));
		if (bind(fd, (void *)&a, sizeof(a)) || listen(fd, 4096))
			die("listen");
		e.data.fd = fd;
		listener[fd] = 1;
		epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e);
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		int k = epoll_wait(ep, got, 256, -1);

		for (int i = 0; i < k; i++) {
			int fd = got[i].data.fd, c;
			char b[4096];
			ssize_t r;

			if (!fd)
				return 0;
			if (listener[fd]) {
				for (int m = 0; m < 64; m++) {
					c = accept4(fd, NULL, NULL, SOCK_NONBLOCK);
					if (c < 0)
						break;
					e.data.fd = c;
					epoll_ctl(ep, EPOLL_CTL_ADD, c, &e);
				}
				continue;
			}
			r = read(fd, b, sizeof(b));
			if (r < 0 && errno == EAGAIN)
				continue;
			if (r <= 0) {
				close(fd);
				continue;
			}
			switch (b[0]) {
			case ASK_CLOSE:
				close(fd);
				break;
			case ASK_RESET:
				reset(fd);
				break;
			case ASK_SPEAK:
				if (write(fd, "hello", 5) < 0)
					close(fd);
				break;
			case ASK_HALF:
				shutdown(fd, SHUT_WR);
				break;
			}
		}
	}
}

/* The destination. */
static struct sockaddr_storage vip;
static socklen_t vip_size;
static int family;
static long errors;

static void *at(int port)
{
	if (family == AF_INET)
		((struct sockaddr_in *)&vip)->sin_port = htons(port);
	else
		((struct sockaddr_in6 *)&vip)->sin6_port = htons(port);
	return &vip;
}

/* wrong notes a result that is none of those that may be. */
static void wrong(const char *way, int got)
{
	if (errors++ < 10)
		fprintf(stderr, "%s: %s\n", way, got ? strerror(got) : "success");
}

/* dial connects, and says by its last argument what may come of it. */
static int dial(const char *way, int port, int flags, int proto, int may)
{
	int fd = socket(family, SOCK_STREAM | flags, proto);

	if (fd < 0)
		die("socket");
	errno = 0;
	if (connect(fd, at(port), vip_size) && errno != may)
		wrong(way, errno);
	return fd;
}

static int opened(const char *way, char ask, int proto)
{
	int fd = dial(way, 80, 0, proto, 0);

	if (ask && write(fd, &ask, 1) != 1)
		wrong(way, errno);
	return fd;
}

/* drained reads until the end. */
static void drained(int fd)
{
	char b[64];

	while (read(fd, b, sizeof(b)) > 0)
		;
}

static void unspecified(int fd)
{
	struct sockaddr none = { .sa_family = AF_UNSPEC };

	if (connect(fd, &none, sizeof(none)))
		wrong("AF_UNSPEC", errno);
}

/* result waits for a connect, and says how it ended. */
static int result(int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLOUT };
	int err = 0;
	socklen_t n = sizeof(err);

	poll(&p, 1, 60000);
	getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &n);
	return err;
}

static void way_close(void) { close(opened("close", ASK_WAIT, 0)); }

static void way_server_closes(void)
{
	int fd = opened("server closes", ASK_CLOSE, 0);

	drained(fd);
	close(fd);
}

static void way_reset(void) { reset(opened("reset", ASK_WAIT, 0)); }

static void way_server_resets(void)
{
	int fd = opened("server resets", ASK_RESET, 0);

	drained(fd);
	close(fd);
}

static void way_unread(void)
{
	int fd = opened("unread", ASK_SPEAK, 0);
	struct pollfd p = { .fd = fd, .events = POLLIN };

	poll(&p, 1, 60000);
	close(fd);
}

static void way_half(void)
{
	int fd = opened("half", ASK_WAIT, 0);

	shutdown(fd, SHUT_WR);
	drained(fd);
	close(fd);
}

static void way_silent(void) { close(opened("no word", 0, 0)); }

static void way_refused(void) { close(dial("refused", 81, 0, 0, ECONNREFUSED)); }

static void way_refused_later(void)
{
	int fd = dial("refused later", 81, SOCK_NONBLOCK, 0, EINPROGRESS);
	int err = result(fd);

	if (err != ECONNREFUSED)
		wrong("refused later", err);
	close(fd);
}

static void way_refused_again(void)
{
	int fd = dial("refused twice", 81, 0, 0, ECONNREFUSED);

	if (!connect(fd, at(81), vip_size) || (errno != ECONNREFUSED && errno != ECONNABORTED))
		wrong("refused twice", errno);
	if (connect(fd, at(80), vip_size))
		wrong("and then not", errno);
	close(fd);
}

static void way_abandoned(void) { close(dial("abandoned", 82, SOCK_NONBLOCK, 0, EINPROGRESS)); }

static void way_shut_down(void)
{
	int fd = dial("shut down", 82, SOCK_NONBLOCK, 0, EINPROGRESS);

	shutdown(fd, SHUT_RDWR);
	close(fd);
}

static void way_reset_early(void) { reset(dial("reset early", 82, SOCK_NONBLOCK, 0, EINPROGRESS)); }

static void way_unspec(void)
{
	int fd = opened("unspec", ASK_WAIT, 0);

	unspecified(fd);
	if (connect(fd, at(80), vip_size))
		wrong("again", errno);
	close(fd);
}

static void way_unspec_early(void)
{
	int fd = dial("unspec early", 82, SOCK_NONBLOCK, 0, EINPROGRESS);

	unspecified(fd);
	close(fd);
}

static void way_no_route(void) { close(dial("no route", 83, 0, 0, EHOSTUNREACH)); }

static void way_duplicate(void)
{
	int fd = opened("duplicate", ASK_WAIT, 0), other = dup(fd);

	close(fd);
	close(other);
}

static void way_mptcp(void) { close(opened("MPTCP", ASK_WAIT, IPPROTO_MPTCP)); }

static void way_mptcp_resets(void) { reset(opened("MPTCP reset", ASK_WAIT, IPPROTO_MPTCP)); }

static void way_mptcp_server(void)
{
	int fd = opened("MPTCP server", ASK_CLOSE, IPPROTO_MPTCP);

	drained(fd);
	close(fd);
}

static void way_mptcp_refused(void) { close(dial("MPTCP refused", 81, 0, IPPROTO_MPTCP, ECONNREFUSED)); }

static void fast(char ask, bool reset_it)
{
	int fd = socket(family, SOCK_STREAM, 0);

	if (sendto(fd, &ask, 1, MSG_FASTOPEN, at(80), vip_size) != 1)
		wrong("fast open", errno);
	if (reset_it) {
		reset(fd);
		return;
	}
	if (ask != ASK_WAIT)
		drained(fd);
	close(fd);
}

static void way_fast(void) { fast(ASK_WAIT, false); }

static void way_fast_server(void) { fast(ASK_CLOSE, false); }

static void way_fast_resets(void) { fast(ASK_WAIT, true); }

/* keeper is a process that closes what it is sent. */
static int keeper;

static void keep(int from)
{
	for (;;) {
		union {
			char b[CMSG_SPACE(sizeof(int))];
			struct cmsghdr h;
		} u;
		char x;
		struct iovec v = { &x, 1 };
		struct msghdr m = { .msg_iov = &v, .msg_iovlen = 1,
				    .msg_control = &u, .msg_controllen = sizeof(u) };

		if (recvmsg(from, &m, 0) <= 0)
			exit(0);
		close(*(int *)CMSG_DATA(CMSG_FIRSTHDR(&m)));
	}
}

static void start_keeper(void)
{
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair))
		die("socketpair");
	if (!fork()) {
		close(pair[1]);
		keep(pair[0]);
	}
	close(pair[0]);
	keeper = pair[1];
}

static void way_passed(void)
{
	int fd = opened("passed", ASK_WAIT, 0);
	union {
		char b[CMSG_SPACE(sizeof(int))];
		struct cmsghdr h;
	} u = {};
	char x = 0;
	struct iovec v = { &x, 1 };
	struct msghdr m = { .msg_iov = &v, .msg_iovlen = 1,
			    .msg_control = &u, .msg_controllen = sizeof(u) };

	u.h.cmsg_level = SOL_SOCKET;
	u.h.cmsg_type = SCM_RIGHTS;
	u.h.cmsg_len = CMSG_LEN(sizeof(int));
	*(int *)CMSG_DATA(&u.h) = fd;
	if (sendmsg(keeper, &m, 0) < 0)
		wrong("pass", errno);
	close(fd);
}

static const struct way {
	void (*go)(void);
	int share, connects;
} ways[] = {
	{ way_close, 10, 1 },	     { way_server_closes, 6, 1 },
	{ way_reset, 6, 1 },	     { way_server_resets, 6, 1 },
	{ way_unread, 4, 1 },	     { way_half, 4, 1 },
	{ way_silent, 2, 1 },	     { way_refused, 6, 1 },
	{ way_refused_later, 4, 1 }, { way_refused_again, 2, 3 },
	{ way_abandoned, 4, 1 },     { way_shut_down, 4, 1 },
	{ way_reset_early, 4, 1 },   { way_unspec, 4, 2 },
	{ way_unspec_early, 4, 1 },  { way_no_route, 4, 1 },
	{ way_duplicate, 2, 1 },     { way_mptcp, 2, 1 },
	{ way_mptcp_resets, 2, 1 },  { way_mptcp_server, 2, 1 },
	{ way_mptcp_refused, 2, 1 }, { way_fast, 2, 1 },
	{ way_fast_server, 2, 1 },   { way_fast_resets, 2, 1 },
	{ way_passed, 4, 1 },
};

#define WAYS (int)(sizeof(ways) / sizeof(ways[0]))

/* crowd is a process that has all kinds of connections when it is killed. */
static void crowd(int n)
{
	int ready[2];
	char b;
	pid_t pid;

	if (pipe(ready))
		die("pipe");
	pid = fork();
	if (pid) {
		close(ready[1]);
		if (read(ready[0], &b, 1) != 1)
			wrong("crowd", EPIPE);
		close(ready[0]);
		kill(pid, SIGKILL);
		waitpid(pid, NULL, 0);
		return;
	}
	for (int i = 0; i < n; i++) {
		int fd;

		switch (i % 6) {
		case 0:
			opened("killed", ASK_WAIT, 0);
			break;
		case 1:
			fd = opened("killed half", ASK_WAIT, 0);
			shutdown(fd, SHUT_WR);
			break;
		case 2:
			opened("killed by half", ASK_HALF, 0);
			break;
		case 3:
			dial("killed early", 82, SOCK_NONBLOCK, 0, EINPROGRESS);
			break;
		case 4:
			opened("killed MPTCP", ASK_WAIT, IPPROTO_MPTCP);
			break;
		default:
			opened("killed unread", ASK_SPEAK, 0);
		}
	}
	if (write(ready[1], errors ? "" : "x", !errors) < 0)
		_exit(1);
	for (;;)
		pause();
}

/* forked has connections of which a child has the same, and ends. */
static void forked(int n)
{
	int fds[n];
	pid_t pid;

	for (int i = 0; i < n; i++)
		fds[i] = opened("forked", ASK_WAIT, 0);
	pid = fork();
	if (!pid) {
		for (int i = 0; i < n; i += 2)
			close(fds[i]);
		_exit(0);
	}
	for (int i = 0; i < n; i++)
		close(fds[i]);
	waitpid(pid, NULL, 0);
}

/* executed loses connections by an exec. */
static void executed(int n)
{
	pid_t pid = fork();

	if (!pid) {
		for (int i = 0; i < n; i++)
			fcntl(opened("executed", ASK_WAIT, 0), F_SETFD, FD_CLOEXEC);
		execlp("true", "true", NULL);
		_exit(1);
	}
	waitpid(pid, NULL, 0);
}

/* timed_out has connections that nobody answers, or a router does. It may have
 * answered while the kernel was in connect, which forgets that.
 */
static void timed_out(int n)
{
	int fds[n], wait = 1000;

	for (int i = 0; i < n; i++) {
		fds[i] = dial("timed out", i % 3 ? 82 : 84, SOCK_NONBLOCK, 0, EINPROGRESS);
		if (i % 2)
			setsockopt(fds[i], IPPROTO_TCP, TCP_USER_TIMEOUT, &wait, sizeof(wait));
	}
	for (int i = 0; i < n; i++) {
		int err = result(fds[i]);

		if (err != ETIMEDOUT &&
		    (i % 3 || (err != EHOSTUNREACH && err != ENETUNREACH)))
			wrong("timed out", err);
		close(fds[i]);
	}
}

static int end(int count)
{
	int total = 0, done = 0;

	many_files();
	signal(SIGPIPE, SIG_IGN);
	start_keeper();
	for (int i = 0; i < WAYS; i++)
		total += ways[i].share * ways[i].connects;
	forked(300);
	executed(300);
	crowd(600);
	timed_out(600);
	for (done = 1800; done < count; done += total) {
		for (int i = 0; i < WAYS; i++)
			for (int k = 0; k < ways[i].share; k++)
				ways[i].go();
	}
	close(keeper);
	while (wait(NULL) > 0)
		;
	printf("%d connections, %ld wrong\n", done, errors);
	return errors != 0;
}

/* load has one connection after the other, each of which is served. */
static int load(int port)
{
	struct pollfd stop = { .fd = 0, .events = POLLIN };
	char b[8], ask = ASK_SPEAK;
	long done = 0;

	signal(SIGPIPE, SIG_IGN);
	for (; !poll(&stop, 1, 0); done++) {
		int fd = dial("load", port, 0, 0, 0);

		if (write(fd, &ask, 1) != 1 || read(fd, b, sizeof(b)) != 5)
			wrong("not served", errno);
		reset(fd);
		usleep(200); /* something is to be left for others */
	}
	printf("%ld %ld\n", done, errors);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc > 2 && !strcmp(argv[1], "serve"))
		return serve(argc - 2, argv + 2);
	if (argc != 5)
		return 2;
	family = strcmp(argv[2], "4") ? AF_INET6 : AF_INET;
	vip.ss_family = family;
	vip_size = family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
	if (inet_pton(family, argv[4],
		      family == AF_INET ? (void *)&((struct sockaddr_in *)&vip)->sin_addr :
					  (void *)&((struct sockaddr_in6 *)&vip)->sin6_addr) != 1)
		return 2;
	if (!strcmp(argv[1], "load"))
		return load(atoi(argv[3]));
	return end(atoi(argv[3]));
}
