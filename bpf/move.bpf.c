//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What is left to move when all hooks are of the new layout: run by the process
 * (BPF_PROG_TEST_RUN), once for each socket and each counter.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "include/atomic.h"
#include "include/count.h"
#include "include/decision.h"
#include "include/former.h"
#include "include/net.h"
#include "include/packet.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define MOVED 1

/* bring makes the entry of a socket in one step: hooks that make it at this
 * very moment, with the socket's lock, are right, and this is not. One that is
 * there, and older, since hooks of the former layout went on with the socket,
 * is brought up to date; who is at the socket at this very moment has done so.
 */
static __noinline int bring_from(void *before, struct bpf_sock *sk,
				 __u64 cookie)
{
	__u64 zero = 0;
	union bench *made = bpf_map_lookup_elem(&workbench, &zero);
	struct decision *now = found(sk, cookie, 0);

	if (!made || !before)
		return 0;
	if (now)
		return cfg_moves & PL_MOVES_BACK && carry(before, now) ? MOVED :
									 0;
	made->decision.opened = 0;
	made->decision.owner = 0;
	if (!carry(before, &made->decision))
		return 0;
	return bpf_sk_storage_get(&decisions, sk, &made->decision,
				  BPF_SK_STORAGE_GET_F_CREATE) ?
		       MOVED :
		       0;
}

static __noinline int bring(struct bpf_sock *sk, __u64 cookie)
{
	void *before = bpf_sk_storage_get(&former, sk, NULL, 0);

	if (before)
		return bring_from(before, sk, cookie);
	if (!(cfg_moves & PL_MOVES_CELLS))
		return 0;
	before = former_cell_at(cookie);
	if (!before || !formerly(before, cookie))
		return 0;
	return bring_from(before, sk, cookie);
}

/* carry_live makes an entry of live of a former one. The loader writes its
 * body.
 */
static __noinline __u64 carry_live(void *from, struct live *to)
{
	__u64 done;

	asm volatile("%0 = 0" : "=r"(done) : "r"(from), "r"(to) : "memory");
	return done;
}

/* take_back deletes the copy of an entry. */
static __noinline int take_back(const struct live_key *key, __u64 cookie)
{
	struct live *l = bpf_map_lookup_elem(&live, key);

	if (!l || l->cookie != cookie)
		return 0;
	return bpf_map_delete_elem(&live, key);
}

/* pl_move_live moves an entry of live. First it is copied: from then on hooks
 * find the new one. What a hook that had found the former one has written since
 * is taken over when no such hook is at work any more, and the former one goes.
 *
 * sockops, when a connection ends, deletes the former entry and then the new
 * one. So who finds the former one gone after the copy takes the copy back,
 * unless the address is another connection's by now.
 */
SEC("tc")
int pl_move_live(struct __sk_buff *skb)
{
	struct move *m = (void *)(long)skb->data + ETH_HLEN;
	void *end = (void *)(long)skb->data_end;
	__u64 zero = 0, cookie;
	union bench *made = bpf_map_lookup_elem(&workbench, &zero);
	union {
		__u64 d[5];
		struct live_key k;
	} u = {};
	struct live *now;
	void *theirs;
	__u8 worker, hold;

	if (!made || (void *)(m + 1) > end)
		return -1;
	u.d[0] = PAIR(m->own.w[0], m->own.w[1]);
	u.d[1] = PAIR(m->own.w[2], m->own.w[3]);
	u.d[2] = PAIR(m->peer.w[0], m->peer.w[1]);
	u.d[3] = PAIR(m->peer.w[2], m->peer.w[3]);
	u.d[4] = m->own_port | (__u32)m->peer_port << 16;
	theirs = bpf_map_lookup_elem(&former_live, &u.k);
	if (!theirs)
		return 0;
	if (!m->last) {
		carry_live(theirs, &made->live);
		cookie = made->live.cookie;
		if (bpf_map_update_elem(&live, &u.k, &made->live, BPF_NOEXIST))
			return 0;
		fence(); /* or both would miss what the other has done */
		theirs = bpf_map_lookup_elem(&former_live, &u.k);
		if (!theirs) {
			take_back(&u.k, cookie);
			return 0;
		}
	}
	now = bpf_map_lookup_elem(&live, &u.k);
	if (!now)
		return 0; /* there was no memory for it */
	if (now->cookie == *(__u64 *)former_cookie(theirs)) {
		/* Only what is news there: hooks go on with the new one. */
		worker = *(__u8 *)former_worker(theirs);
		if (worker && !now->worker)
			now->worker = worker;
		hold = *(__u8 *)former_hold(theirs);
		if (hold != HOLD_YES && now->hold == HOLD_YES)
			now->hold = hold;
	}
	if (m->last)
		bpf_map_delete_elem(&former_live, &u.k);
	return MOVED;
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
	__u64 cookie;
	int moved;

	if ((void *)(m + 1) > end)
		return -1;
	cookie = m->cookie;
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
	moved = bring(sk, cookie);
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
	__sync_fetch_and_add(n, m->add);
	return MOVED;
}

/* pl_add_usage is pl_add for what a container uses. */
SEC("tc")
int pl_add_usage(struct __sk_buff *skb)
{
	struct move *m = (void *)(long)skb->data + ETH_HLEN;
	void *end = (void *)(long)skb->data_end;
	struct usage *u;

	if ((void *)(m + 1) > end)
		return -1;
	u = usage_of(m->group);
	if (!u)
		return 0;
	__sync_fetch_and_add(&u->slots, m->slots);
	__sync_fetch_and_add(&u->conns, m->conns);
	__sync_fetch_and_add(&u->events_lost, m->events_lost);
	return MOVED;
}
