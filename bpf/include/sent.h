/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What was asked for by connections on PATH_DIRECT, by their addresses. Only an
 * MPTCP socket is told by these; but nothing tells a hook that a subflow is
 * one, so all connections that have a cell are there. One that has its decision
 * in socket storage is found by a look-up of its socket: see names.bpf.c.
 *
 * A row has the number of the cell, and is written by who has that: rows are
 * used one after the other, as cells are. Where a row is by its addresses
 * stands in a bucket, a word that is nearly always 0: a table of rows by a hash
 * of the addresses would be a page and a line that nobody has looked at for
 * long, and 0.1 to 0.2 us for each connection, also for those that are only
 * looked for there.
 */
#pragma once
#include "atomic.h"
#include "config.h"
#include "hash.h"
#include "maps.h"

/* In a bucket: the numbers of up to four rows, plus one; 0: none. */
#define WAYS 4
#define WAY_BITS 16
#define WAY_MASK 0xffff

static __always_inline struct sent *sent_of(__u64 n)
{
	return bpf_map_lookup_elem(&sent_by_cell, &n);
}

static __always_inline __u64 bucket_of(const struct live_key *k)
{
	__u64 h = mix((k->source_port | (__u32)k->slot_port << 16) ^
		      k->source.w[3] ^ bpf_ntohl(k->slot.w[3]));

	return h * PL_SENT_BUCKETS >> 32;
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

/* is_noted tells whether row n says something about a connection other than k,
 * that may be alive, and is in its bucket.
 */
static __noinline __u64 is_noted(__u64 n, const struct live_key *k,
				 __u64 bucket)
{
	struct sent *s = sent_of(n);

	return s && s->owner && !same_key(&s->key, k) &&
	       bucket_of(&s->key) == bucket;
}

/* renew leaves in a bucket only what is noted of others than k, and adds way,
 * if that is not 0. It gives 0 where there is no room, or where somebody else
 * has written there.
 */
static __noinline __u64 renew(__u64 bucket, const struct live_key *k, __u64 way)
{
	__u64 *b = bpf_map_lookup_elem(&sent_buckets, &bucket);
	__u64 was, rest, next = 0, here;

	if (!b)
		return 0;
	was = rest = *(volatile __u64 *)b;
	for (int i = 0; i < WAYS; i++, rest >>= WAY_BITS) {
		here = rest & WAY_MASK;
		if (here && here != way && is_noted(here - 1, k, bucket))
			next = next << WAY_BITS | here;
	}
	if (way) {
		if (next >> (WAYS - 1) * WAY_BITS)
			return 0;
		next = next << WAY_BITS | way;
	}
	return swap(b, was, next);
}

/* note_sent is false where there is no place for it. Of two with the same
 * addresses, the other one is gone. So is whoever has had the row; but while
 * hooks of another layout have cells of their own, that may be one of theirs.
 */
static __always_inline bool note_sent(const struct decision *d, __u64 cookie)
{
	__u64 n = cookie % PL_CELLS, bucket = bucket_of(&d->key);
	struct sent *s = sent_of(n);
	__u64 *b = bpf_map_lookup_elem(&sent_buckets, &bucket);

	if (!s || !b)
		return false;
	if ((cfg_moves & PL_MOVES_CELLS) && s->owner && s->owner != cookie)
		return false;
	*(volatile __u64 *)&s->owner = 0;
	s->asked.addr = d->orig;
	s->asked.port = d->orig_port;
	s->key = d->key;
	barrier();
	*(volatile __u64 *)&s->owner = cookie;
	/* A full barrier: who finds the way there finds the row. */
	if (!*(volatile __u64 *)b && swap(b, 0, n + 1))
		return true;
	if (renew(bucket, &d->key, n + 1))
		return true;
	s->owner = 0;
	return false;
}

/* forget_others is for a connection that is not noted itself: one that had its
 * addresses before, and whose end no hook saw, is not to be taken for it.
 */
static __always_inline void forget_others(const struct decision *d)
{
	__u64 bucket = bucket_of(&d->key);
	__u64 *b = bpf_map_lookup_elem(&sent_buckets, &bucket);

	if (b && *(volatile __u64 *)b)
		renew(bucket, &d->key, 0);
}

static __always_inline void forget_sent(__u64 cookie)
{
	__u64 n = cookie % PL_CELLS, bucket;
	struct sent *s = sent_of(n);
	__u64 *b;

	if (!s || s->owner != cookie)
		return;
	s->owner = 0; /* what a bucket says of it counts no more */
	bucket = bucket_of(&s->key);
	b = bpf_map_lookup_elem(&sent_buckets, &bucket);
	if (b && !swap(b, n + 1, 0))
		renew(bucket, &s->key, 0);
}
