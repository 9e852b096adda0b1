/* An application that tells what each of its system calls gave, one line of
 * JSON each.
 *
 *   app ADDR PORT STEP...		the steps, on one socket
 *   app many ADDR PORT N		N connects at once, given up when told
 *   app flood ADDR PORT N THREADS WHO	N connections; WHO speaks first
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/errqueue.h>
#include <linux/io_uring.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif

#define PATIENCE_MS 60000

struct dest {
	struct sockaddr_storage addr;
	socklen_t len;
};

static struct dest to;
static int fd = -1;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static struct dest parse(const char *host, const char *port)
{
	struct dest d = {};
	struct sockaddr_in *a4 = (void *)&d.addr;
	struct sockaddr_in6 *a6 = (void *)&d.addr;

	if (strchr(host, ':')) {
		a6->sin6_family = AF_INET6;
		a6->sin6_port = htons(atoi(port));
		d.len = sizeof(*a6);
		if (inet_pton(AF_INET6, host, &a6->sin6_addr) == 1)
			return d;
	} else {
		a4->sin_family = AF_INET;
		a4->sin_port = htons(atoi(port));
		d.len = sizeof(*a4);
		if (inet_pton(AF_INET, host, &a4->sin_addr) == 1)
			return d;
	}
	fprintf(stderr, "not an address: %s\n", host);
	exit(64);
}

/* tell prints a result. retrans is how often the SYN was sent again so far. */
static void tell(const char *call, long ret, int err, const char *note)
{
	struct tcp_info info = {};
	socklen_t len = sizeof(info);

	if (fd >= 0)
		getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len);
	printf("{\"call\":\"%s\",\"ret\":%ld,\"errno\":\"%s\",\"note\":\"%s\","
	       "\"retrans\":%u}\n",
	       call, ret, ret < 0 ? strerrorname_np(err) : "", note,
	       info.tcpi_total_retrans);
	fflush(stdout);
}

static void await(void)
{
	char line[64];

	if (!fgets(line, sizeof(line), stdin))
		exit(0);
}

static const char *events(unsigned int e)
{
	static char text[64];

	/* The names are the same for poll and epoll, and so are the values. */
	snprintf(text, sizeof(text), "%s%s%s%s%s", e & EPOLLIN ? "IN " : "",
		 e & EPOLLOUT ? "OUT " : "", e & EPOLLERR ? "ERR " : "",
		 e & EPOLLHUP ? "HUP " : "", e & EPOLLRDHUP ? "RDHUP " : "");
	if (*text)
		text[strlen(text) - 1] = 0;
	return text;
}

static void do_poll(const char *call, short want, int ms)
{
	struct pollfd p = { .fd = fd, .events = want };
	int ret = poll(&p, 1, ms);

	/* The kernel puts an error on its queue, wakes, and then closes: look
	 * again, or this may be the moment in between.
	 */
	if (ret == 1 && (p.revents & (POLLERR | POLLHUP)) == POLLERR) {
		usleep(20000);
		ret = poll(&p, 1, 0);
	}

	tell(call, ret, errno, events(p.revents));
}

static void do_epoll(const char *call)
{
	struct epoll_event e = { .events = EPOLLIN | EPOLLOUT | EPOLLRDHUP |
					   EPOLLET };
	int ret, ep = epoll_create1(0);

	if (ep < 0 || epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e))
		die("epoll");
	e.events = 0;
	ret = epoll_wait(ep, &e, 1, PATIENCE_MS);
	tell(call, ret, errno, events(e.events));
	close(ep);
}

/* address writes one without its port. */
static const char *address(const void *a, char *text)
{
	const struct sockaddr_in *a4 = a;
	const struct sockaddr_in6 *a6 = a;

	strcpy(text, "none");
	if (a4->sin_family == AF_INET)
		inet_ntop(AF_INET, &a4->sin_addr, text, INET6_ADDRSTRLEN);
	else if (a4->sin_family == AF_INET6)
		inet_ntop(AF_INET6, &a6->sin6_addr, text, INET6_ADDRSTRLEN);
	return text;
}

static void do_name(const char *call,
		    int (*get)(int, struct sockaddr *, socklen_t *), int port)
{
	struct sockaddr_storage a = {};
	socklen_t len = sizeof(a);
	char name[INET6_ADDRSTRLEN] = "", text[128] = "";
	int ret = get(fd, (struct sockaddr *)&a, &len), err = errno;

	if (!ret)
		snprintf(text, sizeof(text), "%s %d", address(&a, name),
			 port ? ntohs(((struct sockaddr_in *)&a)->sin_port) :
				0);
	tell(call, ret, err, text);
}

