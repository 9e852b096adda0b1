//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The life of the sockets in scope, from before the SYN to CLOSE. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "include/config.h"
#include "include/decision.h"
#include "include/eject.h"
#include "include/former.h"
#include "include/sent.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

static __always_inline struct ip_addr local_addr(struct bpf_sock_ops *ctx,
						 bool v4)
{
	if (v4)
		return mapped(ctx->local_ip4);
	return LOAD_IP6(ctx->local_ip6);
}

static __always_inline struct ip_addr remote_addr(struct bpf_sock_ops *ctx,
						  bool v4)
{
	if (v4)
		return mapped(ctx->remote_ip4);
	return LOAD_IP6(ctx->remote_ip6);
}

/* speaks_v4 is true also for an AF_INET6 socket with a mapped peer. */
static __always_inline bool speaks_v4(struct bpf_sock_ops *ctx)
{
	return ctx->family == AF_INET ||
	       (!ctx->remote_ip6[0] && !ctx->remote_ip6[1] &&
		ctx->remote_ip6[2] == bpf_htonl(0xffff));
}

static __always_inline void add(__u64 group, int by)
{
	__u64 zero = 0;
	struct state *st = bpf_map_lookup_elem(&state, &zero);
	struct usage *u;

	if (st)
		__sync_fetch_and_add(&st->live, by);
	/* What hooks of the former layout have counted comes later. */
	if (cfg_moves & PL_MOVES_COUNTS) {
		u = usage_of(group);
		if (u)
			__sync_fetch_and_add(&u->conns, by);
		return;
	}
	u = bpf_map_lookup_elem(&usage_by_group, &group);
	/* The process may have forgotten the container in between: an account
	 * that went below zero would be a quota used up for ever.
	 */
	if (u && (by > 0 || u->conns > 0))
		__sync_fetch_and_add(&u->conns, by);
}

/* option returns what the application set, or 0 also where this kernel does not
 * tell (before 6.1).
 */
static __always_inline __u64 option(struct bpf_sock_ops *ctx, int level,
				    int name)
{
	__u32 value = 0;

	if (bpf_getsockopt(ctx, level, name, &value, sizeof(value)))
		return 0;
	return value;
}

/* The name is not initialised on purpose: a number stored there first is what
 * net.h says of PAIR. A call that fails zeroes it.
 */
union algorithm {
	__u64 d[2];
	char name[16];
};

/* Where a field is in struct live, in words of eight bytes. */
#define WORD(field) (__builtin_offsetof(struct live, field) / 8)

/* replace takes away the entry of a connection whose end was not seen, where
 * another agent cleared the flags: who has its address now is another. Whoever
 * deletes it takes it off the account, here or in the process.
 */
static __noinline void replace(const struct decision *d)
{
	struct live *l = bpf_map_lookup_elem(&live, &d->key);
	__u64 group, canary;

	if (!l)
		return;
	group = l->group;
	canary = l->canary;
	if (!bpf_map_delete_elem(&live, &d->key) && !canary)
		add(group, -1);
}

/* let_in enters the connection in live, before its SYN leaves. Without an entry
 * the lookup program refuses it.
 */
