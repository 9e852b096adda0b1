//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* connect(2) and bind(2) of the sockets in scope, and the end of a socket. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "include/decision.h"
#include "include/judge.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define PROCEED 1
#define REFUSE 0

/* group_of gives the cgroup whose quotas count: the container, one level below
 * the scope, or the scope itself for a task that sits right in it.
 */
static __always_inline __u64 group_of(__u64 cgroup)
{
	__u64 id;

	if (cgroup == cfg_scope)
		return cgroup;
	id = bpf_get_current_ancestor_cgroup_id(cfg_scope_level + 1);
	return id ? id : cgroup;
}

static __always_inline void tell_denied(const struct gathered *g, __u64 cookie)
{
	struct conn_event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e) {
		lost(g->group);
		return;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->cookie = cookie;
	e->cgroup = g->cgroup;
	e->group = g->group;
	e->opened = g->now;
	e->ended = g->now;
	e->source = g->bound;
	e->orig = g->dst;
	e->orig_port = g->port;
	e->kind = EVENT_DENIED;
	e->path = PATH_DENY;
	e->reason = g->why;
	bpf_ringbuf_submit(e, event_flags());
}

__noinline __u32 by_maps(struct gathered *g, struct details *more)
{
	/* Or clang would see that more is not used, and pass anything. */
	asm volatile("" : : "r"(more));
	return g ? plan_for(g, NULL, false) : PATH_PASS;
}

__noinline int choose_soon(struct gathered *g, struct details *more)
{
	asm volatile("" : : "r"(more));
	return g ? choose_first(g, NULL, false) : 0;
}

__noinline int choose(struct gathered *g, struct details *more)
{
	asm volatile("" : : "r"(more));
	return g ? choose_one(g, NULL, false) : 0;
}

/* unsent is for a connect that was decided, and that the kernel itself refused
 * before a segment left. The endpoint is blamed only where the namespace has no
 * route to it: an application could eject it for others by a source or an
 * option that does not go with it.
 */
static __noinline void unsent(struct decision *d)
{
	union {
		__u64 d[3];
		struct prefix_key k;
	} u = { .d = { PAIR(128, d->key.slot.w[0]),
		       PAIR(d->key.slot.w[1], d->key.slot.w[2]),
		       d->key.slot.w[3] } };
	struct route *way;

	d->pending = false;
	tally(TALLY_UNSENT);
	count(REASON_UNSENT);
	if (d->path != PATH_DIRECT || !is_picked(d))
		return;
	way = bpf_map_lookup_elem(&routes, &u.k);
	if (!way || way->kind != ROUTE_UNICAST)
		failed(d, ENDING_UNREACHABLE);
	else
		untold(d);
}

/* claim makes a free cell the socket's. A cookie that was made while another
 * was being made is counted down from 2^64: it would look like PL_CELL_LEFT.
 */
static __always_inline bool claim(struct decision *d, __u64 cookie, __u64 now)
{
	__u64 owner;

	if (cookie & PL_CELL_LEFT)
		return false;
	owner = *(volatile __u64 *)&d->owner;
	if ((owner && !(owner & PL_CELL_LEFT)) ||
	    !swap(&d->owner, owner, cookie))
		return false;
	/* Of a socket whose end no hook saw. */
	if (owner && d->pending)
		unsent(d);
	d->opened = now;
	d->pending = false;
	d->own = false;
	d->open = false;
	d->followed = false;
	d->counted = false;
	d->released = false;
	d->half = 0;
	d->closed_first = 0;
	return true;
}

/* place gives where the decision on a socket is kept, and makes it. The process
 * looks for cells that were left in its own network namespace only. What may be
 * NULL is left to the caller to look at, and only once: see found.
 */
static __always_inline struct decision *place(struct bpf_sock_addr *ctx,
					      struct gathered *g)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct decision *cell, *d;

	g->seed = (__u32)(g->now ^ cookie); /* its words are mixed */
	carry_any(ctx->sk, cookie);
	cell = cell_at(cookie);
	if (!cell)
		return NULL; /* cannot be: array maps have every entry */
	d = cell;
	if (!is_held_by(cell, cookie))
		d = bpf_sk_storage_get(&decisions, ctx->sk, NULL, 0);
	if (d) {
		/* Or the process might take the cell to be left meanwhile. */
		d->opened = g->now;
		return d;
	}
	if (bpf_get_netns_cookie(ctx) == cfg_netns &&
	    claim(cell, cookie, g->now))
		return cell;
	if (bpf_sk_storage_get(&decisions, ctx->sk, NULL,
			       BPF_SK_STORAGE_GET_F_CREATE))
		tally(TALLY_STORED);
	return bpf_sk_storage_get(&decisions, ctx->sk, NULL, 0);
}

