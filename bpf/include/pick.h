/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The pick of an endpoint: what redirect/upstream/balance/pick.go does, over
 * the same set, with the same words in the same order. Its comments say why.
 *
 * What is not static the verifier walks once, and not once for each way to it.
 * Hence each step looks the set up again, and is about one snapshot: where a
 * new one comes in between, what an earlier step has found stays found.
 */
#pragma once
#include "eject.h"
#include "hash.h"

/* As flow.PickTurns and flow.PickDraws. */
#define PICK_TURNS 32
#define PICK_DRAWS 16

#define NOBODY 0xffffffff

/* A pick in the making. It is on the stack, of which a program and what it
 * calls have 512 bytes.
 */
struct pick {
	__u64 id; /* service.id */
	__u64 now;
	__u64 words;
	__u64 seed;
	__u64 policy; /* enum policy, as the present looks are made */
	__u64 dry; /* 1: no turn is used up */
	__u64 tier; /* 0 or 1 */
	__u64 turns; /* used up before the first look */
	/* What was found. */
	__u64 index; /* in the tier, or NOBODY */
	__u64 live;
	__u64 weight; /* search: of all that are available so far */
	__u64 at; /* index in the set */
	__u64 endpoint; /* in endpoints */
	__u64 port;
	struct ip_addr addr;
};

/* at gives one of a set's rows; the caller says which struct it is. There is
 * one key for many look-ups: they are on the stack.
 */
static __always_inline void *at(void *map, __u64 *key, __u64 number)
{
	*key = number;
	return bpf_map_lookup_elem(map, key);
}

/* TIMES runs step n times, or until it returns 1. The bpf_loop that the
 * verifier puts in line looks at 64 bits of the number, and clang leaves the
 * upper half of a __u32 as it comes: with something there nothing would run.
 */
#define TIMES(n, step, ctx)                      \
	({                                       \
		__u64 times = (__u32)(n);        \
                                                 \
		asm volatile("" : "+r"(times));  \
		bpf_loop(times, step, (ctx), 0); \
	})

/* The members of a set, for its verdict. */
struct census {
	void *set;
	__u64 now;
	__u64 up; /* those that are not down; above, those of them that are well
		   */
	__u64 next; /* when the next one returns */
};

#define NOT_DOWN 1ULL
#define WELL (1ULL << 32)

static long take_census(__u64 n, struct census *c)
{
	struct set_endpoint *m;
	struct endpoint *e;
	__u64 until, key;

	m = at(c->set, &key, PL_SET_HEAD + (__u32)n);
	if (!m)
		return 0;
	e = at(&endpoints, &key, m->id);
	if (!e || e->down)
		return 0;
	c->up += NOT_DOWN;
	until = e->until;
	if (!is_ejected(until, c->now))
		c->up += WELL;
	else if (until < c->next)
		c->next = until;
	return 0;
}

/* panicking tells whether so few of a service's endpoints are left that their
 * ejections do not count. It looks at all of them only after a change, like
 * health.Group: a pick that meets many ejected endpoints does bounded work. A
 * verdict that is made twice at once may have the other's end, so it lasts a
 * second at most; that is also when it is seen that an endpoint is down, or no
 * longer.
 */