static __always_inline void let_in(struct bpf_sock_ops *ctx, struct decision *d)
{
	union {
		__u64 d[sizeof(struct live) / 8];
		struct live l;
	} u = { .d = {
			[WORD(cookie)] = bpf_get_socket_cookie(ctx),
			[WORD(cgroup)] = d->cgroup,
			[WORD(group)] = d->group,
			[WORD(opened)] = d->opened,
			[WORD(orig)] = PAIR(d->orig.w[0], d->orig.w[1]),
			[WORD(orig) + 1] = PAIR(d->orig.w[2], d->orig.w[3]),
			[WORD(bound)] = PAIR(d->bound.w[0], d->bound.w[1]),
			[WORD(bound) + 1] = PAIR(d->bound.w[2], d->bound.w[3]),
			[WORD(mark)] = PAIR(d->mark, d->priority),
		} };
	union algorithm congestion;
	__u64 tos = ctx->family == AF_INET ?
			    option(ctx, IPPROTO_IP, IP_TOS) :
			    option(ctx, IPPROTO_IPV6, IPV6_TCLASS);

	/* tos, reason, canary, hold, worker, keep_count, keep_idle, and
	 * keep_interval, zero, user_timeout; see struct live.
	 */
	u.d[WORD(tos)] = (tos & 0xff) | d->reason << 8 | (__u64)d->hold << 24;
	u.d[WORD(keep_interval)] =
		(__u64)option(ctx, IPPROTO_TCP, TCP_USER_TIMEOUT) << 32;
	if (option(ctx, SOL_SOCKET, SO_KEEPALIVE)) {
		u.d[WORD(tos)] |= option(ctx, IPPROTO_TCP, TCP_KEEPCNT) << 40 |
				  option(ctx, IPPROTO_TCP, TCP_KEEPIDLE) << 48;
		u.d[WORD(keep_interval)] |=
			option(ctx, IPPROTO_TCP, TCP_KEEPINTVL);
	}
	bpf_getsockopt(ctx, IPPROTO_TCP, TCP_CONGESTION, &congestion,
		       sizeof(congestion));
	u.d[WORD(congestion)] = congestion.d[0];
	u.d[WORD(congestion) + 1] = congestion.d[1];
	u.d[WORD(seen)] = PAIR(d->seen.w[0], d->seen.w[1]);
	u.d[WORD(seen) + 1] = PAIR(d->seen.w[2], d->seen.w[3]);
	/* Somebody who had the same address before is another. */
	bpf_map_delete_elem(&departed, &d->key);
	if (cfg_moves & PL_MOVES_LIVE) {
		bpf_map_delete_elem(&former_departed, &d->key);
		bpf_map_delete_elem(&former_live, &d->key);
	}
	if (bpf_map_update_elem(&live, &d->key, &u.l, BPF_NOEXIST)) {
		replace(d);
		if (bpf_map_update_elem(&live, &d->key, &u.l, BPF_ANY)) {
			count(REASON_LIVE_LOST);
			return;
		}
	}
	d->open = true;
	add(d->group, 1);
}

/* note has an MPTCP socket find what was asked for. Where that is not possible
 * by its addresses, the decision goes to socket storage, which it can be found
 * with; if there is no memory for that, such a socket sees the endpoint.
 */
static __always_inline void note(struct bpf_sock *sk, struct decision *d,
				 __u64 cookie)
{
	bool cell = d->owner == cookie;
	struct decision *kept;

	/* Names hooks of the former layout may have it in a cell, and look
	 * there.
	 */
	if (!cell && !(cfg_moves & PL_MOVES_CELLS)) {
		forget_others(d);
		return;
	}
	if (note_sent(d, cookie))
		return;
	forget_others(d);
	if (!cell)
		return;
	kept = bpf_sk_storage_get(&decisions, sk, d,
				  BPF_SK_STORAGE_GET_F_CREATE);
	if (!kept) {
		count(REASON_NO_MEMORY);
		return;
	}
	kept->owner = 0;
	tally(TALLY_STORED);
	swap(&d->owner, cookie, 0);
}

