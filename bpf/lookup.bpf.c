//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Packets for our slots: to the handler, or nowhere. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "include/config.h"
#include "include/count.h"
#include "include/decide.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

SEC("sk_lookup")
int pl_lookup(struct bpf_sk_lookup *ctx)
{
	struct live_key k = {};
	struct arrival p = {};
	struct settings *set;
	struct bpf_sock *sk;
	__u32 index = 0, zero = 0, workers;
	enum reason why;

	if (ctx->family == AF_INET) {
		k.slot = mapped(ctx->local_ip4);
		k.source = mapped(ctx->remote_ip4);
	} else {
		k.slot = LOAD_IP6(ctx->local_ip6);
		k.source = LOAD_IP6(ctx->remote_ip6);
		index = PL_WORKERS_MAX;
	}
	if (slot_of(&k.slot, cfg_slot4, cfg_slot6) < 0)
		return SK_PASS;

	k.slot_port = ctx->local_port;
	k.source_port = bpf_ntohs(ctx->remote_port);
	p.tcp = ctx->protocol == IPPROTO_TCP;
	p.probe = !ctx->ingress_ifindex && !k.source_port;
	p.live = p.tcp && !p.probe && bpf_map_lookup_elem(&live, &k);
	p.listener = true;

	why = admit(&p);
	if (why == REASON_ADMITTED || why == REASON_PROBE) {
		/* The worker of this CPU: the packet's data is in its cache. */
		set = bpf_map_lookup_elem(&settings, &zero);
		workers = set ? set->workers : 0;
		if (workers)
			index += bpf_get_smp_processor_id() % workers;
		sk = bpf_map_lookup_elem(&listeners, &index);
		p.listener = false;
		if (sk) {
			p.listener = !bpf_sk_assign(
				ctx, sk, BPF_SK_LOOKUP_F_NO_REUSEPORT);
			bpf_sk_release(sk);
		}
		why = admit(&p);
	}
	count(why);
	return why == REASON_ADMITTED || why == REASON_PROBE ? SK_PASS :
							       SK_DROP;
}