static __always_inline bool panicking(struct census *c, __u64 service)
{
	__u64 *key = &c->next; /* not used yet; the stack is small */
	struct set_config *config;
	struct set_tiers *tiers;
	struct set_state *st;
	__u64 changes, panics, verdict;

	c->set = at(&sets, key, service);
	if (!c->set)
		return false;
	config = at(c->set, key, ROW_CONFIG);
	tiers = at(c->set, key, ROW_TIERS);
	st = at(c->set, key, ROW_STATE);
	if (!config || !tiers || !st)
		return false;
	if (!config->failures)
		return true; /* those of an earlier configuration */
	if (!config->panic)
		return false;
	/* Both at once, as they were put. */
	verdict = *(volatile __u64 *)&st->verdict_changes;
	if ((__u32)verdict == st->changes && c->now < st->verdict_until)
		return verdict >> 32;
	/* Once more, and before any endpoint: a read alone may come after
	 * those, and give the verdict the number of a change that it has not
	 * seen.
	 */
	changes = fetch_add(&st->changes, 0);
	c->next = c->now + NS_PER_S;
	c->up = 0;
	TIMES(tiers->tier[0].count + tiers->tier[1].count, take_census, c);
	panics = panics_at(c->up >> 32, (__u32)c->up, config->panic);
	st = at(c->set, &c->up, ROW_STATE);
	if (!st)
		return false;
	st->verdict_until = c->next;
	/* Both at once. */
	*(volatile __u64 *)&st->verdict_changes = PAIR(changes, panics);
	return panics;
}

/* may_pick tells whether an endpoint may be picked. One that is down never is,
 * also in a panic: a health check has seen that nobody is there.
 */
__noinline int may_pick(__u64 service, __u64 id, __u64 now)
{
	struct census c = {};
	struct endpoint *e = at(&endpoints, &c.next, id);

	if (!e || e->down)
		return 0;
	if (!is_ejected(e->until, now))
		return 1;
	c.now = now;
	return panicking(&c, service);
}

/* take_turn gives the turn of POLICY_ROUND_ROBIN in a tier, and uses it up, or,
 * with ahead, tells one that is to come.
 */
static __always_inline __u32 take_turn(struct set_state *st, __u64 tier,
				       bool dry, __u32 ahead)
{
	__u32 near = *(volatile __u32 *)&st->turn[0];
	__u32 far = *(volatile __u32 *)&st->turn[1];

	if (dry)
		return (tier ? far : near) + ahead;
	return tier ? FETCH_ADD(st, 4, 1) : FETCH_ADD(st, 0, 1);
}

/* look makes draw n of one tier, and says by 1 that it was the last one. */
__noinline int look(struct pick *p, __u32 n)
{
	__u32 first, count, table, length, i;
	struct set_endpoint *m;
	struct set_tiers *tiers;
	volatile struct set_tier *t;
	struct endpoint *e;
	void *set;
	__u64 key;

	if (!p)
		return 1; /* for the verifier: it knows no caller */
	set = at(&sets, &key, p->id);
	tiers = set ? at(set, &key, ROW_TIERS) : NULL;
	if (!tiers)
		return 1;
	/* Constant offsets only: for one that depends on the path, the verifier
	 * of 6.1 says "tried to add from different maps, paths or scalars".
	 */
	t = &tiers->tier[0];
	first = t->first;
	count = t->count;
	table = t->table;
	length = t->entries;
	if (p->tier) {
		t = &tiers->tier[1];
		first = t->first;
		count = t->count;
		table = t->table;
		length = t->entries;
	}

	if (length &&
	    (p->policy == POLICY_ROUND_ROBIN || p->policy == POLICY_MAGLEV)) {
		struct set_table *entries;

		if (p->policy == POLICY_MAGLEV) {
			i = n ? next_word(&p->words) : p->seed;
		} else {
			struct set_state *st = at(set, &key, ROW_STATE);

			i = st ? take_turn(st, p->tier, p->dry, p->turns + n) :
				 0;
		}
		i %= length;
		entries = at(set, &key, table + i / PL_SET_TABLE_ROW);
		if (!entries)
			return 1;
		i = entries->entry[i % PL_SET_TABLE_ROW];
	} else if (p->index != NOBODY) {
		i = below(&p->words, count - 1);
		i += i >= p->index;
	} else {
		i = below(&p->words, count);
		m = at(set, &key, PL_SET_HEAD + first + i);
		if (m && !chance(&p->words, m->cut))
			i = m->alias;
	}
	/* A new set since the last draw, and a smaller one: past its endpoints
	 * there are those of the other tier, or rows that are none.
	 */
	if (i >= count)
		return 1;
	m = at(set, &key, PL_SET_HEAD + first + i);
	if (!m || !may_pick(p->id, m->id, p->now))
		return 0;
	e = at(&endpoints, &key, m->id);
	if (!e)
		return 0;
	if (p->index != NOBODY &&
	    !is_less(e->live, m->weight, p->live, p->weight))
		return 1;
	p->live = e->live;
	p->weight = m->weight;
	p->at = first + i;
	p->endpoint = m->id;
	p->port = m->port;
	p->addr = LOAD_IP6(m->addr.w);
	if (p->index != NOBODY)
		return 1;
	p->index = i;
	return p->policy != POLICY_LEAST_CONNECTIONS;
}

