//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* getpeername(2) and getsockname(2) of the sockets in scope: what they would be
 * without a slot.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "include/config.h"
#include "include/decide.h"
#include "include/maps.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define PROCEED 1

/* orig_of resolves one of our slots. A free one resolves to nothing. */
static __always_inline struct slot *orig_of(const struct ip_addr *a)
{
	int n = slot_of(a, cfg_slot4, cfg_slot6);
	struct slot *s;
	__u64 index;

	if (n < 0)
		return NULL;
	index = n;
	s = bpf_map_lookup_elem(&slots, &index);
	if (!s || s->state == SLOT_FREE)
		return NULL;
	return s;
}

SEC("cgroup/getpeername4")
int pl_getpeername4(struct bpf_sock_addr *ctx)
{
	struct ip_addr a = mapped(ctx->user_ip4);
	struct slot *s = orig_of(&a);

	if (s)
		ctx->user_ip4 = s->orig.w[3];
	return PROCEED;
}

SEC("cgroup/getpeername6")
int pl_getpeername6(struct bpf_sock_addr *ctx)
{
	struct ip_addr a = LOAD_IP6(ctx->user_ip6);
	struct slot *s = orig_of(&a);

	if (!s)
		return PROCEED;
	STORE_IP6(ctx->user_ip6, s->orig);
	return PROCEED;
}

/* The kernel took a redirected socket's source from the route of its slot. What
 * the application is shown is that of the route to its destination. Binding the
 * socket to it was rejected: the lock on its address would outlast a connect
 * that failed, and AF_UNSPEC.
 *
 * name_of gives what is shown, or NULL. The socket of an application's MPTCP
 * has no decision: its first subflow has, and the same addresses.
 */
static __always_inline const struct ip_addr *name_of(struct bpf_sock_addr *ctx,
						     const struct ip_addr *own,
						     const struct ip_addr *peer)
{
	/* A peer's port is forgotten with the connection, its address is not.
	 */
	__u64 to = bpf_ntohs(ctx->sk->dst_port);
	__u64 from = bpf_ntohs((__u16)ctx->user_port);
	union {
		__u64 d[5];
		struct live_key k;
	} u = { .d = { PAIR(own->w[0], own->w[1]), PAIR(own->w[2], own->w[3]),
		       PAIR(peer->w[0], peer->w[1]),
		       PAIR(peer->w[2], peer->w[3]), from | to << 16 } };
	const struct ip_addr *seen;
	struct decision *d;
	struct live *l;

	if (!to || slot_of(peer, cfg_slot4, cfg_slot6) < 0)
		return NULL;
	d = bpf_sk_storage_get(&decisions, ctx->sk, NULL, 0);
	if (d) {
		seen = &d->seen;
	} else {
		l = bpf_map_lookup_elem(&live, &u.k);
		if (!l)
			return NULL;
		seen = &l->seen;
	}
	return is_zero(seen) ? NULL : seen;
}

SEC("cgroup/getsockname4")
int pl_getsockname4(struct bpf_sock_addr *ctx)
{
	struct ip_addr own = mapped(ctx->user_ip4);
	struct ip_addr peer = mapped(ctx->sk->dst_ip4);
	const struct ip_addr *seen = name_of(ctx, &own, &peer);

	if (seen)
		ctx->user_ip4 = seen->w[3];
	return PROCEED;
}

SEC("cgroup/getsockname6")
int pl_getsockname6(struct bpf_sock_addr *ctx)
{
	struct ip_addr own = LOAD_IP6(ctx->user_ip6);
	struct ip_addr peer = LOAD_IP6(ctx->sk->dst_ip6);
	const struct ip_addr *seen = name_of(ctx, &own, &peer);

	if (seen)
		STORE_IP6(ctx->user_ip6, *seen);
	return PROCEED;
}
