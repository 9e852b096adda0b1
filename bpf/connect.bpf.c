//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* connect(2) and bind(2) of the sockets in scope, and the end of a socket. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "include/config.h"
#include "include/count.h"
#include "include/decide.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define PROCEED 1
#define REFUSE 0
#define NS_PER_S 1000000000ULL

/* What the entry read of ctx. One read each: the verifier refuses pointers into
 * ctx that clang has moved ("dereference of modified ctx ptr").
 */
struct gathered {
	struct ip_addr dst;
	struct ip_addr bound;
	struct ip_addr source; /* out: that of the route */
	__u64 now;
	__u64 group;
	__u64 mark;
	__u64 priority;
	__u64 port;
	__u64 hold; /* out: the handshake waits for the dial */
	__u64 err; /* out: what a refused connect returns */
};

/* container_of_task is the cgroup whose quotas count: the container, one level
 * below the scope, or the scope itself for a task that sits right in it.
 */
static __always_inline __u64 group_of_task(void)
{
	__u64 id = bpf_get_current_ancestor_cgroup_id(cfg_scope_level + 1);

	return id ? id : bpf_get_current_cgroup_id();
}

static __always_inline bool rule_names(void *trie, const struct gathered *g)
{
	union {
		__u64 d[3];
		struct rule_key k;
	} u = { .d = { PAIR(PL_RULE_PORT_BITS + 128,
			    g->port | (is_mapped(&g->dst) ? 4 : 6) << 16),
		       PAIR(g->dst.w[0], g->dst.w[1]),
		       PAIR(g->dst.w[2], g->dst.w[3]) } };

	if (bpf_map_lookup_elem(trie, &u.k))
		return true;
	u.d[0] &= ~(0xffffULL << 32); /* any port */
	return bpf_map_lookup_elem(trie, &u.k) != NULL;
}

/* has_route also notes the route's source, which is what a socket without an
 * address of its own would get.
 */
static __always_inline bool has_route(struct gathered *g)
{
	union {
		__u64 d[3];
		struct prefix_key k;
	} u = { .d = { PAIR(128, g->dst.w[0]), PAIR(g->dst.w[1], g->dst.w[2]),
		       g->dst.w[3] } };
	struct route *way = bpf_map_lookup_elem(&routes, &u.k);

	if (!way)
		return false;
	g->source = LOAD_IP6(way->source.w);
	return way->kind == ROUTE_UNICAST;
}

/* slot_answers runs the sk_lookup programs of the socket's namespace for a slot
 * address. Only a handler can be found there with a slot as its own address: an
 * application cannot bind one.
 */
static __always_inline bool slot_answers(struct bpf_sock_addr *ctx,
					 const struct ip_addr *to, __u16 port)
{
	union {
		__u64 d[5];
		struct bpf_sock_tuple t;
	} u = {};
	struct bpf_sock *sk;
	struct ip_addr at;

	if (is_mapped(to)) {
		u.d[0] = PAIR(0, to->w[3]);
		u.d[1] = PAIR(bpf_htons(port) << 16, 0);
		sk = bpf_sk_lookup_tcp(ctx, &u.t, sizeof(u.t.ipv4),
				       BPF_F_CURRENT_NETNS, 0);
		if (!sk)
			return false;
		at = mapped(sk->src_ip4);
	} else {
		u.d[2] = PAIR(to->w[0], to->w[1]);
		u.d[3] = PAIR(to->w[2], to->w[3]);
		u.d[4] = PAIR(bpf_htons(port) << 16, 0);
		sk = bpf_sk_lookup_tcp(ctx, &u.t, sizeof(u.t.ipv6),
				       BPF_F_CURRENT_NETNS, 0);
		if (!sk)
			return false;
		at = LOAD_IP6(sk->src_ip6);
	}
	bpf_sk_release(sk);
	return in_supernet(&at);
}

/* fetch_add is what clang gives __sync_fetch_and_add for -mcpu=v3 only. */
static __always_inline __u32 fetch_add(__u32 *p, __u32 by)
{
	register __u64 r0 asm("r0") = by;

	asm volatile("w0 = atomic_fetch_add((u32 *)(%1 + 0), w0)"
		     : "+r"(r0)
		     : "r"(p)
		     : "memory");
	return r0;
}

