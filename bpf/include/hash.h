/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The hash and the words of a pick, as redirect/flow/hash.go has them: the
 * handler and the connect hook pick alike.
 */
#pragma once
#include "net.h"

#define GOLDEN 0x9e3779b9u

/* mix spreads the bits of x over all 32, one to one. */
static __always_inline __u32 mix(__u32 x)
{
	x ^= x >> 16;
	x *= 0x7feb352d;
	x ^= x >> 15;
	x *= 0x846ca68b;
	x ^= x >> 16;
	return x;
}

/* hash_of makes a word of an address and a port (0: it does not count). */
static __always_inline __u32 hash_of(const struct ip_addr *a, __u32 port)
{
	__u32 h = port;

	h = mix((h ^ bpf_ntohl(a->w[0])) + GOLDEN);
	h = mix((h ^ bpf_ntohl(a->w[1])) + GOLDEN);
	h = mix((h ^ bpf_ntohl(a->w[2])) + GOLDEN);
	return mix((h ^ bpf_ntohl(a->w[3])) + GOLDEN);
}

/* class_of puts an address into one of 64 classes, as bpf.ClassOf does. Its
 * words are taken as they are: nobody compares the classes of two machines.
 */
static __always_inline __u64 class_of(const struct ip_addr *a)
{
	__u32 all = a->w[0] ^ a->w[1] ^ a->w[2] ^ a->w[3];

	return all * GOLDEN >> 26;
}

/* next_word gives the next of the words that follow from a seed. All of a
 * pick's randomness comes from there.
 */
static __always_inline __u32 next_word(__u64 *words)
{
	*words = (__u32)(*words + GOLDEN);
	return mix(*words);
}

/* below gives a number less than n, of which there are 2^32 at most. */
static __always_inline __u32 below(__u64 *words, __u64 n)
{
	return (__u64)next_word(words) * n >> 32;
}

/* chance is true for share of 2^32 words; 2^32-1 means all of them. */
static __always_inline bool chance(__u64 *words, __u32 share)
{
	return share == 0xffffffff || next_word(words) < share;
}
