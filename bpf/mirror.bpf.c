//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The result of connect(2) is the network's own: on its way back through lo the
 * handler's SYN-ACK is kept from the application until the handler's dial has
 * ended. Then the process injects frames: the third ACK in the application's
 * name and the SYN-ACK, or a reset, or an ICMP error.
 *
 * The answer is held and not the SYN: then the kernel keeps the half-open
 * connection, what is sent again finds it, and there is one frame less to
 * inject.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "include/config.h"
#include "include/count.h"
#include "include/decide.h"
#include "include/former.h"
#include "include/packet.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define TCX_NEXT -1
#define TCX_DROP 2

/* What a TCP segment from one of our slots is about. */
struct segment {
	union {
		__u64 d[5];
		struct live_key k;
	} u;
	__u32 size; /* of all its headers */
	__u8 flags;
};

/* What is read of a TCP header. */
struct ports {
	__u64 sport, dport, doff, flags;
};

/* Each family reads its own, and an operand of its own ends the branch: clang
 * would make one read at a variable offset of the two, which needs CAP_PERFMON.
 */
static __always_inline void read_tcp(const struct tcp *tcp, struct ports *p)
{
	p->sport = tcp->sport;
	p->dport = tcp->dport;
	p->doff = tcp->doff;
	p->flags = tcp->flags;
}

/* from_slot reads a segment that a slot sends, and tells whether it is one.
 * IPv4 with options is left alone: such an answer passes, and the connection is
 * early.
 */
static __always_inline bool from_slot(struct __sk_buff *skb, struct segment *s)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	struct ip_addr src, dst;
	struct eth *eth = data;
	struct ports tcp;
	__u32 size;

	if (data + ETH_HLEN + IP4_HLEN + TCP_HLEN > end)
		return false;
	if (eth->proto == bpf_htons(ETH_P_IP)) {
		struct ip4 *ip = data + ETH_HLEN;

		if (ip->version_ihl != 0x45 || ip->proto != IPPROTO_TCP)
			return false;
		src = mapped(ip->src);
		dst = mapped(ip->dst);
		read_tcp(data + ETH_HLEN + IP4_HLEN, &tcp);
		size = ETH_HLEN + IP4_HLEN;
		asm volatile("" ::"i"(4) : "memory");
	} else if (eth->proto == bpf_htons(ETH_P_IPV6)) {
		struct ip6 *ip = data + ETH_HLEN;

		if (data + ETH_HLEN + IP6_HLEN + TCP_HLEN > end ||
		    ip->next != IPPROTO_TCP)
			return false;
		src = ip_of(ip->src[0], ip->src[1], ip->src[2], ip->src[3]);
		dst = ip_of(ip->dst[0], ip->dst[1], ip->dst[2], ip->dst[3]);
		read_tcp(data + ETH_HLEN + IP6_HLEN, &tcp);
		size = ETH_HLEN + IP6_HLEN;
		asm volatile("" ::"i"(6) : "memory");
	} else {
		return false;
	}
	s->flags = tcp.flags;
	if (!(s->flags & (TCP_SYN | TCP_RST)) ||
	    slot_of(&src, cfg_slot4, cfg_slot6) < 0)
		return false;
	s->size = size + (tcp.doff >> 4) * 4;
	s->u.d[0] = PAIR(dst.w[0], dst.w[1]);
	s->u.d[1] = PAIR(dst.w[2], dst.w[3]);
	s->u.d[2] = PAIR(src.w[0], src.w[1]);
	s->u.d[3] = PAIR(src.w[2], src.w[3]);
	s->u.d[4] = bpf_ntohs(tcp.dport) | (__u32)bpf_ntohs(tcp.sport) << 16;
	return true;
}

/* ours tells whether the process made a frame. */
static __always_inline bool ours(const struct eth *eth)
{
	__u64 tag = (__u64)eth->src[0] | (__u64)eth->src[1] << 16 |
		    (__u64)eth->src[2] << 32;

	return tag == cfg_frame_tag && tag;
}

/* send_round sends a frame of the process's through lo once more: a packet from
 * a local address is a martian, unless it has an output route.
 */
static __always_inline int send_round(struct __sk_buff *skb)
{
	struct segment s = {};
	struct live *l;
	void *theirs;

	/* The verdict is on its way: from now on answers pass. */
	if (from_slot(skb, &s)) {
		l = bpf_map_lookup_elem(&live, &s.u.k);
		if (l) {
			l->hold = HOLD_OVER;
		} else if (cfg_moves & PL_MOVES_LIVE) {
			theirs = bpf_map_lookup_elem(&former_live, &s.u.k);
			if (theirs)
				*(__u8 *)former_hold(theirs) = HOLD_OVER;
		}
	}
	count(REASON_INJECTED);
	return bpf_redirect_neigh(skb->ifindex, NULL, 0, 0);
}

