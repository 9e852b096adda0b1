/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What becomes of a connect(2): shared by the connect hook and by its dry run,
 * so that they cannot disagree.
 */
#pragma once
#include "config.h"
#include "choose.h"

/* rule_names gives the rule that names the destination, or NULL. */
static __always_inline __u32 *rule_names(void *trie, const struct gathered *g)
{
	union {
		__u64 d[3];
		struct rule_key k;
	} u = { .d = { PAIR(PL_RULE_PORT_BITS + 128,
			    g->port | (is_mapped(&g->dst) ? 4 : 6) << 16),
		       PAIR(g->dst.w[0], g->dst.w[1]),
		       PAIR(g->dst.w[2], g->dst.w[3]) } };
	__u32 *rule = bpf_map_lookup_elem(trie, &u.k);

	if (rule)
		return rule;
	u.d[0] &= ~(0xffffULL << 32); /* any port */
	return bpf_map_lookup_elem(trie, &u.k);
}

/* is_surely_not_own is true for an address whose class has none of the
 * namespace's: so it is for nearly all that are none, and cheaper to look at.
 */
static __always_inline bool is_surely_not_own(const struct ip_addr *a)
{
	__u64 zero = 0;
	__u64 *classes = bpf_map_lookup_elem(&not_own, &zero);

	return classes && *classes >> class_of(a) & 1;
}

/* is_own_addr is true for an address of the namespace's; one of loopback or
 * link-local may be one and not be found.
 */
static __always_inline bool is_own_addr(const struct ip_addr *a)
{
	return !is_surely_not_own(a) &&
	       bpf_map_lookup_elem(&own_addrs, a) != NULL;
}

/* slot_answers runs the sk_lookup programs of the socket's namespace for a slot
 * address. Only a handler can be found there with a slot as its own address: an
 * application cannot bind one.
 */
static __noinline bool slot_answers(void *ctx, const struct ip_addr *to,
				    __u16 port)
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

/* account is a container's, opened if need be, but not by a dry run. */
static __always_inline struct usage *account(__u64 group, const bool dry)
{
	if (dry)
		return bpf_map_lookup_elem(&usage_by_group, &group);
	return usage_of(group);
}

/* take_slot finds or names the slot of an address. A dry run tells only whether
 * it could.
 */
static __always_inline enum reason take_slot(const struct gathered *g,
					     struct state *st, __u32 quota,
					     __u64 *index, const bool dry)
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
		if (!dry && s && g->now - s->used > NS_PER_S)
			s->used = g->now;
		return REASON_NONE;
	}
	use = account(g->group, dry);
	if (use && quota && use->slots >= quota)
		return REASON_SLOT_QUOTA;
	if (dry)
		return bpf_map_peek_elem(&free_slots, &n) &&
				       st->next_slot > PL_SLOT_LAST ?
			       REASON_NO_SLOT :
			       REASON_NONE;
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
static __noinline enum reason redirect(void *ctx, struct gathered *g,
				       const bool dry)
{
	__u64 zero = 0, index = 0;
	struct beat *b = bpf_map_lookup_elem(&beat, &zero);
	struct state *st = bpf_map_lookup_elem(&state, &zero);
	struct settings *set = bpf_map_lookup_elem(&settings, &zero);
	struct usage *use;
	struct health h = {};
	enum reason why;

	if (!b || !st || !set)
		return REASON_NO_MEMORY;
	h.now = g->now;
	h.stamp = b->stamp;
	h.max_age = b->max_age;
	h.busy = b->busy;
	h.live = st->live;
	/* What hooks of a former layout have counted comes later. */
	if (cfg_moves && (__s32)h.live < 0)
		h.live = 0;
	h.live_max = set->live_max;
	h.draining = set->draining;
	h.died = st->owner == PL_OWNER_DIED;
	h.family = (set->families >> !is_mapped(&g->dst)) & 1;
	h.listener = true;
	h.conn_quota = set->conn_quota;
	if (h.conn_quota) {
		use = account(g->group, dry);
		h.conns = use ? use->conns : 0;
		if (cfg_moves && (__s64)h.conns < 0)
			h.conns = 0;
	}
	why = obstacle(&h);
	if (why != REASON_NONE)
		return why;

	/* The listener slot stands for all: the same program answers. */
	g->to = slot_addr(&g->dst, PL_SLOT_LISTENER, cfg_slot4, cfg_slot6);
	h.listener = slot_answers(ctx, &g->to, g->port);
	why = obstacle(&h);
	if (why != REASON_NONE)
		return why;

	why = take_slot(g, st, set->slot_quota, &index, dry);
	if (why == REASON_NONE)
		g->to = slot_addr(&g->dst, index, cfg_slot4, cfg_slot6);
	return why;
}

/* answered_until is until when an earlier answer of a destination counts. */
static __always_inline __u64 answered_until(const void *key)
{
	__u64 *until = bpf_map_lookup_elem(&answered, key);

	return until ? *until : 0;
}

/* is_foreign is true for a source that is bound, and not an address of the
 * namespace's. One of loopback gets to a slot, but nowhere else: the kernel
 * says so by itself. Only what a service stands for may be on loopback too.
 */
static __always_inline bool is_foreign(const struct gathered *g, bool service)
{
	struct ip_addr bound;

	if (!is_bound(&g->bound))
		return false;
	/* On 6.1 a key may not be in the memory of a caller. */
	bound = LOAD_IP6(g->bound.w);
	if (!service && is_loopback(&bound))
		return true;
	return !bpf_map_lookup_elem(&own_addrs, &bound);
}