static long look_again(__u64 n, struct pick *p)
{
	__u64 last = look(p, n);

	/* clang knows that it is 0 or 1, the verifier does not. */
	asm volatile("%0 &= 1" : "+r"(last));
	return last;
}

/* search_one is the step of a search: see search in pick.go. */
static long search_one(__u64 n, struct pick *p)
{
	struct set_endpoint *m;
	struct set_tiers *tiers;
	__u32 first, count;
	void *set;
	__u64 key;

	set = at(&sets, &key, p->id);
	tiers = set ? at(set, &key, ROW_TIERS) : NULL;
	if (!tiers)
		return 1;
	first = *(volatile __u32 *)&tiers->tier[0].first;
	count = *(volatile __u32 *)&tiers->tier[0].count;
	if (p->tier) {
		first = *(volatile __u32 *)&tiers->tier[1].first;
		count = *(volatile __u32 *)&tiers->tier[1].count;
	}
	if ((__u32)n >= count)
		return 1; /* a new set, and a smaller one */
	m = at(set, &key, PL_SET_HEAD + first + (__u32)n);
	if (!m || !may_pick(p->id, m->id, p->now))
		return 0;
	p->weight += m->weight;
	if (below(&p->words, p->weight) < m->weight) {
		p->index = (__u32)n;
		p->at = first + (__u32)n;
		p->endpoint = m->id;
		p->port = m->port;
		p->addr = LOAD_IP6(m->addr.w);
	}
	return 0;
}

/* in_tier picks in one tier, of count endpoints. */
static __always_inline bool in_tier(struct pick *p, __u64 policy, __u32 count)
{
	if (!count)
		return false;
	p->policy = policy;
	if (policy == POLICY_ROUND_ROBIN) {
		TIMES(PICK_TURNS - p->turns, look_again, p);
		p->turns = 0; /* the other tier has its own */
		if (p->index != NOBODY)
			return true;
		p->policy = POLICY_RANDOM;
	}
	if (policy != POLICY_LEAST_CONNECTIONS || count > 1)
		TIMES(PICK_DRAWS, look_again, p);
	if (p->index != NOBODY)
		return true;
	/* What Maglev's last miss would have gone on with. */
	if (policy == POLICY_MAGLEV)
		next_word(&p->words);
	p->weight = 0;
	TIMES(count, search_one, p);
	return p->index != NOBODY;
}

/* pick makes a pick, or says that nobody may be picked. The caller has set id,
 * now, seed, dry and turns, and zeroed the rest. counts are those of the tiers,
 * the second above the first.
 */
static __always_inline bool pick(struct pick *p, __u64 policy, __u32 spill,
				 __u64 counts)
{
	p->index = NOBODY;
	p->words = p->seed;
	p->tier = counts >> 32 && chance(&p->words, spill);
	if (in_tier(p, policy, p->tier ? counts >> 32 : (__u32)counts))
		return true;
	if (!(counts >> 32))
		return false;
	p->tier = !p->tier;
	return in_tier(p, policy, p->tier ? counts >> 32 : (__u32)counts);
}
