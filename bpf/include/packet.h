/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Headers on the wire, as far as they are read. The UAPI ones need libc. */
#pragma once
#include <linux/types.h>

#define ETH_HLEN 14
#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define IP4_HLEN 20 /* without options */
#define IP6_HLEN 40
#define TCP_HLEN 20

struct eth {
	__u16 dst[3];
	__u16 src[3];
	__u16 proto; /* network byte order */
};

struct ip4 {
	__u8 version_ihl;
	__u8 tos;
	__u16 len;
	__u16 id;
	__u16 frag;
	__u8 ttl;
	__u8 proto;
	__u16 sum;
	__u32 src;
	__u32 dst;
};

struct ip6 {
	__u32 flow;
	__u16 len;
	__u8 next;
	__u8 hops;
	__u32 src[4];
	__u32 dst[4];
};

struct tcp {
	__u16 sport;
	__u16 dport;
	__u32 seq;
	__u32 ack;
	__u8 doff; /* words, in the upper half */
	__u8 flags;
	__u16 window;
	__u16 sum;
	__u16 urgent;
};

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10