/* remember keeps the decision with the socket, for sockops. */
static __always_inline void remember(struct bpf_sock_addr *ctx,
				     const struct gathered *g,
				     struct decision *d, enum conn_path path)
{
	/* The last decision on this socket never became a SYN. */
	if (d->pending)
		unsent(d);
	/* Nor was its end seen, where another agent cleared the flags. */
	count_live(d, false);
	d->orig = g->dst;
	d->orig_port = g->port;
	d->bound = g->bound;
	d->seen = g->source;
	if (is_bound(&g->bound))
		__builtin_memset(&d->seen, 0, sizeof(d->seen));
	d->mark = ctx->sk->mark;
	d->priority = ctx->sk->priority;
	d->cgroup = g->cgroup;
	d->group = g->group;
	d->opened = g->now;
	d->path = path;
	d->reason = g->why;
	d->pending = true;
	d->hold = g->hold;
	d->open = false;
	d->followed = false;
	d->expired = false;
	d->established = 0;
	if (path == PATH_DIRECT) {
		d->key.slot = g->to;
		d->key.slot_port = g->to_port;
		d->set = g->set;
		d->endpoint = g->endpoint;
		d->half = g->trial;
	}
}

/* exempt gives the reason to leave the connection alone, or REASON_NONE. cell
 * is that of the socket, which then is of our namespace, or 0. It is no static
 * function for the reason that choose is none.
 */
__noinline int exempt(struct bpf_sock_addr *ctx, const struct gathered *g,
		      __u64 self, __u64 cell)
{
	__u64 zero = 0;
	struct settings *set = bpf_map_lookup_elem(&settings, &zero);
	struct attempt a = {};
	struct ip_addr dst;

	if (!g || !set)
		return REASON_NONE; /* cannot be, and by_maps passes it */
	dst = LOAD_IP6(g->dst.w);
	a.dst = dst;
	a.netns = cell ? cfg_netns : bpf_get_netns_cookie(ctx);
	a.our_netns = cfg_netns;
	a.bound_dev = ctx->sk->bound_dev_if;
	a.slot4 = cfg_slot4;
	a.slot6 = cfg_slot6;
	a.protocol = ctx->protocol;
	a.self = self || (set->own_group && g->group == set->own_group);
	a.own_addr = is_own_addr(&dst);
	if (in_supernet(&dst))
		a.slot_listener = slot_answers(ctx, &dst, g->port);
	return leave_alone(&a);
}

/* is_ordinary is true where exempt is sure to give REASON_NONE: for most
 * connects, by a tenth of the instructions.
 */
static __always_inline bool is_ordinary(struct bpf_sock_addr *ctx,
					const struct gathered *g,
					const struct decision *d)
{
	__u64 zero = 0;
	struct settings *set = bpf_map_lookup_elem(&settings, &zero);

	return set && d->owner && !d->own && is_plain(&g->dst) &&
	       !ctx->sk->bound_dev_if &&
	       (!set->own_group || g->group != set->own_group) &&
	       is_surely_not_own(&g->dst);
}

static __noinline void denied(struct bpf_sock_addr *ctx,
			      const struct gathered *g)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);

	tally(TALLY_DENIED);
	tell_denied(g, cookie);
	give_back(cookie);
}

/* without decides on a socket that nothing is kept of: it is none of TCP, or
 * there is no memory.
 */
static __always_inline enum conn_path without(struct bpf_sock_addr *ctx,
					      struct gathered *g)
{
	enum conn_path path;

	g->why = exempt(ctx, g, false, 0);
	path = judge(ctx, g, false, NULL, false);
	count(g->why);
	if (path == PATH_DENY && ctx->protocol == IPPROTO_TCP)
		denied(ctx, g);
	return path;
}

/* on_connect decides on one connect(2). When the path is PATH_RELAY or
 * PATH_DIRECT, g says where the connection goes.
 */
static __always_inline enum conn_path on_connect(struct bpf_sock_addr *ctx,
						 struct gathered *g)
{
	enum conn_path path;
	struct decision *d;

	if (ctx->protocol != IPPROTO_TCP)
		return without(ctx, g);
	d = place(ctx, g);
	if (!d)
		return without(ctx, g);
	if (!is_ordinary(ctx, g, d))
		g->why = exempt(ctx, g, d->own, d->owner);
	path = judge(ctx, g, true, NULL, false);
	count(g->why);
	if (path == PATH_DENY) {
		denied(ctx, g);
		return path;
	}
	remember(ctx, g, d, path);
	tally(TALLY_DECIDED);
	return path;
}

