/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What was asked for by connections on PATH_DIRECT, by their addresses. Only an
 * MPTCP socket is told by these; but nothing tells a hook that a subflow is
 * one, so all connections that have a cell are there. One that has its decision
 * in socket storage is found by a look-up of its socket: see names.bpf.c.
 */
#pragma once
#include "atomic.h"
#include "hash.h"
#include "maps.h"

static __always_inline struct sent *sent_at(const struct live_key *k)
{
	__u64 n = mix((k->source_port | (__u32)k->slot_port << 16) ^
		      k->source.w[3] ^ bpf_ntohl(k->slot.w[3])) %
		  PL_CELLS;

	return bpf_map_lookup_elem(&sent, &n);
}

/* differs has no branch until the end: the verifier walks each way. */
static __always_inline __u32 differs(const struct ip_addr *a,
				     const struct ip_addr *b)
{
	return (a->w[0] ^ b->w[0]) | (a->w[1] ^ b->w[1]) | (a->w[2] ^ b->w[2]) |
	       (a->w[3] ^ b->w[3]);
}

static __always_inline bool same_key(const struct live_key *a,
				     const struct live_key *b)
{
	return !((a->source_port ^ b->source_port) |
		 (a->slot_port ^ b->slot_port) |
		 differs(&a->source, &b->source) | differs(&a->slot, &b->slot));
}

/* note_sent is false where another connection is noted. Of two with the same
 * addresses, the other one is gone.
 */
static __always_inline bool note_sent(const struct decision *d, __u64 cookie)
{
	struct sent *s = sent_at(&d->key);
	__u64 owner;

	if (!s)
		return false;
	owner = *(volatile __u64 *)&s->owner;
	if (owner != cookie && ((owner && !same_key(&s->key, &d->key)) ||
				!swap(&s->owner, owner, cookie)))
		return false;
	s->asked.addr = d->orig;
	s->asked.port = d->orig_port;
	fence(); /* who finds the key must find what was asked */
	s->key = d->key;
	return true;
}

/* forget_others is for a connection that is not noted itself: one that had its
 * addresses before, and whose end no hook saw, is not to be taken for it.
 */
static __always_inline void forget_others(const struct decision *d)
{
	struct sent *s = sent_at(&d->key);

	if (s && same_key(&s->key, &d->key))
		s->key.slot_port = 0;
}

static __always_inline void forget_sent(const struct decision *d, __u64 cookie)
{
	struct sent *s = sent_at(&d->key);

	if (!s || s->owner != cookie)
		return;
	s->key.slot_port = 0; /* no connection has that */
	swap(&s->owner, cookie, 0);
}