/* What by_maps says, in one word: the path, on_failure, the path that the
 * service asks for, and enum connect_mode.
 */
#define PLAN(path, on_failure, asked, mode) \
	((path) | (on_failure) << 8 | (asked) << 16 | (mode) << 24)
#define PLAN_PATH(plan) ((plan) & 0xff)
#define PLAN_ON_FAILURE(plan) ((plan) >> 8 & 0xff)
#define PLAN_ASKED(plan) ((plan) >> 16 & 0xff)
#define PLAN_MODE(plan) ((plan) >> 24)

/* plan_for says how to go on with what g->why does not decide yet, and g->why
 * is the reason then.
 */
static __always_inline __u32 plan_for(struct gathered *g, struct details *more,
				      const bool dry)
{
	union {
		__u64 d[3];
		struct endpoint_key k;
	} key = { .d = { PAIR(g->dst.w[0], g->dst.w[1]),
			 PAIR(g->dst.w[2], g->dst.w[3]), g->port } };
	__u64 unavailable = 0, asked = 0, zero = 0;
	__u64 on_failure, mode;
	struct settings *set = bpf_map_lookup_elem(&settings, &zero);
	struct service *service;
	struct facts f = {};
	__u32 *rule;
	enum reason why = g->why;

	g->err = ECONNREFUSED;
	if (!set)
		return PATH_PASS; /* cannot be: array maps have every entry */
	if (why != REASON_NONE) {
		/* Or clang would look for the path of REASON_NONE too. */
		asm volatile("" : "+r"(why));
		return path_of(why, ON_FAILURE_OPEN, 0, false);
	}
	on_failure = set->on_failure;
	mode = set->connect;
	/* Each pointer is looked at once: see choose. */
	if (set->deny_rules) {
		rule = rule_names(&deny, g);
		if (rule) {
			f.denied = true;
			if (dry)
				more->rule = *rule;
		}
	}
	if (!f.denied && set->exclude_rules) {
		rule = rule_names(&exclude, g);
		if (rule) {
			f.excluded = true;
			if (dry)
				more->rule = *rule;
		}
	}
	if (dry && (f.denied || f.excluded))
		more->flags |= DETAIL_RULED;
	service = bpf_map_lookup_elem(&services, &key.k);
	if (service) {
		f.service = true;
		unavailable = service->unavailable;
		asked = service->path;
		on_failure = service->on_failure;
		mode = service->connect;
		if (service->no_endpoint)
			g->err = service->no_endpoint;
		g->set = service->id;
		if (dry)
			more->flags |= DETAIL_NAMED;
	}
	f.default_pass = set->default_path == PATH_PASS;
	f.foreign = is_foreign(g, f.service);
	/* The dearest look-up: not where nobody asks. */
	if (f.service ? asked != PATH_PASS && asked != PATH_DIRECT :
			!f.default_pass)
		f.routed = has_route(g);
	why = by_rules(&f);
	if (why == REASON_SERVICE && g->now < unavailable &&
	    path_of(why, 0, asked, false) == PATH_RELAY)
		why = REASON_NO_ENDPOINT;
	else if (why != REASON_SERVICE)
		g->err = ECONNREFUSED;
	g->why = why;
	return PLAN(path_of(why, on_failure, asked, false), on_failure, asked,
		    mode);
}

/* by_maps is plan_for, as an entry has it: see choose. */
__u32 by_maps(struct gathered *g, struct details *more);

/* fall_back gives the path of what cannot be redirected. Only a service has a
 * set.
 */
__noinline int fall_back(struct gathered *g, __u32 plan, __u32 why)
{
	enum conn_path path;

	if (!g)
		return PATH_PASS;
	path = path_of(why, PLAN_ON_FAILURE(plan), PLAN_ASKED(plan),
		       g->why == REASON_SERVICE && set_of(g->set));
	g->why = why;
	if (path == PATH_DENY)
		g->err = ECONNREFUSED;
	return path;
}

/* waits tells whether the handshake of a redirected connection waits for its
 * dial.
 */
static __noinline bool waits(const struct gathered *g, __u64 mode)
{
	union {
		__u64 d[3];
		struct endpoint_key k;
	} key = { .d = { PAIR(g->dst.w[0], g->dst.w[1]),
			 PAIR(g->dst.w[2], g->dst.w[3]), g->port } };

	return holds(mode, g->now,
		     mode == CONNECT_ADAPTIVE ? answered_until(&key.k) : 0);
}

/* judge decides on one connect(2) that g->why does not decide yet. ctx is for
 * the look-up of sockets; kept tells whether the decision can be kept with the
 * socket. A dry run changes nothing but g and more.
 */
static __always_inline enum conn_path judge(void *ctx, struct gathered *g,
					    bool kept, struct details *more,
					    const bool dry)
{
	__u32 plan = by_maps(g, more);
	enum conn_path path = PLAN_PATH(plan);
	enum reason no;

	if (path == PATH_RELAY || (path == PATH_DIRECT && !kept)) {
		no = kept ? redirect(ctx, g, dry) : REASON_NO_MEMORY;
		if (no == REASON_NONE) {
			g->hold = waits(g, PLAN_MODE(plan));
			return path;
		}
		path = fall_back(g, plan, no);
	}
	if (path != PATH_DIRECT || choose_soon(g, more) || choose(g, more))
		return path;
	g->why = REASON_NO_ENDPOINT;
	return PATH_DENY;
}