static __always_inline bool beats(void)
{
	__u64 zero = 0, now = bpf_ktime_get_ns();
	struct beat *b = bpf_map_lookup_elem(&beat, &zero);

	/* As in obstacle: a stamp may be younger than now. */
	return b && b->stamp &&
	       (now <= b->stamp || now - b->stamp <= b->max_age);
}

/* on_failure_of gives that of a connection. */
static __always_inline __u32 on_failure_of(const struct ip_addr *orig,
					   const struct segment *s,
					   const struct settings *set)
{
	union {
		__u64 d[3];
		struct endpoint_key k;
	} u = { .d = { PAIR(orig->w[0], orig->w[1]),
		       PAIR(orig->w[2], orig->w[3]), s->u.k.slot_port } };
	struct service *service = bpf_map_lookup_elem(&services, &u.k);

	return service ? service->on_failure : set->on_failure;
}

/* hold gives an answer to the worker, and tells whether it is to be kept back.
 * Where the ring has no room it is as if it had been lost: the kernel sends it
 * again after a second.
 */
static __always_inline bool hold(struct __sk_buff *skb, __u64 worker,
				 const struct segment *s)
{
	__u64 index = worker - 1;
	__u32 size = s->size;
	struct held *h;
	void *ring = bpf_map_lookup_elem(&held, &index);

	if (!ring || !beats()) {
		count(REASON_HOLD_STALE);
		return false;
	}
	h = bpf_ringbuf_reserve(ring, sizeof(*h), 0);
	if (!h) {
		count(REASON_HOLD_FULL);
		return true;
	}
	h->key = s->u.k;
	h->mark = skb->mark;
	h->kind = HELD_ANSWER;
	h->size = size;
	if (size < ETH_HLEN + IP4_HLEN + TCP_HLEN || size > PL_FRAME_MAX ||
	    bpf_skb_load_bytes(skb, 0, h->frame, size)) {
		/* Cut short: no kernel makes such an answer. */
		bpf_ringbuf_discard(h, 0);
		count(REASON_HOLD_STALE);
		return false;
	}
	count(REASON_HELD);
	bpf_ringbuf_submit(h, 0);
	return true;
}

/* state_at is the TCP state of what has one end of a segment's way, 0 if the
 * kernel finds nothing: of the application it goes to, or of what the slot sent
 * it from.
 */