/* take_slot finds or names the slot of an address. */
static __always_inline enum reason
take_slot(const struct gathered *g, struct state *st, __u32 quota, __u64 *index)
{
	__u32 *have = bpf_map_lookup_elem(&slot_by_orig, &g->dst);
	struct usage *use;
	struct slot *s;
	__u64 n = 0;

	if (have) {
		*index = *have;
		s = bpf_map_lookup_elem(&slots, index);
		/* To the second: a store per connect would bounce the line
		 * between CPUs.
		 */
		if (s && g->now - s->used > NS_PER_S)
			s->used = g->now;
		return REASON_NONE;
	}
	use = usage_of(g->group);
	if (use && quota && use->slots >= quota)
		return REASON_SLOT_QUOTA;
	if (bpf_map_pop_elem(&free_slots, &n)) {
		if (st->next_slot > PL_SLOT_LAST)
			return REASON_NO_SLOT;
		n = fetch_add(&st->next_slot, 1);
		if (n > PL_SLOT_LAST)
			return REASON_NO_SLOT;
	}
	s = bpf_map_lookup_elem(&slots, &n);
	if (!s)
		return REASON_NO_SLOT;
	/* The way back first: who finds a slot must be able to resolve it. */
	s->orig = g->dst;
	s->used = g->now;
	s->group = g->group;
	s->state = SLOT_NAMED;
	if (!bpf_map_update_elem(&slot_by_orig, &g->dst, &n, BPF_NOEXIST)) {
		/* Once more: on a pointer that it already knows to be NULL, the
		 * verifier of 6.1 follows what the processor may speculate,
		 * and refuses the store.
		 */
		use = bpf_map_lookup_elem(&usage_by_group, &g->group);
		if (use)
			__sync_fetch_and_add(&use->slots, 1);
		*index = n;
		return REASON_NONE;
	}
	/* Another CPU named the same address first, or there is no memory. */
	s->state = SLOT_FREE;
	s->group = 0;
	bpf_map_push_elem(&free_slots, &n, BPF_ANY);
	have = bpf_map_lookup_elem(&slot_by_orig, &g->dst);
	if (!have)
		return REASON_NO_MEMORY;
	*index = *have;
	return REASON_NONE;
}

/* redirect gives the destination's slot, or the reason why there is none. */
static __always_inline enum reason redirect(struct bpf_sock_addr *ctx,
					    const struct gathered *g,
					    const struct settings *set,
					    struct ip_addr *slot)
{
	__u64 zero = 0, index = 0;
	struct beat *b = bpf_map_lookup_elem(&beat, &zero);
	struct state *st = bpf_map_lookup_elem(&state, &zero);
	struct usage *use;
	struct health h = {};
	enum reason why;

	if (!b || !st)
		return REASON_NO_MEMORY;
	h.now = g->now;
	h.stamp = b->stamp;
	h.max_age = b->max_age;
	h.busy = b->busy;
	h.live = st->live;
	h.live_max = set->live_max;
	h.draining = set->draining;
	h.family = (set->families >> !is_mapped(&g->dst)) & 1;
	h.listener = true;
	h.conn_quota = set->conn_quota;
	if (h.conn_quota) {
		use = usage_of(g->group);
		h.conns = use ? use->conns : 0;
	}
	why = obstacle(&h);
	if (why != REASON_NONE)
		return why;

	/* The listener slot stands for all: the same program answers. */
	*slot = slot_addr(&g->dst, PL_SLOT_LISTENER, cfg_slot4, cfg_slot6);
	h.listener = slot_answers(ctx, slot, g->port);
	why = obstacle(&h);
	if (why != REASON_NONE)
		return why;

	why = take_slot(g, st, set->slot_quota, &index);
	if (why == REASON_NONE)
		*slot = slot_addr(&g->dst, index, cfg_slot4, cfg_slot6);
	return why;
}

static __always_inline void tell_denied(const struct gathered *g,
					enum reason why, __u64 cookie)
{
	struct conn_event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e) {
		lost(g->group);
		return;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->cookie = cookie;
	e->cgroup = bpf_get_current_cgroup_id();
	e->group = g->group;
	e->opened = g->now;
	e->ended = g->now;
	e->source = g->bound;
	e->orig = g->dst;
	e->orig_port = g->port;
	e->kind = EVENT_DENIED;
	e->path = PATH_DENY;
	e->reason = why;
	bpf_ringbuf_submit(e, event_flags());
}

/* is_bound is false for the unspecified addresses of both families. */
static __always_inline bool is_bound(const struct ip_addr *a)
{
	return a->w[0] || a->w[1] || a->w[3];
}

/* remember keeps the decision with the socket, for sockops. It looks the
 * socket's entry up again: where a pointer is known to be NULL, the verifier
 * of 6.1 follows what the processor may speculate, and refuses to use it there.
 */
static __always_inline bool remember(struct bpf_sock_addr *ctx,
				     const struct gathered *g,
				     enum conn_path path, enum reason why)
{
	struct decision *d = bpf_sk_storage_get(&decisions, ctx->sk, NULL, 0);

	if (!d)
		return false;
	/* The last decision on this socket never became a SYN. */
	if (d->pending) {
		tally(TALLY_UNSENT);
		count(REASON_UNSENT);
	}
	d->orig = g->dst;
	d->orig_port = g->port;
	d->bound = g->bound;
	d->seen = g->source;
	if (is_bound(&g->bound))
		__builtin_memset(&d->seen, 0, sizeof(d->seen));
	d->mark = g->mark;
	d->priority = g->priority;
	d->cgroup = bpf_get_current_cgroup_id();
	d->group = g->group;
	d->opened = g->now;
	d->path = path;
	d->reason = why;
	d->pending = true;
	d->hold = g->hold;
	d->open = false;
	d->followed = false;
	return true;
}

