/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once
#include "maps.h"

/* Each CPU has its own, but a hook may be interrupted or preempted in the
 * middle of a count by one that counts the same.
 */
static __always_inline void count(enum reason why)
{
	__u64 key = why;
	__u64 *n = bpf_map_lookup_elem(&reasons, &key);

	if (n)
		__sync_fetch_and_add(n, 1);
}

static __always_inline void tally(enum tally what)
{
	__u64 key = what;
	__u64 *n = bpf_map_lookup_elem(&tallies, &key);

	if (n)
		__sync_fetch_and_add(n, 1);
}

/* event_flags wakes the reader only when half of the ring is used; it comes by
 * itself five times a second. A wake-up per event costs more than the event.
 */
static __always_inline __u64 event_flags(void)
{
	if (bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA) > (1 << 19))
		return BPF_RB_FORCE_WAKEUP;
	return BPF_RB_NO_WAKEUP;
}

/* usage_of finds or opens the account of a container. */
static __always_inline struct usage *usage_of(__u64 group)
{
	struct usage *u = bpf_map_lookup_elem(&usage_by_group, &group);
	struct usage none = {};

	if (u)
		return u;
	/* A full map leaves the container without quotas of its own; the
	 * limits of the whole instance still hold.
	 */
	bpf_map_update_elem(&usage_by_group, &group, &none, BPF_NOEXIST);
	return bpf_map_lookup_elem(&usage_by_group, &group);
}

/* lost counts an event that found the ring full, so that nobody can hide a
 * flow by flooding it: the loss is on record, with whose it was. Somebody who
 * is only ever refused has no account yet.
 */
static __always_inline void lost(__u64 group)
{
	struct usage *u = usage_of(group);

	tally(TALLY_EVENTS_LOST);
	if (u)
		__sync_fetch_and_add(&u->events_lost, 1);
}
