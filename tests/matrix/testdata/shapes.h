/* What a process does around a connection, and the table of all ways. */

static void use(const struct way *w, int fd, const struct end *to)
{
	struct conn c = { .fd = fd };

	if (w->dial)
		w->dial(&c, to);
	else
		dial(&c, to);
	note(&c);
	if (!c.err)
		echo(&c);
	report(&c, to);
}

/* -- what is set on a socket -- */

static bool is_v4(void)
{
	return *family == '4';
}

static void bind_to(int fd, const char *host, const char *service)
{
	struct end own = parse(host, service);

	if (bind(fd, sa(&own), own.len))
		die("bind");
}

static void bind_address(int fd)
{
	bind_to(fd, env("SOURCE"), "0");
}

static void bind_port(int fd)
{
	bind_to(fd, env("SOURCE"), env("SOURCE_PORT"));
}

static void bind_any_port(int fd)
{
	bind_to(fd, is_v4() ? "0.0.0.0" : "::", env("SOURCE_PORT"));
}

static void bind_no_port(int fd)
{
	set(fd, IPPROTO_IP, BIND_ADDRESS_NO_PORT, 1);
	bind_address(fd);
}

static void share_port(int fd)
{
	set(fd, SOL_SOCKET, SO_REUSEPORT, 1);
	bind_port(fd);
}

static void mark(int fd)
{
	set(fd, SOL_SOCKET, SO_MARK, 77);
}

static void device(int fd)
{
	const char *name = env("DEVICE");

	if (setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, name, strlen(name)))
		die("SO_BINDTODEVICE");
}

static void transparent(int fd)
{
	if (is_v4())
		set(fd, IPPROTO_IP, IP_TRANSPARENT, 1);
	else
		set(fd, IPPROTO_IPV6, V6_TRANSPARENT, 1);
}

/* foreign binds an address that is not local: answers to it may get lost. */
static void foreign(int fd)
{
	struct timeval limit = { .tv_sec = 5 };

	if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)))
		die("SO_SNDTIMEO");
	bind_to(fd, env("FOREIGN"), "0");
}

static void transparent_foreign(int fd)
{
	transparent(fd);
	foreign(fd);
}

static void freebind_foreign(int fd)
{
	if (is_v4())
		set(fd, IPPROTO_IP, IP_FREEBIND, 1);
	else
		set(fd, IPPROTO_IPV6, V6_FREEBIND, 1);
	foreign(fd);
}

/* -- more than one socket -- */

/* twins have one source port between them, to two destinations, both at once.
 * A third, to the first one's destination, has the whole 4-tuple of it.
 */
static void twins(const struct way *w)
{
	struct end other = parse(env("OTHER"), port);
	struct conn a = { .fd = new_socket(w) };
	struct conn b = { .fd = new_socket(w) };
	struct conn third = { .fd = new_socket(w) };

	dial(&a, &dest);
	dial(&b, &other);
	dial(&third, &dest);
	note(&a);
	note(&b);
	note(&third);
	if (!a.err)
		echo(&a);
	if (!b.err)
		echo(&b);
	report(&a, &dest);
	report(&b, &other);
	report(&third, &dest);
}

/* again takes a socket back from its peer, and gives it another one. */
static void again(const struct way *w)
{
	struct end other = parse(env("OTHER"), port);
	struct sockaddr none = { .sa_family = AF_UNSPEC };
	int fd = new_socket(w);

	use(w, fd, &dest);
	if (connect(fd, &none, sizeof(none)))
		die("connect to AF_UNSPEC");
	use(w, fd, &other);
}

/* gate says that it is there, and waits for the end of its input, for which
 * there is no limit.
 */
static void gate(void)
{
	char byte;

	alarm(0);
	if (write(STDOUT_FILENO, "\n", 1) != 1 || read(STDIN_FILENO, &byte, 1))
		die("gate");
	alarm(LIMIT);
}

static void early_socket(const struct way *w)
{
	int fd = new_socket(w);

	gate();
	use(w, fd, &dest);
}

static void early_connection(const struct way *w)
{
	struct conn c = { .fd = new_socket(w) };

	dial(&c, &dest);
	note(&c);
	gate();
	if (!c.err)
		echo(&c);
	report(&c, &dest);
}

static void *thread(void *arg)
{
	const struct way *w = ((void **)arg)[0];
	int *fd = ((void **)arg)[1];

	use(w, *fd < 0 ? new_socket(w) : *fd, &dest);
	return NULL;
}

/* threads connect at once: sockets of their own, and the first one's. */
static void threads(const struct way *w)
{
	void *args[THREADS][2];
	pthread_t all[THREADS];
	int fds[THREADS];

	for (int i = 0; i < THREADS; i++) {
		fds[i] = i % 2 ? new_socket(w) : -1;
		args[i][0] = (void *)w;
		args[i][1] = &fds[i];
		if (pthread_create(&all[i], NULL, thread, args[i]))
			die("pthread_create");
	}
	for (int i = 0; i < THREADS; i++)
		pthread_join(all[i], NULL);
}

