//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The decisions of include/decide.h and include/net.h, one program each, for a
 * test run: the context holds the input, and then the answer.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "../include/decide.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct run_leave_alone {
	struct attempt in;
	__u32 out; /* enum reason */
	__u32 zero;
};

SEC("syscall")
int pl_leave_alone(struct run_leave_alone *ctx)
{
	struct attempt in = ctx->in;

	ctx->out = leave_alone(&in);
	return 0;
}

struct run_by_rules {
	struct facts in;
	__u8 zero[3];
	__u32 out; /* enum reason */
};

SEC("syscall")
int pl_by_rules(struct run_by_rules *ctx)
{
	struct facts in = ctx->in;

	ctx->out = by_rules(&in);
	return 0;
}

struct run_obstacle {
	struct health in;
	__u32 out; /* enum reason */
	__u32 zero;
};

SEC("syscall")
int pl_obstacle(struct run_obstacle *ctx)
{
	struct health in = ctx->in;

	ctx->out = obstacle(&in);
	return 0;
}

struct run_path_of {
	__u32 why; /* enum reason */
	__u32 on_failure; /* enum on_failure */
	__u32 out; /* enum conn_path */
};

SEC("syscall")
int pl_path_of(struct run_path_of *ctx)
{
	ctx->out = path_of(ctx->why, ctx->on_failure);
	return 0;
}

struct run_admit {
	struct arrival in;
	__u32 out; /* enum reason */
};

SEC("syscall")
int pl_admit(struct run_admit *ctx)
{
	struct arrival in = ctx->in;

	ctx->out = admit(&in);
	return 0;
}

struct run_ending_of {
	__u32 state; /* BPF_TCP_* */
	__u32 segs_in;
	__u32 out; /* enum ending */
};

SEC("syscall")
int pl_ending_of(struct run_ending_of *ctx)
{
	ctx->out = ending_of(ctx->state, ctx->segs_in);
	return 0;
}

struct run_holds {
	__u64 now;
	__u64 answered;
	__u32 mode; /* enum connect_mode */
	__u32 out;
};

SEC("syscall")
int pl_holds(struct run_holds *ctx)
{
	ctx->out = holds(ctx->mode, ctx->now, ctx->answered);
	return 0;
}

/* Everything that net.h and decide.h say of one address. */
struct run_address {
	struct ip_addr in;
	__u32 slot4; /* as in include/config.h */
	__u32 slot6;
	__u8 mapped;
	__u8 zero;
	__u8 loopback;
	__u8 link_local;
	__u8 metadata;
	__u8 multicast;
	__u8 in_supernet;
	__u8 padding;
	__s32 slot;
};

SEC("syscall")
int pl_address(struct run_address *ctx)
{
	struct ip_addr in = ctx->in;

	ctx->mapped = is_mapped(&in);
	ctx->zero = is_zero(&in);
	ctx->loopback = is_loopback(&in);
	ctx->link_local = is_link_local(&in);
	ctx->metadata = is_metadata(&in);
	ctx->multicast = is_multicast(&in);
	ctx->in_supernet = in_supernet(&in);
	ctx->slot = slot_of(&in, ctx->slot4, ctx->slot6);
	return 0;
}

struct run_slot_addr {
	struct ip_addr like;
	__u32 n;
	__u32 slot4;
	__u32 slot6;
	struct ip_addr out;
};

SEC("syscall")
int pl_slot_addr(struct run_slot_addr *ctx)
{
	struct ip_addr like = ctx->like;

	ctx->out = slot_addr(&like, ctx->n, ctx->slot4, ctx->slot6);
	return 0;
}
