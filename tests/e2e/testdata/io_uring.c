/* Connects by io_uring, sends a line, and prints what comes back.
 *
 *   io_uring 4|6|m PORT	to 198.51.100.7, 2001:db8:7::7 or the mapped
 * form
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static int ring;
static struct io_uring_params par;
static struct io_uring_sqe *sqes;
static char *sq, *cq;

static void die(const char *what, int err)
{
	fprintf(stderr, "%s: %s\n", what, strerror(err));
	/* 2: this kernel has no io_uring for us */
	exit(!strcmp(what, "io_uring_setup") ? 2 : 1);
}

static void open_ring(void)
{
	ring = syscall(SYS_io_uring_setup, 4, &par);
	if (ring < 0)
		die("io_uring_setup", errno);
	sq = mmap(NULL, par.sq_off.array + par.sq_entries * sizeof(uint32_t),
		  PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
	cq = mmap(NULL,
		  par.cq_off.cqes +
			  par.cq_entries * sizeof(struct io_uring_cqe),
		  PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_CQ_RING);
	sqes = mmap(NULL, par.sq_entries * sizeof(*sqes),
		    PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
	if (sq == MAP_FAILED || cq == MAP_FAILED || sqes == MAP_FAILED)
		die("mmap", errno);
}

static uint32_t *at(char *base, uint32_t off)
{
	return (uint32_t *)(base + off);
}

/* run does one operation and returns its result. */
static int run(const char *what, const struct io_uring_sqe *op)
{
	uint32_t tail = *at(sq, par.sq_off.tail);
	uint32_t slot = tail & *at(sq, par.sq_off.ring_mask);
	uint32_t head;
	struct io_uring_cqe *done;
	int res;

	sqes[slot] = *op;
	at(sq, par.sq_off.array)[slot] = slot;
	__atomic_store_n(at(sq, par.sq_off.tail), tail + 1, __ATOMIC_RELEASE);
	if (syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS,
		    NULL, 0) < 0)
		die("io_uring_enter", errno);
	head = *at(cq, par.cq_off.head);
	done = (struct io_uring_cqe *)(cq + par.cq_off.cqes);
	res = done[head & *at(cq, par.cq_off.ring_mask)].res;
	__atomic_store_n(at(cq, par.cq_off.head), head + 1, __ATOMIC_RELEASE);
	if (res < 0)
		die(what, -res);
	return res;
}

int main(int argc, char **argv)
{
	struct sockaddr_in to4 = { .sin_family = AF_INET };
	struct sockaddr_in6 to6 = { .sin6_family = AF_INET6 }, peer = {};
	struct sockaddr *to = (struct sockaddr *)&to6;
	socklen_t len = sizeof(to6);
	char text[64], name[INET6_ADDRSTRLEN];
	int fd, n;

	if (argc != 3)
		return 64;
	to4.sin_port = to6.sin6_port = htons(atoi(argv[2]));
	inet_pton(AF_INET, "198.51.100.7", &to4.sin_addr);
	inet_pton(AF_INET6,
		  *argv[1] == 'm' ? "::ffff:198.51.100.7" : "2001:db8:7::7",
		  &to6.sin6_addr);
	if (*argv[1] == '4') {
		to = (struct sockaddr *)&to4;
		len = sizeof(to4);
	}

	open_ring();
	fd = socket(to->sa_family, SOCK_STREAM, 0);
	if (fd < 0)
		die("socket", errno);
	run("connect", &(struct io_uring_sqe){ .opcode = IORING_OP_CONNECT,
					       .fd = fd,
					       .addr = (uintptr_t)to,
					       .off = len });
	run("send", &(struct io_uring_sqe){ .opcode = IORING_OP_SEND,
					    .fd = fd,
					    .addr = (uintptr_t)"a line\n",
					    .len = 7 });
	n = run("recv", &(struct io_uring_sqe){ .opcode = IORING_OP_RECV,
						.fd = fd,
						.addr = (uintptr_t)text,
						.len = sizeof(text) });
	len = sizeof(peer);
	if (getpeername(fd, (struct sockaddr *)&peer, &len))
		die("getpeername", errno);
	inet_ntop(to->sa_family,
		  to == (struct sockaddr *)&to4 ?
			  (void *)&((struct sockaddr_in *)&peer)->sin_addr :
			  (void *)&peer.sin6_addr,
		  name, sizeof(name));
	printf("%s %.*s", name, n, text);
	return 0;
}