static void do_soerror(const char *call)
{
	int err = 0;
	socklen_t len = sizeof(err);
	int ret = getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &len);

	tell(call, ret, errno, err ? strerrorname_np(err) : "");
}

static void do_recv(const char *call)
{
	char text[64] = "";
	long ret = recv(fd, text, sizeof(text) - 1, 0);

	tell(call, ret, errno, text);
}

/* do_errqueue tells what the error queue says: the destination, the error, and
 * who said so.
 */
static void do_errqueue(const char *call)
{
	char control[512], dst[INET6_ADDRSTRLEN], from[INET6_ADDRSTRLEN];
	struct sockaddr_storage name = {};
	char data[512], note[256] = "";
	struct iovec iov = { .iov_base = data, .iov_len = sizeof(data) };
	struct msghdr m = { .msg_name = &name,
			    .msg_namelen = sizeof(name),
			    .msg_iov = &iov,
			    .msg_iovlen = 1,
			    .msg_control = control,
			    .msg_controllen = sizeof(control) };
	long ret = recvmsg(fd, &m, MSG_ERRQUEUE | MSG_DONTWAIT);
	int err = errno;
	struct sock_extended_err *e;

	for (struct cmsghdr *c = ret < 0 ? NULL : CMSG_FIRSTHDR(&m); c;
	     c = CMSG_NXTHDR(&m, c)) {
		if (!(c->cmsg_level == IPPROTO_IP &&
		      c->cmsg_type == IP_RECVERR) &&
		    !(c->cmsg_level == IPPROTO_IPV6 &&
		      c->cmsg_type == IPV6_RECVERR))
			continue;
		e = (void *)CMSG_DATA(c);
		snprintf(note, sizeof(note),
			 "%s %d: %s origin %d type %d code %d from %s",
			 address(&name, dst),
			 ntohs(((struct sockaddr_in *)&name)->sin_port),
			 strerrorname_np(e->ee_errno), e->ee_origin, e->ee_type,
			 e->ee_code, address(SO_EE_OFFENDER(e), from));
	}
	/* How much of the packet is quoted is the router's business. */
	tell(call, ret < 0 ? ret : 0, err, note);
}

static uint32_t *in(void *base, uint32_t off)
{
	return (uint32_t *)((char *)base + off);
}

static void do_uring(const char *call)
{
	struct io_uring_params p = {};
	int ring = syscall(SYS_io_uring_setup, 4, &p), res;
	void *sq, *cq;
	struct io_uring_sqe *sqes;

	if (ring < 0)
		die("io_uring_setup");
	sq = mmap(NULL, p.sq_off.array + p.sq_entries * sizeof(uint32_t),
		  PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
	cq = mmap(NULL,
		  p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe),
		  PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_CQ_RING);
	sqes = mmap(NULL, p.sq_entries * sizeof(*sqes), PROT_READ | PROT_WRITE,
		    MAP_SHARED, ring, IORING_OFF_SQES);
	if (sq == MAP_FAILED || cq == MAP_FAILED || sqes == MAP_FAILED)
		die("mmap");
	sqes[0] = (struct io_uring_sqe){ .opcode = IORING_OP_CONNECT,
					 .fd = fd,
					 .addr = (uintptr_t)&to.addr,
					 .off = to.len };
	*in(sq, p.sq_off.array) = 0;
	__atomic_store_n(in(sq, p.sq_off.tail), 1, __ATOMIC_RELEASE);
	if (syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS,
		    NULL, 0) < 0)
		die("io_uring_enter");
	res = ((struct io_uring_cqe *)((char *)cq + p.cq_off.cqes))[0].res;
	tell(call, res < 0 ? -1 : res, -res, "");
	close(ring);
}

static void set(int level, int name, int value)
{
	if (setsockopt(fd, level, name, &value, sizeof(value)))
		die("setsockopt");
}

static void set_sndtimeo(int ms)
{
	struct timeval tv = { .tv_sec = ms / 1000,
			      .tv_usec = ms % 1000 * 1000 };

	if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof(tv)))
		die("SO_SNDTIMEO");
}

/* place reads ADDR or ADDR/PORT. */
static struct dest place(const char *text)
{
	char *host = strdup(text), *port = strchr(host, '/');

