//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* getpeername(2) and getsockname(2) of the sockets in scope: what they would be
 * without a slot.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "include/config.h"
#include "include/decide.h"
#include "include/decision.h"
#include "include/former.h"
#include "include/maps.h"
#include "include/sent.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define PROCEED 1

/* orig_of resolves one of our slots. A free one resolves to nothing. */
static __always_inline const struct ip_addr *orig_of(const struct ip_addr *a)
{
	int n = slot_of(a, cfg_slot4, cfg_slot6);
	struct slot *s;
	void *theirs;
	__u64 index;

	if (n < 0)
		return NULL;
	index = n;
	s = bpf_map_lookup_elem(&slots, &index);
	if (s && s->state != SLOT_FREE)
		return &s->orig;
	if (cfg_moves & PL_MOVES_SLOTS) {
		theirs = bpf_map_lookup_elem(&former_slots, &index);
		if (theirs && *(__u32 *)former_slot_state(theirs) != SLOT_FREE)
			return former_slot_orig(theirs);
	}
	return NULL;
}

/* The key of a connection, on the stack as net.h says of PAIR. */
union key {
	__u64 d[5];
	struct live_key k;
};

#define KEY_OF(own, peer, own_port, port)          \
	{ .d = { PAIR((own)->w[0], (own)->w[1]),   \
		 PAIR((own)->w[2], (own)->w[3]),   \
		 PAIR((peer)->w[0], (peer)->w[1]), \
		 PAIR((peer)->w[2], (peer)->w[3]), \
		 (own_port) | (port) << 16 } }

/* What a socket that was sent straight to an endpoint was asked for. */
struct asked {
	struct ip_addr addr;
	__u64 port; /* 0: not known, or not such a socket */
};

/* recall fills what from a decision, if that is about this peer: a socket that
 * has been disconnected, and connected to another, tells of that one.
 */
static __always_inline void recall(const struct decision *d,
				   const struct ip_addr *peer, __u16 port,
				   struct asked *what)
{
	const struct ip_addr *to = &d->key.slot;

	if (d->path != PATH_DIRECT || d->key.slot_port != port ||
	    to->w[0] != peer->w[0] || to->w[1] != peer->w[1] ||
	    to->w[2] != peer->w[2] || to->w[3] != peer->w[3])
		return;
	what->addr = LOAD_IP6(d->orig.w);
	what->port = d->orig_port;
}

/* recall_outlived is for an MPTCP socket whose first subflow has ended. */
static __always_inline void recall_outlived(const struct ip_addr *own,
					    const struct ip_addr *peer,
					    __u64 own_port, __u64 port,
					    struct asked *what)
{
	union key u = KEY_OF(own, peer, own_port, port);
	struct endpoint_key *k = bpf_map_lookup_elem(&outlived, &u.k);

	if (!k)
		return;
	what->addr = LOAD_IP6(k->addr.w);
	what->port = k->port;
}

/* recall_row tells what row n says, if that is about this connection. */
static __noinline __u64 recall_row(__u64 n, const struct live_key *k,
				   struct asked *what)
{
	struct sent *s = sent_of(n);
	__u64 owner;

	if (!s)
		return 0;
	/* First: whose it is says whether the key is that of what follows. */
	owner = *(volatile __u64 *)&s->owner;
	fence();
	if (!owner || !same_key(&s->key, k))
		return 0;
	what->addr = LOAD_IP6(s->asked.addr.w);
	what->port = s->asked.port;
	fence();
	/* Or it has become another's meanwhile. */
	if (owner == *(volatile __u64 *)&s->owner)
		return 1;
	what->port = 0;
	return 0;
}

/* recall_sent tells by the addresses, if the connection is noted by them. */
static __always_inline bool recall_sent(const struct ip_addr *own,
					const struct ip_addr *peer,
					__u64 own_port, __u64 port,
					struct asked *what)
{
	union key u = KEY_OF(own, peer, own_port, port);
	__u64 bucket = bucket_of(&u.k);
	__u64 *b = bpf_map_lookup_elem(&sent_buckets, &bucket);
	__u64 ways, way;

	if (!b)
		return false;
	ways = *(volatile __u64 *)b;
	for (int i = 0; i < WAYS; i++, ways >>= WAY_BITS) {
		way = ways & WAY_MASK;
		if (way && recall_row(way - 1, &u.k, what))
			return true;
	}
	return false;
}

/* recall_subflow is for an application's MPTCP socket: its first subflow, which
 * is another socket, is the one that connected, and it has the same addresses.
 * By those alone a full map would either forget a live socket or refuse a new
 * one. So who has no place there has its decision with the subflow itself.
 */