static __always_inline void on_open(struct bpf_sock_ops *ctx,
				    struct bpf_sock *sk, struct decision *d,
				    __u64 cookie)
{
	bool v4 = speaks_v4(ctx);

	tally(TALLY_CONNECTS);
	if (!d || !d->pending) {
		tally(TALLY_ESCAPED);
		count(REASON_NO_DECISION);
		return;
	}
	d->pending = false;
	d->followed = true;
	d->half = 0;
	/* Before what was picked is taken for what it became: somebody who
	 * comes after us may have rewritten it.
	 */
	if (d->path == PATH_DIRECT && !is_picked(d))
		d->endpoint = PL_ENDPOINTS; /* nobody's */
	d->key.source = local_addr(ctx, v4);
	d->key.slot = remote_addr(ctx, v4);
	d->key.source_port = ctx->local_port;
	d->key.slot_port = bpf_ntohl(ctx->remote_port);
	switch (d->path) {
	case PATH_RELAY:
		tally(TALLY_SENT_RELAY);
		let_in(ctx, d);
		break;
	case PATH_DIRECT:
		tally(TALLY_SENT_DIRECT);
		count_live(d, true);
		note(sk, d, cookie); /* d is another's from here on */
		break;
	default:
		tally(TALLY_SENT_PASS);
		if (d->reason != REASON_NETNS)
			forget_others(d);
	}
	/* One set of flags for every program on the socket: add, never set. */
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags |
					       BPF_SOCK_OPS_STATE_CB_FLAG |
					       BPF_SOCK_OPS_RTO_CB_FLAG);
}

static __always_inline void on_established(struct decision *d)
{
	if (!d || !d->followed || d->established)
		return;
	d->established = bpf_ktime_get_ns();
	if (d->path == PATH_DIRECT)
		answered_by(d);
}

/* on_fin, with its own FIN queued, takes a connection that its application has
 * closed off the endpoint's count. That is where the application runs, and will
 * pick again: CLOSE may come on another processor, and the next pick would wait
 * for the count to come back from there. Who has only shut one direction counts
 * on.
 */
static __always_inline void on_fin(struct decision *d)
{
	if (d && d->followed && d->released && d->path == PATH_DIRECT)
		count_live(d, false);
}

static __always_inline void on_half_closed(struct bpf_sock_ops *ctx,
					   struct decision *d)
{
	if (!d || !d->followed)
		return;
	d->half = ctx->bytes_received;
	d->closed_first = d->released;
}

/* tell_gone cancels the dial of an application that gave up. If the ring is
 * full, the worker finds out when it looks whether the application still waits.
 */
static __always_inline void tell_gone(const struct decision *d)
{
	struct live *l = bpf_map_lookup_elem(&live, &d->key);
	struct held *h;
	void *ring, *theirs;
	__u64 index;

	if (l) {
		if (l->hold != HOLD_YES || !l->worker)
			return;
		index = l->worker - 1;
	} else if (cfg_moves & PL_MOVES_LIVE) {
		theirs = bpf_map_lookup_elem(&former_live, &d->key);
		if (!theirs || *(__u8 *)former_hold(theirs) != HOLD_YES)
			return;
		index = *(__u8 *)former_worker(theirs);
		if (!index)
			return;
		index--;
	} else {
		return;
	}
	ring = bpf_map_lookup_elem(&held, &index);
	if (!ring)
		return;
	h = bpf_ringbuf_reserve(ring, sizeof(*h), 0);
	if (!h) {
		count(REASON_HOLD_FULL);
		return;
	}
	h->key = d->key;
	h->mark = 0;
	h->kind = HELD_GONE;
	h->size = 0;
	bpf_ringbuf_submit(h, 0);
}

/* keep_departed remembers a connection that its application has closed, and on
 * which nothing came, not even an end: it may wait to be accepted. One that the
 * application has reset is not worth it, whoever sees that first.
 */
static __always_inline void keep_departed(struct bpf_sock_ops *ctx,
					  const struct decision *d, __u32 from)
{
	struct live *l;
	void *theirs;

	if (ctx->bytes_received ||
	    (from != BPF_TCP_FIN_WAIT1 && from != BPF_TCP_FIN_WAIT2))
		return;
	l = bpf_map_lookup_elem(&live, &d->key);
	if (l) {
		bpf_map_update_elem(&departed, &d->key, l, BPF_ANY);
	} else if (cfg_moves & PL_MOVES_LIVE) {
		theirs = bpf_map_lookup_elem(&former_live, &d->key);
		if (theirs)
			bpf_map_update_elem(&former_departed, &d->key, theirs,
					    BPF_ANY);
	}
}

/* let_go deletes the entry of a connection, and tells whether there was one.
 * The former one goes first: who copies it looks then whether it is still
 * there.
 */
