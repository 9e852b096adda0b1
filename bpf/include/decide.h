/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The core: decisions on plain values. No ctx, no map, no clock, so that any
 * program type can run it in a test. The entries gather and apply.
 */
#pragma once
#include "net.h"

#define NS_PER_S 1000000000ULL
#define NS_PER_MS 1000000ULL

/* One connect(2), as the entry sees it. */
struct attempt {
	struct ip_addr dst; /* what the application asked for, normalised */
	__u64 netns;
	__u64 our_netns;
	__u32 bound_dev; /* SO_BINDTODEVICE, 0: none */
	__u32 slot4; /* our range, as in config.h */
	__u32 slot6;
	__u8 protocol;
	__u8 self; /* a socket of the handler's own */
	__u8 own_addr; /* dst is an address of this namespace */
	__u8 slot_listener; /* dst is a slot, and a handler listens there */
};

static __always_inline bool is_loopback(const struct ip_addr *a)
{
	if (is_mapped(a)) {
		__u32 ip = bpf_ntohl(a->w[3]);

		return ip >> 24 == 127 || ip == 0;
	}
	return !a->w[0] && !a->w[1] && !a->w[2] &&
	       (!a->w[3] || a->w[3] == bpf_htonl(1));
}

static __always_inline bool is_link_local(const struct ip_addr *a)
{
	if (is_mapped(a))
		return bpf_ntohl(a->w[3]) >> 16 == 0xa9fe; /* 169.254/16 */
	return (bpf_ntohl(a->w[0]) & 0xffc00000) == 0xfe800000; /* fe80::/10 */
}

/* The metadata services of the clouds: who speaks for a workload there can take
 * its identity, so a relay is never put in between.
 *   169.254.169.254, 169.254.170.2 (AWS, GCP, Azure, ECS)
 *   168.63.129.16 (Azure's wire server), 100.100.100.200 (Alibaba)
 *   fd00:ec2::254, fd00:ec2::23 (AWS, its second for pods), fd20:ce::254 (GCP)
 *   fd00:c1::a9fe:a9fe (Oracle), fd00:42::42 (Scaleway)
 */
static __always_inline bool is_metadata(const struct ip_addr *a)
{
	if (is_mapped(a)) {
		__u32 ip = bpf_ntohl(a->w[3]);

		return ip == 0xa9fea9fe || ip == 0xa9feaa02 ||
		       ip == 0xa83f8110 || ip == 0x646464c8;
	}
	if (a->w[1] || a->w[2])
		return false;
	switch (bpf_ntohl(a->w[0])) {
	case 0xfd000ec2:
		return a->w[3] == bpf_htonl(0x254) ||
		       a->w[3] == bpf_htonl(0x23);
	case 0xfd2000ce:
		return a->w[3] == bpf_htonl(0x254);
	case 0xfd0000c1:
		return a->w[3] == bpf_htonl(0xa9fea9fe);
	case 0xfd000042:
		return a->w[3] == bpf_htonl(0x42);
	default:
		return false;
	}
}

static __always_inline bool is_multicast(const struct ip_addr *a)
{
	if (is_mapped(a)) {
		__u32 ip = bpf_ntohl(a->w[3]);

		return ip >> 28 == 0xe || ip == 0xffffffff;
	}
	return bpf_ntohl(a->w[0]) >> 24 == 0xff;
}

/* is_plain is true for addresses that are none of the above, nor slots: all of
 * 2000::/3, and those of IPv4 by their first digits alone.
 */
static __always_inline bool is_plain(const struct ip_addr *a)
{
	__u32 first = bpf_ntohl(a->w[3]) >> 24;

	if (!is_mapped(a))
		return bpf_ntohl(a->w[0]) >> 29 == 1;
	return first && first < 224 && first != 100 && first != 127 &&
	       first != 168 && first != 169;
}

