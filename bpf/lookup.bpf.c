//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Packets for our slots: to the handler, or nowhere. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "include/config.h"
#include "include/count.h"
#include "include/decide.h"
#include "include/former.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* worker_of gives the worker of this CPU: the packet's data is in its cache. A
 * held connection stays with the one that dials for it, wherever its SYN is
 * sent from again. Its entry is looked up again: the verifier of 6.1 follows
 * the pointer also where it is known to be NULL.
 */
static __always_inline __u32 worker_of(const struct live_key *key, __u32 hold,
				       __u32 worker, __u32 workers)
{
	__u32 here = bpf_get_smp_processor_id() % workers;
	struct live *l;
	void *theirs;

	if (!hold)
		return here;
	if (!worker) {
		worker = here + 1;
		l = bpf_map_lookup_elem(&live, key);
		if (l) {
			l->worker = worker;
		} else if (cfg_moves & PL_MOVES_LIVE) {
			theirs = bpf_map_lookup_elem(&former_live, key);
			if (theirs)
				*(__u8 *)former_worker(theirs) = worker;
		}
	}
	return (worker - 1) % workers;
}

/* in_dry_run tells whether it is the dry run of a connect that looks: that has
 * an interface, unlike the hook. It runs with softirqs off, so no packet can
 * come in between.
 */
static __always_inline bool in_dry_run(void)
{
	__u64 zero = 0;
	__u64 *runs = bpf_map_lookup_elem(&dry_runs, &zero);

	return runs && *runs;
}

/* has_died tells whether the process is being ended: its listeners are still
 * there, and what came to them now would be lost.
 */
static __always_inline bool has_died(void)
{
	__u64 zero = 0;
	struct state *st = bpf_map_lookup_elem(&state, &zero);

	return st && st->owner == PL_OWNER_DIED;
}

SEC("sk_lookup")
int pl_lookup(struct bpf_sk_lookup *ctx)
{
	union {
		__u64 d[5];
		struct live_key k;
	} u = {};
	struct ip_addr slot, source;
	__u16 port;
	struct arrival p = {};
	struct settings *set;
	struct bpf_sock *sk;
	__u32 hold = 0, worker = 0;
	struct live *l;
	void *theirs;
	__u64 index = 0, zero = 0;
	__u32 workers;
	enum reason why;
	bool v6 = ctx->family != AF_INET, dry = false;
	int n;

	if (!v6) {
		slot = mapped(ctx->local_ip4);
		source = mapped(ctx->remote_ip4);
	} else {
		slot = LOAD_IP6(ctx->local_ip6);
		source = LOAD_IP6(ctx->remote_ip6);
	}
	n = slot_of(&slot, cfg_slot4, cfg_slot6);
	if (n < 0)
		return SK_PASS;

	port = bpf_ntohs(ctx->remote_port);
	u.d[0] = PAIR(source.w[0], source.w[1]);
	u.d[1] = PAIR(source.w[2], source.w[3]);
	u.d[2] = PAIR(slot.w[0], slot.w[1]);
	u.d[3] = PAIR(slot.w[2], slot.w[3]);
	u.d[4] = port | ctx->local_port << 16;
	p.tcp = ctx->protocol == IPPROTO_TCP;
	if (!port) {
		dry = in_dry_run();
		p.probe = dry || !ctx->ingress_ifindex;
	}
	if (p.tcp && !p.probe) {
		l = bpf_map_lookup_elem(&live, &u.k);
		if (l) {
			p.live = true;
			hold = l->hold == HOLD_YES;
			worker = l->worker;
		} else if (cfg_moves & PL_MOVES_LIVE) {
			theirs = bpf_map_lookup_elem(&former_live, &u.k);
			if (theirs) {
				p.live = true;
				hold = *(__u8 *)former_hold(theirs) == HOLD_YES;
				worker = *(__u8 *)former_worker(theirs);
			}
		}
	}
	p.listener = true;

	why = admit(&p);
	if (why == REASON_ADMITTED || why == REASON_PROBE) {
		set = bpf_map_lookup_elem(&settings, &zero);
		workers = set ? set->workers : 0;
		index = v6 ? PL_WORKERS_MAX : 0;
		if (n == PL_SLOT_CANARY)
			index = PL_CANARY_LISTENER + v6;
		else if (workers)
			index += worker_of(&u.k, hold, worker, workers);
		p.listener = false;
		sk = has_died() ? NULL :
				  bpf_map_lookup_elem(&listeners, &index);
		if (sk) {
			p.listener = !bpf_sk_assign(
				ctx, sk, BPF_SK_LOOKUP_F_NO_REUSEPORT);
			bpf_sk_release(sk);
		}
		why = admit(&p);
	}
	if (!dry)
		count(why);
	return why == REASON_ADMITTED || why == REASON_PROBE ? SK_PASS :
							       SK_DROP;
}