static __always_inline void recall_subflow(struct bpf_sock_addr *ctx,
					   const struct ip_addr *own,
					   const struct ip_addr *peer,
					   __u16 port, struct asked *what)
{
	__u64 ports =
		PAIR(bpf_htons(port) | bpf_htons(ctx->sk->src_port) << 16, 0);
	union {
		__u64 d[5];
		struct bpf_sock_tuple t;
	} u = {};
	struct decision *d;
	struct bpf_sock *sk;

	if (recall_sent(own, peer, ctx->sk->src_port, port, what))
		return;
	if (is_mapped(peer)) {
		u.d[0] = PAIR(peer->w[3], own->w[3]);
		u.d[1] = ports;
		sk = bpf_sk_lookup_tcp(ctx, &u.t, sizeof(u.t.ipv4),
				       BPF_F_CURRENT_NETNS, 0);
	} else {
		u.d[0] = PAIR(peer->w[0], peer->w[1]);
		u.d[1] = PAIR(peer->w[2], peer->w[3]);
		u.d[2] = PAIR(own->w[0], own->w[1]);
		u.d[3] = PAIR(own->w[2], own->w[3]);
		u.d[4] = ports;
		sk = bpf_sk_lookup_tcp(ctx, &u.t, sizeof(u.t.ipv6),
				       BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk) {
		recall_outlived(own, peer, ctx->sk->src_port, port, what);
		return;
	}
	d = stored_with(sk);
	if (d)
		recall(d, peer, port, what);
	bpf_sk_release(sk);
}

/* asked_for gives what the socket's application asked for, if that is not where
 * it is connected to.
 */
static __always_inline struct asked asked_for(struct bpf_sock_addr *ctx,
					      const struct ip_addr *own,
					      const struct ip_addr *peer)
{
	__u16 port = bpf_ntohs((__u16)ctx->user_port);
	struct decision *d;
	struct asked what = {};
	__u64 cookie;

	if (ctx->protocol == IPPROTO_MPTCP) {
		/* Elsewhere the same addresses are another connection's, and
		 * nobody is sent anywhere.
		 */
		if (bpf_get_netns_cookie(ctx) == cfg_netns)
			recall_subflow(ctx, own, peer, port, &what);
		return what;
	}
	cookie = bpf_get_socket_cookie(ctx);
	d = decision_of(ctx->sk, cookie);
	if (d)
		recall(d, peer, port, &what);
	return what;
}

SEC("cgroup/getpeername4")
int pl_getpeername4(struct bpf_sock_addr *ctx)
{
	struct ip_addr a = mapped(ctx->user_ip4);
	struct ip_addr own = mapped(ctx->sk->src_ip4);
	const struct ip_addr *orig = orig_of(&a);
	struct asked what;

	if (orig) {
		ctx->user_ip4 = orig->w[3];
		return PROCEED;
	}
	what = asked_for(ctx, &own, &a);
	if (what.port) {
		ctx->user_ip4 = what.addr.w[3];
		ctx->user_port = bpf_htons(what.port);
	}
	return PROCEED;
}

SEC("cgroup/getpeername6")
int pl_getpeername6(struct bpf_sock_addr *ctx)
{
	struct ip_addr a = LOAD_IP6(ctx->user_ip6);
	struct ip_addr own = LOAD_IP6(ctx->sk->src_ip6);
	const struct ip_addr *orig = orig_of(&a);
	struct asked what;

	if (orig) {
		STORE_IP6(ctx->user_ip6, *orig);
		return PROCEED;
	}
	what = asked_for(ctx, &own, &a);
	if (what.port) {
		STORE_IP6(ctx->user_ip6, what.addr);
		ctx->user_port = bpf_htons(what.port);
	}
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
	union key u = KEY_OF(own, peer, from, to);
	const struct ip_addr *seen;
	struct decision *d;
	struct live *l;
	void *theirs;
	__u64 cookie;

	if (!to || slot_of(peer, cfg_slot4, cfg_slot6) < 0)
		return NULL;
	cookie = bpf_get_socket_cookie(ctx);
	d = decision_of(ctx->sk, cookie);
	if (d) {
		seen = &d->seen;
	} else {
		l = bpf_map_lookup_elem(&live, &u.k);
		if (l) {
			seen = &l->seen;
		} else if (cfg_moves & PL_MOVES_LIVE) {
			theirs = bpf_map_lookup_elem(&former_live, &u.k);
			if (!theirs)
				return NULL;
			seen = former_seen(theirs);
		} else {
			return NULL;
		}
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