	if (!port)
		return parse(host, "0");
	*port++ = 0;
	return parse(host, port);
}

static void do_bind(const char *text)
{
	struct dest from = place(text);

	if (bind(fd, (struct sockaddr *)&from.addr, from.len))
		die("bind");
}

static void ring(int signal)
{
	(void)signal;
}

/* alarm_in has a signal come once; what it interrupts may go on by itself. */
static void alarm_in(int ms, int flags)
{
	struct sigaction action = { .sa_handler = ring, .sa_flags = flags };
	struct itimerval when = { .it_value = { .tv_sec = ms / 1000,
						.tv_usec = ms % 1000 * 1000 } };

	if (sigaction(SIGALRM, &action, NULL) ||
	    setitimer(ITIMER_REAL, &when, NULL))
		die("alarm");
}

static void open_socket(int protocol)
{
	fd = socket(to.addr.ss_family, SOCK_STREAM | SOCK_CLOEXEC, protocol);
	if (fd < 0)
		die("socket");
}

/* prepare does the steps that give no result to tell. */
static int prepare(const char *s, const char *value)
{
	if (!strcmp(s, "nonblock"))
		fcntl(fd, F_SETFL, O_NONBLOCK);
	else if (!strcmp(s, "syncnt"))
		set(IPPROTO_TCP, TCP_SYNCNT, atoi(value));
	else if (!strcmp(s, "usertimeout"))
		set(IPPROTO_TCP, TCP_USER_TIMEOUT, atoi(value));
	else if (!strcmp(s, "sndtimeo"))
		set_sndtimeo(atoi(value));
	else if (!strcmp(s, "fastconnect"))
		set(IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1);
	else if (!strcmp(s, "recverr"))
		to.addr.ss_family == AF_INET ?
			set(IPPROTO_IP, IP_RECVERR, 1) :
			set(IPPROTO_IPV6, IPV6_RECVERR, 1);
	else if (!strcmp(s, "mptcp"))
		close(fd), open_socket(IPPROTO_MPTCP);
	else if (!strcmp(s, "v6only"))
		set(IPPROTO_IPV6, IPV6_V6ONLY, 1);
	else if (!strcmp(s, "bind"))
		do_bind(value);
	else if (!strcmp(s, "to"))
		to = place(value);
	else if (!strcmp(s, "reuse"))
		set(SOL_SOCKET, SO_REUSEADDR, 1);
	else if (!strcmp(s, "alarm"))
		alarm_in(atoi(value), 0);
	else if (!strcmp(s, "restart"))
		alarm_in(atoi(value), SA_RESTART);
	else if (!strcmp(s, "reopen"))
		close(fd), open_socket(0);
	else
		return 0;
	return 1;
}

static void step(char *s)
{
	struct sockaddr none = { .sa_family = AF_UNSPEC };
	struct sockaddr *addr = (struct sockaddr *)&to.addr;
	char *value = strchr(s, '=');
	long ret;

	if (value)
		*value++ = 0;
	if (prepare(s, value))
		return;
	if (!strcmp(s, "connect")) {
		ret = connect(fd, addr, to.len);
		tell(s, ret, errno, "");
	} else if (!strcmp(s, "unspec")) {
		ret = connect(fd, &none, sizeof(none));
		tell(s, ret, errno, "");
	} else if (!strcmp(s, "fastopen")) {
		ret = sendto(fd, value, strlen(value), MSG_FASTOPEN, addr,
			     to.len);
		tell(s, ret, errno, "");
	} else if (!strcmp(s, "send")) {
		ret = send(fd, value, strlen(value), 0);
		tell(s, ret, errno, "");
	} else if (!strcmp(s, "shutdown")) {
		ret = shutdown(fd, SHUT_WR);
		tell(s, ret, errno, "");
	} else if (!strcmp(s, "wait")) {
		tell(s, 0, 0, "");
		await();
	} else if (!strcmp(s, "poll"))
		do_poll(s, POLLOUT, PATIENCE_MS);
	else if (!strcmp(s, "poll0"))
		do_poll(s, POLLOUT, 0);
	else if (!strcmp(s, "pollin"))
		do_poll(s, POLLIN, PATIENCE_MS);
	else if (!strcmp(s, "epoll"))
		do_epoll(s);
	else if (!strcmp(s, "soerror"))
		do_soerror(s);
	else if (!strcmp(s, "errqueue"))
		do_errqueue(s);
	else if (!strcmp(s, "recv"))
		do_recv(s);
	else if (!strcmp(s, "uring"))
		do_uring(s);
	else if (!strcmp(s, "peer"))
		do_name(s, getpeername, 1);
	else if (!strcmp(s, "source"))
		do_name(s, getsockname, 0);
	else {
		fprintf(stderr, "no such step: %s\n", s);
		exit(64);
	}
}

