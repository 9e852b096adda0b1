//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A dry run of the connect hook: what it would do with a connection. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "include/judge.h"
#include "include/packet.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

__noinline __u32 by_maps(struct gathered *g, struct details *more)
{
	return g && more ? plan_for(g, more, true) : PATH_PASS;
}

__noinline int choose_soon(struct gathered *g, struct details *more)
{
	return g && more ? choose_first(g, more, true) : 0;
}

__noinline int choose(struct gathered *g, struct details *more)
{
	return g && more ? choose_one(g, more, true) : 0;
}

/* looking tells the look-up program that it is us. */
static __noinline void looking(__u64 now)
{
	__u64 zero = 0;
	__u64 *runs = bpf_map_lookup_elem(&dry_runs, &zero);

	if (runs)
		*runs = now;
}

/* exempt gives the reason to leave a connection alone, or REASON_NONE: that of
 * a TCP socket of the namespace, bound to no device, that is not the handler's.
 */
static __noinline enum reason exempt(struct __sk_buff *ctx,
				     const struct gathered *g)
{
	struct attempt a = {};

	a.dst = g->dst;
	a.slot4 = cfg_slot4;
	a.slot6 = cfg_slot6;
	a.protocol = IPPROTO_TCP;
	a.own_addr = is_own_addr(&g->dst);
	if (in_supernet(&a.dst))
		a.slot_listener = slot_answers(ctx, &g->dst, g->port);
	return leave_alone(&a);
}

/* pl_explain is for test runs only: it answers in the packet that asked. */
SEC("tc")
int pl_explain(struct __sk_buff *ctx)
{
	struct dry_run *r = (void *)(long)ctx->data + ETH_HLEN;
	void *end = (void *)(long)ctx->data_end;
	struct gathered g = {};
	struct details more = {};
	enum conn_path path;

	if ((void *)(r + 1) > end)
		return -1;
	g.dst = LOAD_IP6(r->dst.w);
	g.bound = LOAD_IP6(r->bound.w);
	g.group = r->group;
	g.port = r->port;
	g.now = bpf_ktime_get_ns();
	g.seed = r->seed ? r->seed : bpf_get_prandom_u32();
	looking(1);
	g.why = exempt(ctx, &g);
	path = judge(ctx, &g, true, &more, true);
	looking(0);
	/* What a pick gives is of interest on any path. */
	if ((more.flags & (DETAIL_NAMED | DETAIL_PICKED)) == DETAIL_NAMED &&
	    !choose_soon(&g, &more))
		choose(&g, &more);

	r = (void *)(long)ctx->data + ETH_HLEN;
	end = (void *)(long)ctx->data_end;
	if ((void *)(r + 1) > end)
		return -1;
	r->path = path;
	r->reason = g.why;
	r->err = path == PATH_DENY ? g.err : 0;
	r->service = !!(more.flags & DETAIL_NAMED);
	r->set = g.set;
	r->rule = more.rule;
	r->ruled = !!(more.flags & DETAIL_RULED);
	r->hold = g.hold;
	r->tier = !!(more.flags & DETAIL_FAR);
	r->index = more.rule >> 32;
	if (more.flags & DETAIL_PICKED) {
		r->id = g.endpoint;
		r->endpoint_port = g.to_port;
		r->endpoint.w[0] = g.to.w[0];
		r->endpoint.w[1] = g.to.w[1];
		r->endpoint.w[2] = g.to.w[2];
		r->endpoint.w[3] = g.to.w[3];
	}
	return 0;
}