/* answered_until is until when an earlier answer of a destination counts. */
static __always_inline __u64 answered_until(const void *key)
{
	__u64 *until = bpf_map_lookup_elem(&answered, key);

	return until ? *until : 0;
}

/* on_connect decides on one connect(2). When the path is PATH_RELAY, slot is
 * where the connection goes.
 */
static __always_inline enum conn_path
on_connect(struct bpf_sock_addr *ctx, struct gathered *g, struct ip_addr *slot)
{
	__u64 zero = 0, unavailable = 0, no_endpoint = 0;
	__u32 on_failure, mode;
	struct settings *set = bpf_map_lookup_elem(&settings, &zero);
	union {
		__u64 d[3];
		struct endpoint_key k;
	} key = { .d = { PAIR(g->dst.w[0], g->dst.w[1]),
			 PAIR(g->dst.w[2], g->dst.w[3]), g->port } };
	struct service *service = NULL;
	struct decision *d;
	bool kept = false;
	struct attempt a = {};
	struct facts f = {};
	enum reason why;
	enum conn_path path;

	if (!set)
		return PATH_PASS; /* cannot be: array maps have every entry */
	on_failure = set->on_failure;
	mode = set->connect;
	g->err = ECONNREFUSED;
	a.dst = g->dst;
	a.netns = bpf_get_netns_cookie(ctx);
	a.our_netns = cfg_netns;
	a.bound_dev = ctx->sk->bound_dev_if;
	a.slot4 = cfg_slot4;
	a.slot6 = cfg_slot6;
	a.protocol = ctx->protocol;
	if (a.protocol == IPPROTO_TCP) {
		d = bpf_sk_storage_get(&decisions, ctx->sk, NULL,
				       BPF_SK_STORAGE_GET_F_CREATE);
		if (d) {
			kept = true;
			a.self = d->own;
		}
	}
	a.own_addr = bpf_map_lookup_elem(&own_addrs, &g->dst) != NULL;
	if (in_supernet(&a.dst))
		a.slot_listener = slot_answers(ctx, &g->dst, g->port);

	why = leave_alone(&a);
	if (why == REASON_NONE) {
		f.denied = set->deny_rules && rule_names(&deny, g);
		f.excluded = set->exclude_rules && rule_names(&exclude, g);
		service = bpf_map_lookup_elem(&services, &key.k);
		if (service) {
			f.service = true;
			on_failure = service->on_failure;
			mode = service->connect;
			unavailable = service->unavailable;
			no_endpoint = service->no_endpoint;
		}
		f.default_pass = set->default_path == PATH_PASS;
		f.foreign = is_bound(&g->bound) &&
			    !bpf_map_lookup_elem(&own_addrs, &g->bound);
		f.routed = has_route(g);
		why = by_rules(&f);
		if (why == REASON_SERVICE && g->now < unavailable) {
			why = REASON_NO_ENDPOINT;
			g->err = no_endpoint;
		}
	}
	path = path_of(why, on_failure);
	if (path == PATH_RELAY) {
		enum reason no =
			kept ? redirect(ctx, g, set, slot) : REASON_NO_MEMORY;

		if (no != REASON_NONE) {
			why = no;
			path = path_of(why, on_failure);
		} else {
			g->hold = holds(mode, g->now,
					mode == CONNECT_ADAPTIVE ?
						answered_until(&key.k) :
						0);
		}
	}

	count(why);
	if (a.protocol != IPPROTO_TCP)
		return path;
	if (path == PATH_DENY) {
		tally(TALLY_DENIED);
		tell_denied(g, why, bpf_get_socket_cookie(ctx));
		return path;
	}
	if (remember(ctx, g, path, why))
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
		.group = group_of_task(),
		.mark = ctx->sk->mark,
		.priority = ctx->sk->priority,
		.port = bpf_ntohs((__u16)ctx->user_port),
	};
	struct ip_addr slot = {};

	if (src)
		g.bound = mapped(src);
	switch (on_connect(ctx, &g, &slot)) {
	case PATH_DENY:
		return refuse(g.err);
	case PATH_RELAY:
		ctx->user_ip4 = slot.w[3];
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
		.group = group_of_task(),
		.mark = ctx->sk->mark,
		.priority = ctx->sk->priority,
		.port = bpf_ntohs((__u16)ctx->user_port),
	};
	struct ip_addr slot = {};

	switch (on_connect(ctx, &g, &slot)) {
	case PATH_DENY:
		return refuse(g.err);
	case PATH_RELAY:
		STORE_IP6(ctx->user_ip6, slot);
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

	if (slot_of(a, cfg_slot4, cfg_slot6) < 0)
		return PROCEED;
	d = bpf_sk_storage_get(&decisions, ctx->sk, NULL, 0);
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

/* A decision that never became a SYN (no source port, no route) is known when
 * its socket goes.
 */
SEC("cgroup/sock_release")
int pl_release(struct bpf_sock *ctx)
{
	struct decision *d = bpf_sk_storage_get(&decisions, ctx, NULL, 0);

	if (d && d->pending) {
		d->pending = false;
		tally(TALLY_UNSENT);
		count(REASON_UNSENT);
	}
	return PROCEED;
}