static __always_inline bool let_go(const struct decision *d)
{
	bool theirs;

	if (!(cfg_moves & PL_MOVES_LIVE))
		return !bpf_map_delete_elem(&live, &d->key);
	theirs = !bpf_map_delete_elem(&former_live, &d->key);
	return !bpf_map_delete_elem(&live, &d->key) || theirs;
}

/* keep_asked remembers what an application asked for that has not closed the
 * socket: see outlived.
 */
static __always_inline void keep_asked(const struct decision *d)
{
	union {
		__u64 d[3];
		struct endpoint_key k;
	} u = { .d = { PAIR(d->orig.w[0], d->orig.w[1]),
		       PAIR(d->orig.w[2], d->orig.w[3]), d->orig_port } };

	if (d->established && !d->released)
		bpf_map_update_elem(&outlived, &d->key, &u.k, BPF_ANY);
}

static __always_inline void
on_close(struct bpf_sock_ops *ctx, struct decision *d, __u64 cookie, __u32 from)
{
	struct end how = {};
	struct peer_end peer = {};
	struct conn_event *e;
	enum ending ending;

	if (!d->followed)
		return;
	how.state = from;
	how.segs_in = ctx->segs_in;
	how.unacked = ctx->packets_out;
	how.expired = d->expired;
	how.released = d->released;
	ending = ending_of(&how);
	if (d->path == PATH_DIRECT) {
		keep_asked(d);
		count_live(d, false);
		if (from == BPF_TCP_SYN_SENT &&
		    is_failure(ending, ctx->total_retrans))
			failed(d, ending);
	}
	if (d->open) {
		d->open = false;
		if (d->hold && from == BPF_TCP_SYN_SENT)
			tell_gone(d);
		keep_departed(ctx, d, from);
		/* The process deletes it when it reconciles; then it has
		 * counted too.
		 */
		if (let_go(d))
			add(d->group, -1);
	}
	peer.state = from;
	peer.released = d->released;
	peer.closed_first = d->closed_first;
	peer.half = d->half;
	peer.received = ctx->bytes_received;
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		lost(d->group);
		return;
	}
	e->cookie = cookie;
	e->cgroup = d->cgroup;
	e->group = d->group;
	e->opened = d->opened;
	e->ended = bpf_ktime_get_ns();
	e->sent = ctx->bytes_acked;
	e->received = ctx->bytes_received - peer_ended(&peer);
	e->source = d->key.source;
	if (d->path == PATH_RELAY && !is_zero(&d->seen))
		e->source = d->seen;
	e->orig = d->orig;
	e->srtt_us = ctx->srtt_us >> 3; /* kept times eight */
	e->retransmits = ctx->total_retrans;
	e->source_port = d->key.source_port;
	e->orig_port = d->orig_port;
	e->kind = EVENT_END;
	e->path = d->path;
	e->reason = d->reason;
	e->ending = ending;
	e->connect = d->established ? d->established - d->opened : 0;
	if (d->path == PATH_RELAY) {
		__builtin_memset(&e->endpoint, 0, sizeof(e->endpoint));
		e->endpoint_port = 0;
	} else {
		e->endpoint = d->key.slot;
		e->endpoint_port = d->key.slot_port;
	}
	__builtin_memset(e->zero, 0, sizeof(e->zero));
	bpf_ringbuf_submit(e, event_flags());
}

/* keep_seen has an application whose connection has ended still find the
 * address of its own that it was shown, as long as the kernel remembers where
 * it was connected to. The cell goes, so this is in storage; who closes the
 * socket, or has closed it before, does without.
 */
static __always_inline void keep_seen(struct bpf_sock *sk, struct decision *d,
				      __u64 cookie)
{
	struct decision *kept;

	if (d->owner != cookie || d->path != PATH_RELAY || !d->followed ||
	    d->released || is_zero(&d->seen))
		return;
	kept = bpf_sk_storage_get(&decisions, sk, d,
				  BPF_SK_STORAGE_GET_F_CREATE);
	if (!kept)
		return;
	kept->owner = 0;
	kept->followed = false;
}