/* -- more than one process -- */

static void reap(pid_t pid)
{
	int status;

	if (pid < 0 || waitpid(pid, &status, 0) < 0)
		die("fork");
	if (status) {
		fprintf(stderr, "the child ended with %x\n", status);
		exit(1);
	}
}

static void forked(const struct way *w)
{
	int fd = new_socket(w);
	pid_t pid = fork();

	if (!pid) {
		use(w, fd, &dest);
		exit(0);
	}
	reap(pid);
}

static void inherited(const struct way *w)
{
	use(w, atoi(env("INHERITED")), &dest);
}

static void vforked(const struct way *w)
{
	char text[12], to[64];
	pid_t pid;

	snprintf(text, sizeof(text), "%d", new_socket(w));
	setenv("INHERITED", text, 1);
	if (getnameinfo(sa(&dest), dest.len, to, sizeof(to), NULL, 0,
			NI_NUMERICHOST))
		die("getnameinfo");
	pid = vfork();
	if (!pid) {
		execl(program, program, family, "inherited", to, port,
		      (char *)NULL);
		_exit(127);
	}
	reap(pid);
}

/* enter moves the process into a cgroup. */
static void enter(const char *dir)
{
	char path[512];
	int fd;

	snprintf(path, sizeof(path), "%s/cgroup.procs", dir);
	fd = open(path, O_WRONLY);
	if (fd < 0 || write(fd, "0", 1) != 1)
		die(path);
	close(fd);
}

static void older(const struct way *w)
{
	int fd;

	enter(env("OUTSIDE"));
	fd = new_socket(w);
	enter(env("INSIDE"));
	use(w, fd, &dest);
}

static void give(int to, int fd)
{
	char byte = 0, space[CMSG_SPACE(sizeof(int))] = {};
	struct iovec io = { &byte, 1 };
	struct msghdr m = { .msg_iov = &io,
			    .msg_iovlen = 1,
			    .msg_control = space,
			    .msg_controllen = sizeof(space) };
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);

	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(c), &fd, sizeof(fd));
	if (sendmsg(to, &m, 0) != 1)
		die("sendmsg");
}

static int take(int from)
{
	char byte, space[CMSG_SPACE(sizeof(int))];
	struct iovec io = { &byte, 1 };
	struct msghdr m = { .msg_iov = &io,
			    .msg_iovlen = 1,
			    .msg_control = space,
			    .msg_controllen = sizeof(space) };
	int fd;

	if (recvmsg(from, &m, 0) != 1 || !CMSG_FIRSTHDR(&m))
		die("recvmsg");
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof(fd));
	return fd;
}

/* pass has a socket made in one cgroup and connected in another. */
static void pass(const struct way *w, const char *made, const char *used)
{
	int pair[2];
	pid_t pid;

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
		die("socketpair");
	pid = fork();
	if (!pid) {
		enter(used);
		use(w, take(pair[1]), &dest);
		exit(0);
	}
	enter(made);
	give(pair[0], new_socket(w));
	reap(pid);
}

static void passed_in(const struct way *w)
{
	pass(w, env("OUTSIDE"), env("INSIDE"));
}

static void passed_out(const struct way *w)
{
	pass(w, env("INSIDE"), env("OUTSIDE"));
}

static const struct way ways[] = {
	{ "blocking" },
	{ "poll", .dial = dial_poll },
	{ "epoll", .dial = dial_epoll },
	{ "select", .dial = dial_select },
	{ "bind_address", .prepare = bind_address },
	{ "bind_port", .prepare = bind_port },
	{ "bind_any_port", .prepare = bind_any_port },
	{ "bind_no_port", .prepare = bind_no_port },
	{ "twins", .prepare = share_port, .run = twins },
	{ "fastopen", .dial = dial_fastopen },
	{ "fastopen_connect", .dial = dial_deferred },
	{ "mptcp", MPTCP },
	{ "mptcp_poll", MPTCP, .dial = dial_poll },
	{ "mptcp_bind", MPTCP, .prepare = bind_port },
	{ "ring", .dial = dial_ring },
	{ "ring_async", .dial = dial_ring_async },
	{ "ring_sqpoll", .dial = dial_ring_polled },
	{ "again", .run = again },
	{ "early_socket", .run = early_socket },
	{ "early_connection", .run = early_connection },
	{ "device", .prepare = device },
	{ "mark", .prepare = mark },
	{ "transparent", .prepare = transparent },
	{ "transparent_foreign", .prepare = transparent_foreign },
	{ "freebind_foreign", .prepare = freebind_foreign },
	{ "older", .run = older },
	{ "passed_in", .run = passed_in },
	{ "passed_out", .run = passed_out },
	{ "fork", .run = forked },
	{ "vfork", .run = vforked },
	{ "inherited", .run = inherited },
	{ "threads", .run = threads },
	{}
};
