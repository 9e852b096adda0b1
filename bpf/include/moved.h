/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What is stored with a socket, also where a program of another layout stored
 * it: docs/design.md, section 7a.
 *
 * Hooks are swapped one by one, sockops before all that write to the storage
 * and connect last, so for a moment hooks of both layouts are at work. From
 * sockops on an entry of ours counts, and is made of the former one when the
 * socket is first looked at; the other hooks of the former layout may still
 * read theirs, note the socket's release there, or decide anew, which makes
 * theirs the younger one. Nearly all hooks have the socket's lock.
 */
#pragma once
#include "config.h"
#include "maps.h"

/* carry brings an entry up to date with the former one: all of that if it is
 * younger, or else that the application closed the socket. Nobody counts the
 * former one as unsent afterwards. The loader writes its body, since it knows
 * both layouts (loader/carry.go).
 */
static __noinline __u64 carry(void *from, struct decision *to)
{
	__u64 done;

	asm volatile("%0 = 0" : "=r"(done) : "r"(from), "r"(to) : "memory");
	return done;
}

/* decision_of gives the entry of a socket, or NULL. It is a macro since a
 * socket is of another type in each hook. The entry is looked up at the end:
 * a pointer that the verifier of 6.1 knows to be NULL must not be met again.
 */
#define decision_of(sk) decision_with(sk, 0)

/* decision_made makes one where there is none. */
#define decision_made(sk) decision_with(sk, BPF_SK_STORAGE_GET_F_CREATE)

#define decision_with(sk, create)                                          \
	({                                                                 \
		if (cfg_moves & PL_MOVES_SOCKETS) {                        \
			void *before =                                     \
				bpf_sk_storage_get(&former, sk, NULL, 0);  \
                                                                           \
			if (before) {                                      \
				struct decision *now = bpf_sk_storage_get( \
					&decisions, sk, NULL,              \
					BPF_SK_STORAGE_GET_F_CREATE);      \
                                                                           \
				if (now)                                   \
					carry(before, now);                \
			}                                                  \
		}                                                          \
		bpf_sk_storage_get(&decisions, sk, NULL, create);          \
	})