#define CACHE_LINE 64 /* bytes, of x86-64 and of nearly all arm64 */

/* fetch begins to read the cell of a cookie from memory, and does not wait.
 * Each processor gives out cookies in turn, so the next socket to connect there
 * has the next one, whose cell was last used PL_CELLS sockets ago. Without this
 * the connect hook waits for it longer than for anything else; there it is too
 * late to begin.
 */
static __always_inline void fetch(__u64 cookie)
{
	volatile __u8 *cell = (void *)cell_at(cookie);

	if (!cell)
		return;
	for (__u32 at = 0; at < sizeof(struct decision); at += CACHE_LINE)
		cell[at];
	cell[sizeof(struct decision) - 1];
}

/* is_news is false for what most calls are about: states that say nothing, and
 * retransmissions after which the kernel goes on. Then the socket's entry is
 * not looked up.
 */
static __always_inline bool is_news(__u32 op, __u32 to, __u32 expired)
{
	switch (op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		return true;
	case BPF_SOCK_OPS_RTO_CB:
		return expired;
	default:
		return to == BPF_TCP_ESTABLISHED || to == BPF_TCP_FIN_WAIT1 ||
		       to == BPF_TCP_LAST_ACK || to == BPF_TCP_FIN_WAIT2 ||
		       to == BPF_TCP_CLOSE;
	}
}

/* wipe clears a former entry, but for the handler's tag: its connection has
 * ended. The loader writes its body.
 */
static __noinline __u64 wipe(void *from)
{
	__u64 done;

	asm volatile("%0 = 0" : "=r"(done) : "r"(from) : "memory");
	return done;
}

SEC("sockops")
int pl_sockops(struct bpf_sock_ops *ctx)
{
	__u32 op = ctx->op, from, to;
	__u64 cookie;
	struct bpf_sock *sk;
	struct decision *d;
	void *before;

	if (op != BPF_SOCK_OPS_TCP_CONNECT_CB && op != BPF_SOCK_OPS_STATE_CB &&
	    op != BPF_SOCK_OPS_RTO_CB) {
		/* TIMEOUT_INIT, RWND_INIT and the like: -1 is "no opinion". */
		ctx->reply = -1;
		return 1;
	}
	from = ctx->args[0];
	to = ctx->args[1];
	if (!is_news(op, to, ctx->args[2]))
		return 1;
	sk = ctx->sk;
	if (!sk)
		return 1;
	cookie = bpf_get_socket_cookie(ctx);
	d = decision_of(sk, cookie);
	if (op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		on_open(ctx, sk, d, cookie);
		fetch(cookie + 1);
	} else if (op == BPF_SOCK_OPS_RTO_CB) {
		/* The kernel is about to give up. */
		if (d)
			d->expired = true;
	} else if (to == BPF_TCP_ESTABLISHED) {
		on_established(d);
	} else if (to == BPF_TCP_FIN_WAIT1 || to == BPF_TCP_LAST_ACK) {
		on_fin(d);
	} else if (to == BPF_TCP_FIN_WAIT2) {
		on_half_closed(ctx, d);
	} else if (to == BPF_TCP_CLOSE) {
		if (d) {
			on_close(ctx, d, cookie, from);
			keep_seen(sk, d, cookie);
			/* Last: it can be asked until the kernel forgets it. */
			if (d->path == PATH_DIRECT)
				forget_sent(cookie);
			d->followed = false; /* release may leave it now */
		}
		give_back(cookie);
		/* Or a hook of the former layout would count its end again. */
		if (cfg_moves & PL_MOVES_SOCKETS) {
			before = bpf_sk_storage_get(&former, sk, NULL, 0);
			if (before)
				wipe(before);
		}
		if (cfg_moves & PL_MOVES_CELLS) {
			before = former_cell_at(cookie);
			if (before && formerly(before, cookie))
				wipe(before);
		}
	}
	return 1;
}