static __always_inline int refuse(int err)
{
	bpf_set_retval(-err);
	return REFUSE;
}

SEC("cgroup/connect4")
int pl_connect4(struct bpf_sock_addr *ctx)
{
	__u32 ip = ctx->user_ip4;
	__u32 src = ctx->sk->src_ip4;
	struct gathered g = {
		.dst = mapped(ip),
		.now = bpf_ktime_get_ns(),
		.cgroup = bpf_get_current_cgroup_id(),
		.port = bpf_ntohs((__u16)ctx->user_port),
	};

	g.group = group_of(g.cgroup);
	if (src)
		g.bound = mapped(src);
	switch (on_connect(ctx, &g)) {
	case PATH_DENY:
		return refuse(g.err);
	case PATH_RELAY:
		ctx->user_ip4 = g.to.w[3];
		return PROCEED;
	case PATH_DIRECT:
		ctx->user_ip4 = g.to.w[3];
		ctx->user_port = bpf_htons(g.to_port);
		return PROCEED;
	default:
		return PROCEED;
	}
}

SEC("cgroup/connect6")
int pl_connect6(struct bpf_sock_addr *ctx)
{
	struct gathered g = {
		.dst = LOAD_IP6(ctx->user_ip6),
		.bound = LOAD_IP6(ctx->sk->src_ip6),
		.now = bpf_ktime_get_ns(),
		.cgroup = bpf_get_current_cgroup_id(),
		.port = bpf_ntohs((__u16)ctx->user_port),
	};

	g.group = group_of(g.cgroup);
	switch (on_connect(ctx, &g)) {
	case PATH_DENY:
		return refuse(g.err);
	case PATH_RELAY:
		STORE_IP6(ctx->user_ip6, g.to);
		return PROCEED;
	case PATH_DIRECT:
		STORE_IP6(ctx->user_ip6, g.to);
		ctx->user_port = bpf_htons(g.to_port);
		return PROCEED;
	default:
		return PROCEED;
	}
}

/* A listener on one of our slots would answer in the handler's place if the
 * lookup program ever went missing. Ranges of other instances are theirs to
 * guard, and a nested Pillion has to bind its own; ranges that nobody claimed
 * are not local, so the kernel refuses them. A handler that is itself in scope
 * has tagged its listeners.
 */
static __always_inline int on_bind(struct bpf_sock_addr *ctx,
				   const struct ip_addr *a)
{
	struct decision *d;
	__u64 cookie;

	if (slot_of(a, cfg_slot4, cfg_slot6) < 0)
		return PROCEED;
	cookie = bpf_get_socket_cookie(ctx);
	d = decision_of(ctx->sk, cookie);
	if (d && d->own)
		return PROCEED;
	count(REASON_SLOT_ADDRESS);
	return refuse(EADDRNOTAVAIL);
}

SEC("cgroup/bind4")
int pl_bind4(struct bpf_sock_addr *ctx)
{
	struct ip_addr a = mapped(ctx->user_ip4);

	return on_bind(ctx, &a);
}

SEC("cgroup/bind6")
int pl_bind6(struct bpf_sock_addr *ctx)
{
	struct ip_addr a = LOAD_IP6(ctx->user_ip6);

	return on_bind(ctx, &a);
}

/* is_of tells whether a decision is still the socket's. 0 is in storage, or a
 * cell that was given back meanwhile, and that nobody has taken yet.
 */
static __always_inline bool is_of(const struct decision *d, __u64 cookie)
{
	__u64 owner = *(volatile __u64 *)&d->owner;

	return !owner || owner == cookie;
}

/* A decision that never became a SYN (no source port, no route) is known when
 * its socket goes. This is before the connection is ended.
 *
 * It is the one hook without the socket's lock: where the connection ends at
 * this very moment, its cell may be another's when the release is noted there,
 * of a socket whose cookie ends in the same digits. That would do no more than
 * give the record of that one another ending, and count it out early if it is
 * half closed. What is pending is looked at before whose it is: a cell is not
 * given back while that is so, and another's must not be taken for unsent.
 */
SEC("cgroup/sock_release")
int pl_release(struct bpf_sock *ctx)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct decision *d = decision_of(ctx, cookie);

	if (!d)
		return PROCEED;
	if (is_of(d, cookie))
		d->released = true;
	if (*(volatile __u8 *)&d->pending) {
		fence();
		if (is_of(d, cookie))
			unsent(d);
	}
	give_back(cookie); /* or else at CLOSE */
	return PROCEED;
}
