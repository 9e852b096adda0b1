/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The endpoint of a connect(2) on PATH_DIRECT: a pick, in the connect hook and
 * in its dry run.
 */
#pragma once
#include "pick.h"

/* What the entry knows, and what it is told. One read of ctx each: the verifier
 * refuses pointers into ctx that clang has moved ("dereference of modified ctx
 * ptr").
 */
struct gathered {
	struct ip_addr dst;
	struct ip_addr bound;
	__u64 now;
	__u64 cgroup; /* of the task */
	__u64 group; /* whose quotas count; 0: nobody's, in a dry run */
	__u64 port;
	__u64 why; /* REASON_NONE: the rules are asked; out: enum reason */
	/* Out. */
	struct ip_addr source; /* that of the route */
	struct ip_addr to; /* PATH_DIRECT, PATH_RELAY: what to dial instead */
	__u64 to_port; /* PATH_DIRECT */
	__u64 hold; /* 1: the handshake waits for the dial */
	__u64 err; /* what a refused connect returns */
	__u64 set; /* service.id */
	__u64 endpoint; /* PATH_DIRECT: index in endpoints */
	__u64 trial; /* the until of the trial that this is; 0: it is none */
	/* In and out: of the pick; above it, 1: a turn is used up. */
	__u64 seed;
};

/* What only a dry run tells. */
struct details {
	__u64 flags; /* DETAIL_* */
	__u64 rule; /* the value of the one that decided, */
	/* and above it the index of the endpoint in the set. */
};

#define TURN_USED (1ULL << 32) /* in gathered.seed */

#define DETAIL_RULED 1 /* rule is valid */
#define DETAIL_NAMED 2 /* a service has the address */
#define DETAIL_PICKED 4 /* there is an endpoint */
#define DETAIL_FAR 8 /* it is of the second tier */

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

/* is_bound is false for the unspecified addresses of both families. */
static __always_inline bool is_bound(const struct ip_addr *a)
{
	return a->w[0] || a->w[1] || a->w[3];
}

/* dialing begins the trial of an endpoint whose wait is over: others wait for
 * its outcome, or for the next and longer wait to end. It gives when that is,
 * or 0 where it began none.
 */
static __noinline __u64 dialing(__u64 service, __u64 endpoint, __u64 now)
{
	struct endpoint *e = health_of(endpoint);
	__u64 until, next, round;
	struct set_config *c;
	void *set;

	if (!e)
		return 0;
	until = e->until;
	if (!until || now < until)
		return 0;
	set = set_of(service);
	c = set ? row(set, ROW_CONFIG) : NULL;
	if (!c || !c->failures)
		return 0;
	round = e->round;
	if (round < 0xffff)
		round++;
	next = end_of_wait(c, now, round);
	if (!swap(&e->until, until, next))
		return 0;
	e->round = round;
	changed(set);
	return next;
}

/* hash_on gives what POLICY_MAGLEV goes by: of a source the one that the
 * handler would see. g->source stays as it is, for what the socket is shown.
 */
static __noinline __u32 hash_on(struct gathered *g, __u64 on)
{
	union {
		__u64 d[3];
		struct prefix_key k;
	} slots = { .d = { PAIR(128, 0), PAIR(0, bpf_htonl(0xffff)),
			   bpf_htonl(PL_SLOT4_SUPER) } };
	struct route *way;

	if (on == HASH_DESTINATION)
		return hash_of(&g->dst, g->port);
	if (is_bound(&g->bound))
		return hash_of(&g->bound, 0);
	has_route(g);
	if (!is_zero(&g->source))
		return hash_of(&g->source, 0);
	if (!is_mapped(&g->dst)) {
		slots.d[0] = PAIR(128, bpf_htonl(PL_SLOT6_SUPER_W0));
		slots.d[1] = PAIR(bpf_htonl(PL_SLOT6_SUPER_H2 << 16), 0);
		slots.d[2] = 0;
	}
	way = bpf_map_lookup_elem(&routes, &slots.k);
	return hash_of(way ? &way->source : &g->source, 0);
}

/* cares_of is 0 for an endpoint that is neither down nor has been ejected. */
static __always_inline __u64 cares_of(const struct endpoint *e)
{
	return e->until | e->down;
}

/* choose_first makes the first look of a pick, or both of
 * POLICY_LEAST_CONNECTIONS, with fewer look-ups and no loop: that is all of
 * nearly every pick. Where it meets an endpoint that something is to be asked
 * of it gives 0, and choose_one begins again with the same words, but not with
 * the same turn.
 */
static __always_inline int choose_first(struct gathered *g,
					struct details *more, const bool dry)
{
	__u64 policy, words, key, tier, i = 0, j;
	bool drawn = false;
	__u64 first, count, table, length;
	struct set_endpoint *m, *other;
	volatile struct set_tier *t;
	struct endpoint *e, *rival;
	struct set_config *config;
	struct set_tiers *tiers;
	void *set;