/* leave_alone gives the reason not to look at the rules at all, in the order of
 * docs/design.md section 2, or REASON_NONE. Metadata stands before link-local
 * because most of it is.
 */
static __always_inline enum reason leave_alone(const struct attempt *a)
{
	if (a->netns != a->our_netns)
		return REASON_NETNS;
	/* Before the protocol: an AnyIP route makes the application's own UDP
	 * sockets answer on slots too.
	 */
	if (in_supernet(&a->dst) && !a->self)
		return slot_of(&a->dst, a->slot4, a->slot6) < 0 &&
				       a->slot_listener ?
			       REASON_FOREIGN_SLOT :
			       REASON_SLOT_ADDRESS;
	if (a->protocol != IPPROTO_TCP)
		return REASON_PROTOCOL;
	if (a->bound_dev)
		return REASON_BOUND_DEVICE;
	if (is_metadata(&a->dst))
		return REASON_METADATA;
	if (is_link_local(&a->dst))
		return REASON_LINK_LOCAL;
	if (is_loopback(&a->dst))
		return REASON_LOOPBACK;
	if (a->own_addr)
		return REASON_OWN_ADDRESS;
	if (is_multicast(&a->dst))
		return REASON_MULTICAST;
	if (a->self)
		return REASON_SELF;
	return REASON_NONE;
}

/* What the maps say of a destination. */
struct facts {
	__u8 denied;
	__u8 excluded;
	__u8 service;
	__u8 default_pass;
	__u8 routed;
	__u8 foreign; /* the source is bound, and not an own address */
};

/* by_rules never gives REASON_NONE. */
static __always_inline enum reason by_rules(const struct facts *f)
{
	if (f->denied)
		return REASON_DENIED;
	if (f->excluded)
		return REASON_EXCLUDED;
	if (f->foreign)
		return REASON_FOREIGN_SOURCE;
	if (f->service)
		return REASON_SERVICE;
	if (f->default_pass)
		return REASON_DEFAULT_PASS;
	if (!f->routed)
		return REASON_NO_ROUTE;
	return REASON_DEFAULT;
}

/* Whether the handler can take one more connection. */
struct health {
	__u64 now;
	__u64 stamp;
	__u64 max_age;
	__u64 conns; /* of this container */
	__u64 conn_quota; /* 0: none */
	__u32 live;
	__u32 live_max;
	__u8 family; /* slots exist in the destination's family */
	__u8 draining;
	__u8 busy;
	__u8 listener; /* our listener answers on slots */
	__u8 died; /* the kernel says so */
	__u8 zero[3];
};

/* obstacle gives the reason why a connection cannot be redirected now, or
 * REASON_NONE. Cheap signs first; the caller probes the listener only when the
 * others are good (listener is then set in a second call).
 */
static __always_inline enum reason obstacle(const struct health *h)
{
	if (!h->family)
		return REASON_NO_FAMILY;
	if (h->draining || h->died || !h->listener)
		return REASON_HANDLER_ABSENT;
	/* A stamp may be younger than now when it was written on another CPU
	 * between the two reads.
	 */
	if (!h->stamp || (h->now > h->stamp && h->now - h->stamp > h->max_age))
		return REASON_HANDLER_STALE;
	if (h->busy)
		return REASON_HANDLER_BUSY;
	if (h->live >= h->live_max)
		return REASON_LIVE_FULL;
	if (h->conn_quota && h->conns >= h->conn_quota)
		return REASON_CONN_QUOTA;
	return REASON_NONE;
}

/* path_of maps each reason of a connect hook to the path it means. asked is
 * that of the service. Reasons that stand for a failure follow on_failure; set
 * tells whether there are endpoints to fall back to.
 */