static void all_descriptors(void)
{
	struct rlimit r;

	if (getrlimit(RLIMIT_NOFILE, &r))
		die("getrlimit");
	r.rlim_cur = r.rlim_max;
	if (setrlimit(RLIMIT_NOFILE, &r))
		die("setrlimit");
}

/* many has n connects pending, tells how many are, waits, tells how many still
 * are, and gives them all up. It stays until it is told to go.
 */
static int many(int n)
{
	struct pollfd *all = calloc(n, sizeof(*all));
	int i, pending = 0;

	all_descriptors();
	for (i = 0; i < n; i++) {
		open_socket(0);
		fcntl(fd, F_SETFL, O_NONBLOCK);
		if (connect(fd, (struct sockaddr *)&to.addr, to.len) < 0 &&
		    errno == EINPROGRESS)
			pending++;
		all[i].fd = fd;
		all[i].events = POLLOUT;
	}
	fd = -1;
	tell("many", pending, 0, "");
	await();
	tell("pending", n - poll(all, n, 0), 0, "");
	for (i = 0; i < n; i++)
		close(all[i].fd);
	tell("given up", 0, 0, "");
	await();
	return 0;
}

static int flood_count, flood_server_first;
static pthread_mutex_t flood_mu = PTHREAD_MUTEX_INITIALIZER;
static int flood_ok;
static char flood_bad[256];

static void flood_failed(const char *what)
{
	char text[64];

	snprintf(text, sizeof(text), "%s %s; ", what, strerrorname_np(errno));
	pthread_mutex_lock(&flood_mu);
	if (!strstr(flood_bad, text) &&
	    strlen(flood_bad) + strlen(text) < sizeof(flood_bad))
		strcat(flood_bad, text);
	pthread_mutex_unlock(&flood_mu);
}

/* converse has the server say its 16 bytes, or say them back, and end. */
static int converse(int s)
{
	char text[17] = "0123456789abcdef", got[32];
	int n = 0, ret;

	if (connect(s, (struct sockaddr *)&to.addr, to.len))
		return flood_failed("connect"), 0;
	if (!flood_server_first && send(s, text, 16, MSG_NOSIGNAL) != 16)
		return flood_failed("send"), 0;
	while ((ret = recv(s, got + n, sizeof(got) - n, 0)) > 0)
		n += ret;
	if (ret < 0)
		return flood_failed("recv"), 0;
	errno = 0;
	if (n != 16 || memcmp(text, got, 16))
		return flood_failed("bytes"), 0;
	return 1;
}

static void *flooding(void *arg)
{
	int i, s, ok = 0;

	for (i = 0; i < flood_count; i++) {
		s = socket(to.addr.ss_family, SOCK_STREAM, 0);
		if (s < 0)
			die("socket");
		ok += converse(s);
		close(s);
	}
	pthread_mutex_lock(&flood_mu);
	flood_ok += ok;
	pthread_mutex_unlock(&flood_mu);
	return arg;
}

static int flood(int n, int threads, const char *who)
{
	pthread_t all[64];
	int i;

	if (threads > 64)
		return 64;
	flood_count = n / threads;
	flood_server_first = !strcmp(who, "server");
	for (i = 0; i < threads; i++)
		if (pthread_create(&all[i], NULL, flooding, NULL))
			die("pthread_create");
	for (i = 0; i < threads; i++)
		pthread_join(all[i], NULL);
	tell("flood", flood_ok, 0, flood_bad);
	return 0;
}

int main(int argc, char **argv)
{
	int i;

	signal(SIGPIPE, SIG_IGN);
	if (argc == 5 && !strcmp(argv[1], "many")) {
		to = parse(argv[2], argv[3]);
		return many(atoi(argv[4]));
	}
	if (argc == 7 && !strcmp(argv[1], "flood")) {
		to = parse(argv[2], argv[3]);
		return flood(atoi(argv[4]), atoi(argv[5]), argv[6]);
	}
	if (argc < 4)
		return 64;
	to = parse(argv[1], argv[2]);
	open_socket(0);
	for (i = 3; i < argc; i++)
		step(argv[i]);
	return 0;
}