	set = at(&sets, &key, g->set);
	if (!set)
		return 0;
	config = at(set, &key, ROW_CONFIG);
	tiers = at(set, &key, ROW_TIERS);
	if (!config || !tiers)
		return 0;
	policy = config->policy;
	if (policy == POLICY_MAGLEV)
		g->seed = hash_on(g, config->hash);
	words = (__u32)g->seed;
	tier = tiers->tier[1].count && chance(&words, config->spill);
	/* Or clang would make an offset of it: see look. */
	asm volatile("" : "+r"(tier));
	t = &tiers->tier[0];
	first = t->first;
	count = t->count;
	table = t->table;
	length = t->entries;
	if (tier) {
		t = &tiers->tier[1];
		first = t->first;
		count = t->count;
		table = t->table;
		length = t->entries;
	}
	if (!count)
		return 0;
	if (length &&
	    (policy == POLICY_ROUND_ROBIN || policy == POLICY_MAGLEV)) {
		struct set_table *entries;

		i = (__u32)g->seed;
		if (policy == POLICY_ROUND_ROBIN) {
			struct set_state *st = at(set, &key, ROW_STATE);

			if (!st)
				return 0;
			i = take_turn(st, tier, dry, 0);
			g->seed |= TURN_USED;
		}
		i %= length;
		entries = at(set, &key, table + i / PL_SET_TABLE_ROW);
		if (!entries)
			return 0;
		i = entries->entry[i % PL_SET_TABLE_ROW];
	} else if (count > 1 || policy != POLICY_LEAST_CONNECTIONS) {
		i = below(&words, count);
		drawn = true;
	}
	m = at(set, &key, PL_SET_HEAD + first + i);
	if (!m)
		return 0;
	if (drawn && !chance(&words, m->cut)) {
		i = m->alias;
		m = at(set, &key, PL_SET_HEAD + first + i);
		if (!m)
			return 0;
	}
	e = at(&endpoints, &key, m->id);
	if (!e)
		return 0;
	if (policy == POLICY_LEAST_CONNECTIONS && count > 1) {
		j = below(&words, count - 1);
		j += j >= i;
		other = at(set, &key, PL_SET_HEAD + first + j);
		if (!other)
			return 0;
		rival = at(&endpoints, &key, other->id);
		if (!rival)
			return 0;
		/* In one: where another processor has counted last, each of
		 * them is a wait for it, and now it is the same one.
		 */
		if (cares_of(e) | cares_of(rival))
			return 0;
		if (is_less(rival->live, other->weight, e->live, m->weight)) {
			m = other;
			i = j;
		}
	} else if (cares_of(e)) {
		/* Its turn is used up, if it may be picked or not. */
		if (!(g->seed & TURN_USED) || !may_pick(g->set, m->id, g->now))
			return 0;
		if (!dry)
			g->trial = dialing(g->set, m->id, g->now);
	}
	g->to = LOAD_IP6(m->addr.w);
	g->to_port = m->port;
	g->endpoint = m->id;
	if (dry) {
		more->flags |= DETAIL_PICKED;
		if (tier)
			more->flags |= DETAIL_FAR;
		more->rule = PAIR(more->rule, first + i);
	}
	return 1;
}

/* choose_one picks an endpoint of the service after choose_first, and puts it
 * in g; 0: there is none.
 */
static __always_inline int choose_one(struct gathered *g, struct details *more,
				      const bool dry)
{
	struct set_config *config;
	struct set_tiers *tiers;
	__u64 policy, spill, counts, key;
	struct pick p = {};
	void *set;

	set = at(&sets, &key, g->set);
	if (!set)
		return 0;
	config = at(set, &key, ROW_CONFIG);
	tiers = at(set, &key, ROW_TIERS);
	if (!config || !tiers)
		return 0;
	policy = config->policy;
	spill = config->spill;
	counts = PAIR(tiers->tier[0].count, tiers->tier[1].count);
	p.id = g->set;
	p.now = g->now;
	p.dry = dry;
	p.seed = (__u32)g->seed;
	p.turns = g->seed >> 32;
	if (!pick(&p, policy, spill, counts))
		return 0;
	g->to = p.addr;
	g->to_port = p.port;
	g->endpoint = p.endpoint;
	if (dry) {
		more->flags |= DETAIL_PICKED;
		if (p.tier)
			more->flags |= DETAIL_FAR;
		more->rule = PAIR(more->rule, p.at);
		return 1;
	}
	g->trial = dialing(p.id, p.endpoint, p.now);
	return 1;
}

/* choose is choose_one, as an entry has it. It is no static function, so that
 * the verifier walks it once and not once for each way to it. Only that of a
 * dry run minds more: on a pointer that it knows to be NULL, the verifier
 * of 6.1 follows what the processor may speculate.
 */
int choose(struct gathered *g, struct details *more);

/* choose_soon is choose_first, as an entry has it. */
int choose_soon(struct gathered *g, struct details *more);
