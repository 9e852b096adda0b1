/* The little of io_uring that a client needs, without a library. */
#include <errno.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

struct ring {
	int fd;
	struct io_uring_params par;
	struct io_uring_sqe *sqes;
	char *sq, *cq;
};

static uint32_t *in_ring(char *base, uint32_t off)
{
	return (uint32_t *)(base + off);
}

/* ring_open returns 0 or an errno. */
static int ring_open(struct ring *r, unsigned int flags)
{
	memset(r, 0, sizeof(*r));
	r->par.flags = flags;
	r->par.sq_thread_idle = 1000;
	r->fd = syscall(SYS_io_uring_setup, 4, &r->par);
	if (r->fd < 0)
		return errno;
	r->sq = mmap(NULL,
		     r->par.sq_off.array + r->par.sq_entries * sizeof(uint32_t),
		     PROT_READ | PROT_WRITE, MAP_SHARED, r->fd,
		     IORING_OFF_SQ_RING);
	r->cq = mmap(NULL,
		     r->par.cq_off.cqes +
			     r->par.cq_entries * sizeof(struct io_uring_cqe),
		     PROT_READ | PROT_WRITE, MAP_SHARED, r->fd,
		     IORING_OFF_CQ_RING);
	r->sqes = mmap(NULL, r->par.sq_entries * sizeof(*r->sqes),
		       PROT_READ | PROT_WRITE, MAP_SHARED, r->fd,
		       IORING_OFF_SQES);
	if (r->sq == MAP_FAILED || r->cq == MAP_FAILED ||
	    r->sqes == MAP_FAILED)
		return errno;
	return 0;
}

/* ring_do does one operation and returns what its system call would have, or
 * -errno.
 */
static int ring_do(struct ring *r, const struct io_uring_sqe *op)
{
	uint32_t tail = *in_ring(r->sq, r->par.sq_off.tail);
	uint32_t slot = tail & *in_ring(r->sq, r->par.sq_off.ring_mask);
	uint32_t *head = in_ring(r->cq, r->par.cq_off.head);
	uint32_t *ready = in_ring(r->cq, r->par.cq_off.tail);
	unsigned int flags = IORING_ENTER_GETEVENTS;
	struct io_uring_cqe *done;
	int res;

	r->sqes[slot] = *op;
	in_ring(r->sq, r->par.sq_off.array)[slot] = slot;
	__atomic_store_n(in_ring(r->sq, r->par.sq_off.tail), tail + 1,
			 __ATOMIC_SEQ_CST);
	/* The kernel's thread sleeps after a while, and says so. */
	if (r->par.flags & IORING_SETUP_SQPOLL &&
	    __atomic_load_n(in_ring(r->sq, r->par.sq_off.flags),
			    __ATOMIC_SEQ_CST) & IORING_SQ_NEED_WAKEUP)
		flags |= IORING_ENTER_SQ_WAKEUP;
	while (__atomic_load_n(ready, __ATOMIC_ACQUIRE) == *head) {
		if (syscall(SYS_io_uring_enter, r->fd, 1, 1, flags, NULL, 0) <
			    0 &&
		    errno != EINTR)
			return -errno;
	}
	done = (struct io_uring_cqe *)(r->cq + r->par.cq_off.cqes);
	res = done[*head & *in_ring(r->cq, r->par.cq_off.ring_mask)].res;
	__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
	return res;
}
