//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What is left to move when all hooks are of the new layout: run by the process
 * (BPF_PROG_TEST_RUN), once for each socket and each counter.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "include/count.h"
#include "include/moved.h"
#include "include/net.h"
#include "include/packet.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define MOVED 1

/* bring makes the entry of a socket in one step: hooks that make it at this
 * very moment, with the socket's lock, are right, and this is not.
 */
static __noinline int bring(struct bpf_sock *sk)
{
	__u64 zero = 0;
	struct decision *d = bpf_map_lookup_elem(&workbench, &zero);
	void *before = bpf_sk_storage_get(&former, sk, NULL, 0);

	if (!d || !before || bpf_sk_storage_get(&decisions, sk, NULL, 0))
		return 0;
	d->opened = 0;
	if (!carry(before, d))
		return 0;
	return bpf_sk_storage_get(&decisions, sk, d,
				  BPF_SK_STORAGE_GET_F_CREATE) ?
		       MOVED :
		       0;
}

/* pl_move moves what is stored with the socket that the packet names. Softirqs
 * are off in a test run, so the workbench is its own.
 */
SEC("tc")
int pl_move(struct __sk_buff *skb)
{
	struct move *m = (void *)(long)skb->data + ETH_HLEN;
	void *end = (void *)(long)skb->data_end;
	union {
		__u64 d[5];
		struct bpf_sock_tuple t;
	} u = {};
	__u32 source, dest;
	struct bpf_sock *sk;
	int moved;

	if ((void *)(m + 1) > end)
		return -1;
	/* The tuple is that of what the socket receives. */
	source = bpf_htons(m->peer_port);
	dest = bpf_htons(m->own_port);
	if (is_mapped(&m->peer)) {
		u.d[0] = PAIR(m->peer.w[3], m->own.w[3]);
		u.d[1] = source | dest << 16;
		sk = bpf_sk_lookup_tcp(skb, &u.t, sizeof(u.t.ipv4),
				       BPF_F_CURRENT_NETNS, 0);
	} else {
		u.d[0] = PAIR(m->peer.w[0], m->peer.w[1]);
		u.d[1] = PAIR(m->peer.w[2], m->peer.w[3]);
		u.d[2] = PAIR(m->own.w[0], m->own.w[1]);
		u.d[3] = PAIR(m->own.w[2], m->own.w[3]);
		u.d[4] = source | dest << 16;
		sk = bpf_sk_lookup_tcp(skb, &u.t, sizeof(u.t.ipv6),
				       BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk)
		return 0;
	moved = bring(sk);
	bpf_sk_release(sk);
	return moved;
}

/* pl_add adds to a counter what was counted in the former one: a write by the
 * process would lose what hooks count meanwhile.
 */
SEC("tc")
int pl_add(struct __sk_buff *skb)
{
	struct move *m = (void *)(long)skb->data + ETH_HLEN;
	void *end = (void *)(long)skb->data_end;
	__u64 key, *n;

	if ((void *)(m + 1) > end)
		return -1;
	key = m->counter;
	if (m->tally)
		n = bpf_map_lookup_elem(&tallies, &key);
	else
		n = bpf_map_lookup_elem(&reasons, &key);
	if (!n)
		return 0;
	*n += m->add;
	return MOVED;
}
