/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What UAPI headers of the network need libc for, and address arithmetic. */
#pragma once
#include <linux/types.h>
#include <bpf/bpf_endian.h>
#include "abi.h"

/* Linux's numbers, the same on every architecture that Pillion builds for. */
#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_IP 0
#define IPPROTO_TCP 6
#define IPPROTO_IPV6 41
#define IPPROTO_MPTCP 262
#define SOL_SOCKET 1 /* on the architectures that Pillion builds for */
#define SO_KEEPALIVE 9
#define TCP_KEEPIDLE 4
#define TCP_KEEPINTVL 5
#define TCP_KEEPCNT 6
#define TCP_CONGESTION 13
#define TCP_USER_TIMEOUT 18
#define IP_TOS 1
#define IPV6_TCLASS 67
#define EADDRNOTAVAIL 99
#define ECONNREFUSED 111

typedef _Bool bool;
#define true 1
#define false 0

/* Four reads and four stores of ctx, one at a time: clang merges neighbours
 * into 64 bits, which the verifier refuses for ctx.
 */
#define LOAD_IP6(from)                                                      \
	ip_of(*(volatile __u32 *)&(from)[0], *(volatile __u32 *)&(from)[1], \
	      *(volatile __u32 *)&(from)[2], *(volatile __u32 *)&(from)[3])
#define STORE_IP6(to, ip)                                \
	do {                                             \
		*(volatile __u32 *)&(to)[0] = (ip).w[0]; \
		*(volatile __u32 *)&(to)[1] = (ip).w[1]; \
		*(volatile __u32 *)&(to)[2] = (ip).w[2]; \
		*(volatile __u32 *)&(to)[3] = (ip).w[3]; \
	} while (0)

/* What is on the stack is written eight bytes at a time: without CAP_PERFMON
 * the verifier of 6.1 keeps a number that was stored at a multiple of eight
 * like a pointer, and refuses to have a part of the eight bytes written again
 * ("attempt to corrupt spilled pointer on stack"). A map's key is a __u64 for
 * the same reason, whatever its own size; and -mcpu is v2, since with 32-bit
 * registers clang spills halves.
 */
#define PAIR(low, high) ((__u64)(high) << 32 | (__u32)(low))

union ip_words {
	__u64 d[2];
	struct ip_addr a;
};

static __always_inline struct ip_addr ip_of(__u32 w0, __u32 w1, __u32 w2,
					    __u32 w3)
{
	union ip_words ip = { .d = { PAIR(w0, w1), PAIR(w2, w3) } };

	return ip.a;
}

static __always_inline struct ip_addr mapped(__u32 be_ip4)
{
	return ip_of(0, 0, bpf_htonl(0xffff), be_ip4);
}

static __always_inline bool is_mapped(const struct ip_addr *a)
{
	return !a->w[0] && !a->w[1] && a->w[2] == bpf_htonl(0xffff);
}

static __always_inline bool is_zero(const struct ip_addr *a)
{
	return !(a->w[0] | a->w[1] | a->w[2] | a->w[3]);
}

/* in_supernet is true for an address that any instance may use as a slot. */
static __always_inline bool in_supernet(const struct ip_addr *a)
{
	if (is_mapped(a))
		return (bpf_ntohl(a->w[3]) & PL_SLOT4_SUPER_MASK) ==
		       PL_SLOT4_SUPER;
	return a->w[0] == bpf_htonl(PL_SLOT6_SUPER_W0) &&
	       bpf_ntohl(a->w[1]) >> 16 == PL_SLOT6_SUPER_H2;
}

/* slot_of returns the index of an address in slot4 or slot6, or -1. */
static __always_inline int slot_of(const struct ip_addr *a, __u32 slot4,
				   __u32 slot6)
{
	__u32 last = bpf_ntohl(a->w[3]);

	if (is_mapped(a))
		return (last & 0xffff0000) == slot4 ? (int)(last & 0xffff) : -1;
	if (a->w[0] != bpf_htonl(PL_SLOT6_SUPER_W0) ||
	    a->w[1] != bpf_htonl(PL_SLOT6_SUPER_H2 << 16 | slot6))
		return -1;
	return !a->w[2] && last < PL_SLOTS ? (int)last : PL_SLOTS - 1;
}

/* slot_addr returns the address of slot n in the family of like. */
static __always_inline struct ip_addr
slot_addr(const struct ip_addr *like, __u32 n, __u32 slot4, __u32 slot6)
{
	if (is_mapped(like))
		return mapped(bpf_htonl(slot4 | n));
	return ip_of(bpf_htonl(PL_SLOT6_SUPER_W0),
		     bpf_htonl(PL_SLOT6_SUPER_H2 << 16 | slot6), 0,
		     bpf_htonl(n));
}
