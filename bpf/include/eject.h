/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The health of endpoints, as redirect/upstream/health/ejector.go keeps it for
 * the handler; its comments say why.
 */
#pragma once
#include <bpf/bpf_helpers.h>
#include "atomic.h"
#include "count.h"
#include "decide.h"

#define ROW_TIERS 0
#define ROW_CONFIG 1
#define ROW_STATE 2

/* row gives one of a set's rows; the caller says which struct it is. */
static __always_inline void *row(void *set, __u64 number)
{
	return bpf_map_lookup_elem(set, &number);
}

static __always_inline void *set_of(__u64 service)
{
	return bpf_map_lookup_elem(&sets, &service);
}

static __always_inline struct endpoint *health_of(__u64 id)
{
	return bpf_map_lookup_elem(&endpoints, &id);
}

/* changed makes the set's verdict be looked at again. */
static __always_inline void changed(void *set)
{
	struct set_state *st = row(set, ROW_STATE);

	if (st)
		__sync_fetch_and_add(&st->changes, 1);
}

static __always_inline __u64 end_of_wait(const struct set_config *c, __u64 now,
					 __u64 round)
{
	__u64 random = (__u64)bpf_get_prandom_u32() << 32;

	random |= bpf_get_prandom_u32();
	return now + wait_of(c->base, c->max, round, random);
}

/* answered ends an ejection. On a healthy endpoint only connects is written. */
static __always_inline void answered_by(const struct decision *d)
{
	struct endpoint *e = health_of(d->endpoint);
	void *set;

	if (!e)
		return;
	__sync_fetch_and_add(&e->connects, 1);
	if (e->failures)
		e->failures = 0;
	if (!e->until || !exchange(&e->until, 0))
		return;
	set = set_of(d->set);
	if (set)
		changed(set);
}

/* failed counts a connect that was not answered. Whether the endpoint is blamed
 * for it is for the caller to say; and while it is ejected that tells nothing
 * new.
 */
static __always_inline void failed(const struct decision *d, enum ending why)
{
	struct endpoint *e = health_of(d->endpoint);
	struct set_config *c;
	void *set;

	if (!e)
		return;
	__sync_fetch_and_add(&e->failed, 1);
	e->last = why;
	set = set_of(d->set);
	if (!set)
		return;
	c = row(set, ROW_CONFIG);
	if (!c || !c->failures || e->until ||
	    fetch_add(&e->failures, 1) + 1 < c->failures)
		return;
	if (!swap(&e->until, 0, end_of_wait(c, bpf_ktime_get_ns(), 1)))
		return;
	e->failures = 0;
	e->round = 1;
	__sync_fetch_and_add(&e->ejections, 1);
	changed(set);
}

/* is_picked tells whether an index is still the endpoint's that was picked, at
 * d->key.slot. Only who is counted there keeps it from being another's: a
 * connect that is put off, or that never left, is not (loader/sets.go).
 */
static __always_inline bool is_picked(const struct decision *d)
{
	__u64 id = d->endpoint;
	struct endpoint_name *n = bpf_map_lookup_elem(&endpoint_names, &id);

	return n && n->set == d->set && n->port == d->key.slot_port &&
	       n->addr.w[0] == d->key.slot.w[0] &&
	       n->addr.w[1] == d->key.slot.w[1] &&
	       n->addr.w[2] == d->key.slot.w[2] &&
	       n->addr.w[3] == d->key.slot.w[3];
}

/* untold gives back the trial that a connect was which told nothing of the
 * endpoint: it must not keep that out for another and longer wait.
 */
static __always_inline void untold(const struct decision *d)
{
	struct endpoint *e = health_of(d->endpoint);
	__u16 round;
	void *set;

	if (!e || !d->half)
		return;
	round = e->round;
	if (!swap(&e->until, d->half, d->opened))
		return;
	if (round > 1)
		e->round = round - 1;
	set = set_of(d->set);
	if (set)
		changed(set);
}

/* count_live counts a connection of its endpoint up or down, once. */
static __always_inline void count_live(struct decision *d, bool up)
{
	struct endpoint *e;

	if (d->counted == up)
		return;
	d->counted = up;
	e = health_of(d->endpoint);
	if (e)
		__sync_fetch_and_add(&e->live, up ? 1 : -1);
}