static __always_inline enum conn_path path_of(enum reason why, __u32 on_failure,
					      __u32 asked, bool set)
{
	switch (why) {
	case REASON_SERVICE:
		if (asked == PATH_PASS)
			return PATH_PASS;
		if (asked == PATH_DIRECT)
			return PATH_DIRECT;
		return PATH_RELAY;
	case REASON_DEFAULT:
		return PATH_RELAY;
	case REASON_DENIED:
	case REASON_SLOT_ADDRESS:
	case REASON_NO_ENDPOINT:
		return PATH_DENY;
	case REASON_HANDLER_ABSENT:
	case REASON_HANDLER_STALE:
	case REASON_HANDLER_BUSY:
	case REASON_NO_SLOT:
	case REASON_SLOT_QUOTA:
	case REASON_LIVE_FULL:
	case REASON_CONN_QUOTA:
	case REASON_NO_FAMILY:
	case REASON_NO_MEMORY:
		if (on_failure == ON_FAILURE_CLOSED)
			return PATH_DENY;
		return set ? PATH_DIRECT : PATH_PASS;
	default:
		return PATH_PASS;
	}
}

/* holds tells whether a connection's handshake waits for its dial. answered is
 * until when an earlier answer counts, 0 when there was none.
 */
static __always_inline bool holds(__u32 mode, __u64 now, __u64 answered)
{
	return mode == CONNECT_MIRROR ||
	       (mode == CONNECT_ADAPTIVE && now >= answered);
}

/* forged tells whether a segment with SYN comes from a slot and not from the
 * handler's listener: it opens, or answers for a socket (state: BPF_TCP_*) that
 * has opened. A listener's half-open connections are no sockets of that kind.
 */
static __always_inline bool forged(bool ack, __u32 state)
{
	return !ack || state == BPF_TCP_SYN_SENT || state == BPF_TCP_SYN_RECV;
}

/* How long after the handler's last sign of life a SYN that finds nobody is
 * taken for one that was on its way when the handler died. It is sent again
 * after one and two seconds (one, before 6.5), and finds who has come back; the
 * one after three is refused.
 */
#define AWAIT_NS (2500 * NS_PER_MS)

/* A reset from one of our slots. */
struct refusal {
	__u64 now;
	__u64 stamp; /* the handler's last sign of life, 0: it cannot serve */
	__u32 state; /* BPF_TCP_*, of the application's socket */
	__u32 on_failure; /* enum on_failure */
	__u8 hold; /* enum hold */
	__u8 canary;
	__u8 draining;
	__u8 zero[5];
};

/* awaits tells whether a reset is kept from an application that connects, since
 * who would have let it in may come back. The hook has promised that it does
 * not fail; and it cannot be passed any more, since its destination is fixed.
 */
static __always_inline bool awaits(const struct refusal *r)
{
	if (r->state != BPF_TCP_SYN_SENT || r->hold == HOLD_OVER || r->canary ||
	    r->draining || r->on_failure != ON_FAILURE_OPEN || !r->stamp)
		return false;
	return r->now <= r->stamp || r->now - r->stamp <= AWAIT_NS;
}

/* A packet for one of our slots, as sk_lookup sees it. */
struct arrival {
	__u8 tcp;
	__u8 probe; /* no interface and no remote port: a look-up, no packet */
	__u8 live;
	__u8 listener;
};

/* admit never lets a packet for a slot pass: an AnyIP route makes every
 * wildcard listener answer on slots.
 */
static __always_inline enum reason admit(const struct arrival *p)
{
	if (!p->tcp || (!p->live && !p->probe))
		return REASON_NOT_LIVE;
	if (!p->listener)
		return REASON_NO_LISTENER;
	return p->probe ? REASON_PROBE : REASON_ADMITTED;
}

/* How a socket came to CLOSE. */
struct end {
	__u32 state; /* BPF_TCP_*, that it left */
	__u32 segs_in;
	__u32 unacked; /* segments that wait for an answer */
	__u8 expired; /* the kernel waited as long as it does */
	__u8 released; /* the application had closed it */
};

