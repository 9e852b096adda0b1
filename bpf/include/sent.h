/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What was asked for by connections on PATH_DIRECT, by their addresses. Only an
 * MPTCP socket is told by these; but nothing tells a hook that a subflow is
 * one, so all connections that have a cell are there. One that has its decision
 * in socket storage is found by a look-up of its socket: see names.bpf.c.
 *
 * A row has the number of the cell: rows are used one after the other, as cells
 * are. Where a row is by its addresses stands in a bucket, a word of which
 * there are few enough to stay in a cache: a table of rows by a hash of the
 * addresses would be a page and a line that nobody has looked at for long, and
 * 0.1 to 0.2 us for each connection, also for those that are only looked for
 * there.
 */
#pragma once
#include "atomic.h"
#include "config.h"
#include "hash.h"
#include "maps.h"

/* A bucket has the numbers of up to four rows, plus one; 0: none. Above them is
 * a count of its changes: who has looked at rows before it writes must not find
 * the same word there for another reason.
 */
#define WAYS 4
#define WAY_BITS 15
#define WAY_MASK 0x7fffULL
#define WAYS_MASK ((1ULL << WAYS * WAY_BITS) - 1)
#define CHANGED(was) (((was) & ~WAYS_MASK) + WAYS_MASK + 1)

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
 * that may be alive, and is in its bucket. One with k's addresses is gone, and
 * its row says so from here on, whatever becomes of the bucket.
 */
static __noinline __u64 is_noted(__u64 n, const struct live_key *k,
				 __u64 bucket)
{
	struct sent *s = sent_of(n);
	__u64 owner;

	if (!s)
		return 0;
	owner = *(volatile __u64 *)&s->owner;
	if (!owner)
		return 0;
	fence(); /* or the key might be that of who had the row before */
	if (same_key(&s->key, k)) {
		swap(&s->owner, owner, 0);
		return 0;
	}
	return bucket_of(&s->key) == bucket;
}

/* renew leaves in a bucket only what is noted of others than k, and adds way,
 * if that is not 0. It gives 0 where there is no room, or where somebody else
 * has written there meanwhile.
 */
static __noinline __u64 renew(__u64 bucket, const struct live_key *k, __u64 way)
{
	__u64 *b = bpf_map_lookup_elem(&sent_buckets, &bucket);
	__u64 was, rest, next = 0, here, gone = 0;

	if (!b)
		return 0;
	was = rest = *(volatile __u64 *)b;
	for (int i = 0; i < WAYS; i++, rest >>= WAY_BITS) {
		here = rest & WAY_MASK;
		if (here && here != way && is_noted(here - 1, k, bucket))
			next = next << WAY_BITS | here;
		else
			gone |= here;
	}
	if (!way && !gone)
		return 1;
	if (way) {
		if (next >> (WAYS - 1) * WAY_BITS)
			return 0;
		next = next << WAY_BITS | way;
	}
	return swap(b, was, CHANGED(was) | next);
}

/* note_sent is false where there is no place for it, or where another processor
 * has just changed the bucket. Of two with the same addresses, the other one is
 * gone. So is whoever has had the row, or has the decision with the socket too;
 * but while hooks of another layout have cells of their own, that may be one of
 * theirs.
 */
static __always_inline bool note_sent(const struct decision *d, __u64 cookie)
{
	__u64 n = cookie % PL_CELLS, bucket = bucket_of(&d->key);
	struct sent *s = sent_of(n);
	__u64 *b = bpf_map_lookup_elem(&sent_buckets, &bucket);
	__u64 was;

	if (!s || !b)
		return false;
	if ((cfg_moves & PL_MOVES_CELLS) && s->owner && s->owner != cookie)
		return false;
	*(volatile __u64 *)&s->owner = 0;
	barrier();
	s->asked.addr = d->orig;
	s->asked.port = d->orig_port;
	s->key = d->key;
	barrier();
	*(volatile __u64 *)&s->owner = cookie;
	/* A full barrier: who finds the way there finds the row. */
	was = *(volatile __u64 *)b;
	if (!(was & WAYS_MASK) && swap(b, was, CHANGED(was) | (n + 1)))
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

	if (b && *(volatile __u64 *)b & WAYS_MASK)
		renew(bucket, &d->key, 0);
}

static __always_inline void forget_sent(__u64 cookie)
{
	__u64 n = cookie % PL_CELLS, bucket, was;
	struct sent *s = sent_of(n);
	__u64 *b;

	if (!s || s->owner != cookie)
		return;
	s->owner = 0; /* what a bucket says of it counts no more */
	bucket = bucket_of(&s->key);
	b = bpf_map_lookup_elem(&sent_buckets, &bucket);
	if (!b)
		return;
	was = *(volatile __u64 *)b;
	if ((was & WAYS_MASK) != n + 1 || !swap(b, was, CHANGED(was)))
		renew(bucket, &s->key, 0);
}
