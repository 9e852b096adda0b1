/* Ways to connect a socket. */

static void dial(struct conn *c, const struct end *to)
{
	if (connect(c->fd, sa(to), to->len))
		c->err = errno;
}

static void wait_poll(struct conn *c)
{
	struct pollfd p = { .fd = c->fd, .events = POLLOUT | POLLIN };

	if (poll(&p, 1, LIMIT * 1000) != 1)
		die("poll");
	c->ready = p.revents == POLLOUT ? "writable" : "else";
}

static void wait_epoll(struct conn *c)
{
	struct epoll_event e = { .events = EPOLLOUT | EPOLLIN | EPOLLRDHUP |
					   EPOLLET };
	int ep = epoll_create1(0);

	if (ep < 0 || epoll_ctl(ep, EPOLL_CTL_ADD, c->fd, &e))
		die("epoll_ctl");
	/* Edge-triggered: before connect it may have said EPOLLHUP. */
	do {
		if (epoll_wait(ep, &e, 1, LIMIT * 1000) != 1)
			die("epoll_wait");
	} while (e.events & EPOLLHUP && !(e.events & EPOLLERR));
	c->ready = e.events == EPOLLOUT ? "writable" : "else";
	close(ep);
}

static void wait_select(struct conn *c)
{
	struct timeval limit = { .tv_sec = LIMIT };
	fd_set in, out;

	FD_ZERO(&in);
	FD_ZERO(&out);
	FD_SET(c->fd, &in);
	FD_SET(c->fd, &out);
	if (select(c->fd + 1, &in, &out, NULL, &limit) < 1)
		die("select");
	c->ready = FD_ISSET(c->fd, &out) && !FD_ISSET(c->fd, &in) ? "writable" :
								   "else";
}

static void nonblocking(struct conn *c, const struct end *to,
			void (*wait)(struct conn *))
{
	fcntl(c->fd, F_SETFL, O_NONBLOCK);
	c->first = connect(c->fd, sa(to), to->len) ? errno : 0;
	if (c->first && c->first != EINPROGRESS) {
		c->err = c->first;
		return;
	}
	wait(c);
	c->err = get(c->fd, SOL_SOCKET, SO_ERROR);
	if (!c->err && connect(c->fd, sa(to), to->len) == 0)
		c->again = connect(c->fd, sa(to), to->len) ? errno : 0;
	fcntl(c->fd, F_SETFL, 0);
}

static void dial_poll(struct conn *c, const struct end *to)
{
	nonblocking(c, to, wait_poll);
}

static void dial_epoll(struct conn *c, const struct end *to)
{
	nonblocking(c, to, wait_epoll);
}

static void dial_select(struct conn *c, const struct end *to)
{
	nonblocking(c, to, wait_select);
}

static void dial_fastopen(struct conn *c, const struct end *to)
{
	ssize_t n = sendto(c->fd, data, EARLY, FASTOPEN, sa(to), to->len);

	if (n < 0) {
		c->err = errno;
		return;
	}
	c->sent = n;
	hear(c);
}

static void dial_deferred(struct conn *c, const struct end *to)
{
	ssize_t n;

	set(c->fd, IPPROTO_TCP, FASTOPEN_CONNECT, 1);
	dial(c, to);
	if (c->err)
		return;
	n = send(c->fd, data, EARLY, MSG_NOSIGNAL);
	if (n < 0) {
		c->err = errno;
		return;
	}
	c->sent = n;
	hear(c);
}

static void by_ring(struct conn *c, const struct end *to, int ring_flags,
		    int op_flags)
{
	char back[EARLY];
	struct ring r;
	int n;

	errno = ring_open(&r, ring_flags);
	if (errno)
		die("io_uring_setup");
	n = ring_do(&r, &(struct io_uring_sqe){ .opcode = IORING_OP_CONNECT,
						.flags = op_flags,
						.fd = c->fd,
						.addr = (uintptr_t)&to->addr,
						.off = to->len });
	if (n >= 0)
		n = ring_do(&r, &(struct io_uring_sqe){
					.opcode = IORING_OP_SEND,
					.flags = op_flags,
					.fd = c->fd,
					.addr = (uintptr_t)data,
					.len = EARLY });
	if (n >= 0) {
		c->sent = n;
		n = ring_do(&r, &(struct io_uring_sqe){
					.opcode = IORING_OP_RECV,
					.flags = op_flags,
					.fd = c->fd,
					.addr = (uintptr_t)back,
					.len = EARLY,
					.msg_flags = MSG_WAITALL });
	}
	if (n < 0)
		c->err = -n;
	else if ((size_t)n != c->sent || memcmp(back, data, n))
		c->err = EPIPE;
	else
		c->got = n;
	close(r.fd);
}

static void dial_ring(struct conn *c, const struct end *to)
{
	by_ring(c, to, 0, 0);
}

static void dial_ring_async(struct conn *c, const struct end *to)
{
	by_ring(c, to, 0, IOSQE_ASYNC);
}

static void dial_ring_polled(struct conn *c, const struct end *to)
{
	by_ring(c, to, IORING_SETUP_SQPOLL, 0);
}
