//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The decisions of include/decide.h and include/net.h, one program each, for a
 * test run: the context holds the input, and then the answer.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "../include/decide.h"
#include "../include/hash.h"

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

struct run_is_plain {
	struct ip_addr in;
	__u32 out;
	__u32 zero;
};

SEC("syscall")
int pl_is_plain(struct run_is_plain *ctx)
{
	struct ip_addr in = ctx->in;

	ctx->out = is_plain(&in);
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
	__u32 asked; /* enum conn_path */
	__u32 set;
	__u32 out; /* enum conn_path */
};

SEC("syscall")
int pl_path_of(struct run_path_of *ctx)
{
	ctx->out = path_of(ctx->why, ctx->on_failure, ctx->asked, ctx->set);
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

struct run_awaits {
	struct refusal in;
	__u32 out;
	__u32 zero;
};

SEC("syscall")
int pl_awaits(struct run_awaits *ctx)
{
	struct refusal in = ctx->in;

	ctx->out = awaits(&in);
	return 0;
}

struct run_peer_ended {
	struct peer_end in;
	__u8 zero[2];
	__u32 out;
	__u32 padding;
};

SEC("syscall")
int pl_peer_ended(struct run_peer_ended *ctx)
{
	struct peer_end in = ctx->in;

	ctx->out = peer_ended(&in);
	return 0;
}

struct run_ending_of {
	struct end in;
	__u8 zero[2];
	__u32 retransmits;
	__u32 out; /* enum ending */
	__u32 failure;
};

SEC("syscall")
int pl_ending_of(struct run_ending_of *ctx)
{
	struct end in = ctx->in;

	ctx->out = ending_of(&in);
	ctx->failure = is_failure(ctx->out, ctx->retransmits);
	return 0;
}

/* The words of a pick, one of each kind. */
struct run_words {
	struct ip_addr addr;
	__u32 port;
	__u32 seed;
	__u32 n;
	__u32 share;
	__u32 hash;
	__u32 word;
	__u32 below;
	__u32 chance;
};

SEC("syscall")
int pl_words(struct run_words *ctx)
{
	struct ip_addr addr = ctx->addr;
	__u64 words = ctx->seed;

	ctx->hash = hash_of(&addr, ctx->port);
	ctx->word = next_word(&words);
	ctx->below = below(&words, ctx->n);
	ctx->chance = chance(&words, ctx->share);
	return 0;
}

struct run_health {
	__u64 until;
	__u64 now;
	__u64 random;
	__u64 well;
	__u64 up;
	__u64 wait;
	__u32 base;
	__u32 max;
	__u32 round;
	__u32 percent;
	__u32 ejected;
	__u32 panics;
};

SEC("syscall")
int pl_health(struct run_health *ctx)
{
	ctx->ejected = is_ejected(ctx->until, ctx->now);
	ctx->panics = panics_at(ctx->well, ctx->up, ctx->percent);
	ctx->wait = wait_of(ctx->base, ctx->max, ctx->round, ctx->random);
	return 0;
}

struct run_is_less {
	__u32 live;
	__u32 weight;
	__u32 other_live;
	__u32 other_weight;
	__u32 out;
};

SEC("syscall")
int pl_is_less(struct run_is_less *ctx)
{
	ctx->out = is_less(ctx->live, ctx->weight, ctx->other_live,
			   ctx->other_weight);
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