/* ending_of tells how a socket ended. A connect that nobody answered, nobody
 * gave up, and that had time left was ended by an ICMP error. Who gives up need
 * not close: shutdown and a connect to AF_UNSPEC do it too. Then the SYN is
 * still queued, which the kernel drops first where an error ends a socket
 * (since 6.10, and in what is left of 6.1 and 6.6).
 */
static __always_inline enum ending ending_of(const struct end *e)
{
	switch (e->state) {
	case BPF_TCP_SYN_SENT:
		if (e->segs_in)
			return ENDING_REFUSED;
		if (e->expired)
			return ENDING_TIMEOUT;
		return e->released || e->unacked ? ENDING_ABANDONED :
						   ENDING_UNREACHABLE;
	case BPF_TCP_ESTABLISHED:
	case BPF_TCP_FIN_WAIT1:
	case BPF_TCP_CLOSE_WAIT:
		return ENDING_RESET;
	default:
		return ENDING_CLOSED;
	}
}

/* What is known of the peer's end. */
struct peer_end {
	__u64 received; /* bytes_received, at CLOSE, */
	__u64 half; /* and when its own end was acknowledged */
	__u32 state; /* BPF_TCP_*, before CLOSE */
	__u8 released; /* the application has closed it, */
	__u8 closed_first; /* and had when its own end was acknowledged */
};

/* peer_ended tells whether a FIN came, which the kernel counts as a byte. What
 * is left of a socket that its application has closed waits for it in a
 * TIME_WAIT object, and its last state looks the same; but nothing other than a
 * FIN is taken in for it.
 */
static __always_inline bool peer_ended(const struct peer_end *e)
{
	switch (e->state) {
	case BPF_TCP_CLOSE_WAIT:
	case BPF_TCP_LAST_ACK:
	case BPF_TCP_CLOSING:
	case BPF_TCP_TIME_WAIT:
		return true;
	case BPF_TCP_FIN_WAIT2:
		return !e->released ||
		       (e->closed_first && e->received > e->half);
	default:
		return false;
	}
}

/* is_failure tells whether an endpoint is to blame for a connect that ended in
 * SYN_SENT. Who gives up early knows nothing of it: a happy-eyeballs client
 * does so as soon as another address has answered.
 */
static __always_inline bool is_failure(enum ending how, __u32 retransmits)
{
	return how == ENDING_REFUSED || how == ENDING_TIMEOUT ||
	       how == ENDING_UNREACHABLE ||
	       (how == ENDING_ABANDONED && retransmits);
}

/* is_ejected is false for an endpoint on trial: until is then in the past. */
static __always_inline bool is_ejected(__u64 until, __u64 now)
{
	return now < until;
}

/* panics_at tells whether so few of the endpoints that are not down (up) are
 * not ejected (well) that ejections are not to count.
 */
static __always_inline bool panics_at(__u64 well, __u64 up, __u64 percent)
{
	return well * 100 < up * percent;
}

/* wait_of gives how long (ns) a round of an ejection lasts, from 1: base (ms),
 * doubled every round up to max (ms), less a random part of a quarter at most.
 */
static __always_inline __u64 wait_of(__u32 base, __u32 max, __u32 round,
				     __u64 random)
{
	__u64 ms = base;
	__u64 ns;

	/* Up to 2^32 ms: what is doubled 32 times is past that. */
	if (round > 1) {
		ms <<= round > 32 ? 32 : round - 1;
		if (ms > max)
			ms = max;
	}
	ns = ms * NS_PER_MS;
	return ns - random % (ns / 4 + 1);
}

/* is_less tells whether the first of two has the fewer connections for its
 * weight. A count below 0 is one that was corrected at the wrong moment.
 */
static __always_inline bool is_less(__u32 live, __u64 weight, __u32 other_live,
				    __u64 other_weight)
{
	__u64 a = (__s32)live < 0 ? 0 : live;
	__u64 b = (__s32)other_live < 0 ? 0 : other_live;

	return a * other_weight < b * weight;
}