static __always_inline __u32 state_at(struct __sk_buff *skb,
				      const struct segment *s, bool sender)
{
	union {
		__u64 d[5];
		struct bpf_sock_tuple t;
	} u = {};
	const struct live_key *k = &s->u.k;
	int from = sender ? 0 : 2, to = sender ? 2 : 0;
	__u32 source, dest;
	struct bpf_sock *sk;
	__u32 state;

	/* The tuple is that of what the socket receives. */
	source = bpf_htons(sender ? k->source_port : k->slot_port);
	dest = bpf_htons(sender ? k->slot_port : k->source_port);
	if (is_mapped(&k->slot)) {
		u.d[0] = sender ? PAIR(k->source.w[3], k->slot.w[3]) :
				  PAIR(k->slot.w[3], k->source.w[3]);
		u.d[1] = source | dest << 16;
		sk = bpf_skc_lookup_tcp(skb, &u.t, sizeof(u.t.ipv4),
					BPF_F_CURRENT_NETNS, 0);
	} else {
		u.d[0] = s->u.d[from];
		u.d[1] = s->u.d[from + 1];
		u.d[2] = s->u.d[to];
		u.d[3] = s->u.d[to + 1];
		u.d[4] = source | dest << 16;
		sk = bpf_skc_lookup_tcp(skb, &u.t, sizeof(u.t.ipv6),
					BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk)
		return 0;
	state = sk->state;
	bpf_sk_release(sk);
	return state;
}

/* keep_reset gives the reason to keep a reset from the application, or
 * REASON_NONE: it is the refusal of a SYN that the kernel side has no use for.
 */
static __always_inline enum reason keep_reset(struct __sk_buff *skb,
					      const struct segment *s)
{
	__u64 zero = 0;
	struct settings *set = bpf_map_lookup_elem(&settings, &zero);
	struct beat *b = bpf_map_lookup_elem(&beat, &zero);
	struct live *l = bpf_map_lookup_elem(&live, &s->u.k);
	const struct ip_addr *orig;
	struct refusal r = {};
	void *theirs;

	/* While the process drains, its listeners may be closed: then it is
	 * meant.
	 */
	if (!set || !b || set->draining)
		return REASON_NONE;
	if (l) {
		r.hold = l->hold;
		r.canary = l->canary;
		orig = &l->orig;
	} else if (cfg_moves & PL_MOVES_LIVE) {
		theirs = bpf_map_lookup_elem(&former_live, &s->u.k);
		if (!theirs)
			return REASON_NONE;
		r.hold = *(__u8 *)former_hold(theirs);
		r.canary = *(__u8 *)former_canary(theirs);
		orig = former_orig(theirs);
	} else {
		return REASON_NONE;
	}
	/* A refusal would be the process's. This one is for the SYN of an
	 * application that uses the same port again, sooner than the process
	 * could end what the kernel keeps of the last time. It has ended now;
	 * the SYN is sent again. One that is open without a handshake
	 * (TCP_REPAIR) is nobody's, and is to hear of it.
	 */
	r.state = state_at(skb, s, false);
	if (r.hold == HOLD_YES && r.state == BPF_TCP_SYN_SENT && beats())
		return REASON_HELD;
	r.now = bpf_ktime_get_ns();
	r.stamp = b->stamp;
	r.on_failure = on_failure_of(orig, s, set);
	return awaits(&r) ? REASON_AWAITED : REASON_NONE;
}

/* is_ordinary is true for what nearly all packets are, at the least cost: no
 * frame of the process's, whose tag is never 0 there, and neither SYN nor
 * reset. Of what is no TCP the answer means nothing.
 */
static __always_inline bool is_ordinary(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	struct eth *eth = data;
	struct tcp *tcp;

	if (data + ETH_HLEN + IP4_HLEN + TCP_HLEN > end)
		return true;
	if (eth->src[0])
		return false;
	tcp = data + ETH_HLEN + IP4_HLEN;
	if (eth->proto == bpf_htons(ETH_P_IP))
		return !(tcp->flags & (TCP_SYN | TCP_RST));
	if (data + ETH_HLEN + IP6_HLEN + TCP_HLEN > end)
		return true;
	tcp = data + ETH_HLEN + IP6_HLEN;
	return !(tcp->flags & (TCP_SYN | TCP_RST));
}

/* judge_answer tells what becomes of an answer to the application whose entry
 * has these: hold is HOLD_YES.
 */
static __always_inline int judge_answer(struct __sk_buff *skb,
					const struct segment *s, __u8 *holds,
					__u64 worker)
{
	if (hold(skb, worker, s))
		return TCX_DROP;
	/* The connection is early: its resets are the application's too. */
	*holds = HOLD_NO;
	return TCX_NEXT;
}

/* judge_frame is for the few that are not. */
static __noinline int judge_frame(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	struct segment s = {};
	enum reason why;
	struct live *l;
	void *theirs;

	if (data + ETH_HLEN > end)
		return TCX_NEXT;
	if (ours(data))
		return send_round(skb);
	if (!from_slot(skb, &s))
		return TCX_NEXT;
	if (s.flags & TCP_RST) {
		why = keep_reset(skb, &s);
		if (why == REASON_NONE)
			return TCX_NEXT;
		count(why);
		return TCX_DROP;
	}
	/* A handler accepts and never opens. Somebody who knows the port that
	 * an application will connect from could bind the slot, and open a
	 * connection of his own that meets the application's half-way.
	 */
	if (forged(s.flags & TCP_ACK, state_at(skb, &s, true))) {
		count(REASON_FORGED);
		return TCX_DROP;
	}
	l = bpf_map_lookup_elem(&live, &s.u.k);
	if (l)
		return l->hold == HOLD_YES ?
			       judge_answer(skb, &s, &l->hold, l->worker) :
			       TCX_NEXT;
	if (cfg_moves & PL_MOVES_LIVE) {
		theirs = bpf_map_lookup_elem(&former_live, &s.u.k);
		if (theirs && *(__u8 *)former_hold(theirs) == HOLD_YES)
			return judge_answer(skb, &s, former_hold(theirs),
					    *(__u8 *)former_worker(theirs));
	}
	return TCX_NEXT;
}

/* Attached to the ingress of lo. Everything that is not ours to keep goes on to
 * whoever else is there.
 */
SEC("tc")
int pl_hold(struct __sk_buff *skb)
{
	return is_ordinary(skb) ? TCX_NEXT : judge_frame(skb);
}

/* Run by the process (BPF_PROG_TEST_RUN) with a frame, which comes in at the
 * interface it is run for: lo.
 */
SEC("tc")
int pl_inject(struct __sk_buff *skb)
{
	return bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS) ? 1 : 0;
}
