//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What programs of another layout have left where the process cannot read it or
 * write it: docs/design.md, section 7a. These are loaded only while an instance
 * is moved, and run by the process (BPF_PROG_TEST_RUN).
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "include/abi.h"
#include "include/packet.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* The ring of the new layout. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events SEC(".maps");

/* Endpoint sets of the former layout. The loader gives it their sizes. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, PL_SETS);
	__type(key, __u32);
	__array(
		values, struct {
			__uint(type, BPF_MAP_TYPE_ARRAY);
			__uint(max_entries, PL_SET_HEAD);
			__uint(map_flags, BPF_F_INNER_MAP);
			__uint(key_size, sizeof(__u32));
			__uint(value_size, sizeof(struct set_row));
		});
} former_sets SEC(".maps");

/* Rows of one of them, for the process, in their size. writer: pl_rows;
 * reader: loader.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct set_row);
} former_rows SEC(".maps");

struct copying {
	void *set;
	__u64 first;
	__u64 copied;
};

static long copy_row(__u64 n, struct copying *c)
{
	__u64 from = c->first + (__u32)n, to = (__u32)n;
	void *r = bpf_map_lookup_elem(c->set, &from);

	if (!r || bpf_map_update_elem(&former_rows, &to, r, BPF_ANY))
		return 1;
	c->copied++;
	return 0;
}

/* pl_rows copies rows of a set, and returns how many there were. To open the
 * set would take CAP_SYS_ADMIN.
 */
SEC("tc")
int pl_rows(struct __sk_buff *skb)
{
	struct set_query *q = (void *)(long)skb->data + ETH_HLEN;
	void *end = (void *)(long)skb->data_end;
	struct copying c = {};
	__u64 id;

	if ((void *)(q + 1) > end)
		return -1;
	id = q->set;
	c.first = q->first;
	c.set = bpf_map_lookup_elem(&former_sets, &id);
	if (!c.set)
		return 0;
	bpf_loop(4096, copy_row, &c, 0);
	return c.copied;
}

/* More than a test run has room for. */
#define TOLD_MOST 64

struct telling {
	struct __sk_buff *skb;
	__u64 told;
};

/* A loop that the verifier walks was tried: in the speculation that it minds
 * without CAP_PERFMON it lost count of the records ("verifier bug").
 */
static long tell_one(__u64 n, struct telling *t)
{
	__u32 at = ETH_HLEN + (__u32)n * sizeof(struct conn_event);
	struct conn_event *e;

	if (at + sizeof(*e) > t->skb->len)
		return 1;
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e)
		return 1;
	if (bpf_skb_load_bytes(t->skb, at, e, sizeof(*e))) {
		bpf_ringbuf_discard(e, BPF_RB_NO_WAKEUP);
		return 1;
	}
	bpf_ringbuf_submit(e, BPF_RB_NO_WAKEUP);
	t->told++;
	return 0;
}

/* pl_tell puts records into the ring, which stand one behind the other after
 * the Ethernet header, and returns how many there was room for. Who runs it is
 * who reads.
 */
SEC("tc")
int pl_tell(struct __sk_buff *skb)
{
	struct telling t = { .skb = skb };

	bpf_loop(TOLD_MOST, tell_one, &t, 0);
	return t.told;
}
