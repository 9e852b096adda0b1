/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Where the decision on a socket is kept.
 *
 * In the cell that the last digits of its cookie name, if nobody else is there:
 * that costs a hundredth of socket storage, which is two allocations and two
 * frees after a grace period. Otherwise in socket storage. Once a socket has a
 * cell, that is where its decision is until the cell is given back; so no
 * socket is ever pushed out by another.
 *
 * Who may give a cell back: sockops at CLOSE, release where no CLOSE will
 * follow, and the process, which marks it with PL_CELL_LEFT, where neither has
 * come. Nearly all hooks have the socket's lock.
 *
 * Where a program of another layout keeps it: docs/design.md, section 7a.
 * Hooks are swapped one by one, sockops before all that write to a decision and
 * connect last, so for a moment hooks of both layouts are at work. From sockops
 * on an entry of ours counts, and is made of the former one when the socket is
 * first looked at; the other hooks of the former layout may still read theirs,
 * note the socket's release there, or decide anew, which makes theirs the
 * younger one.
 */
#pragma once
#include "atomic.h"
#include "config.h"
#include "former.h"
#include "maps.h"
#include "net.h"

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

static __always_inline struct decision *cell_at(__u64 cookie)
{
	__u64 n = cookie % PL_CELLS;

	return bpf_map_lookup_elem(&cells, &n);
}

static __always_inline void *former_cell_at(__u64 cookie)
{
	__u64 n = cookie % PL_CELLS;

	return bpf_map_lookup_elem(&former_cells, &n);
}

/* formerly tells whether a former cell is the socket's. */
static __always_inline bool formerly(void *cell, __u64 cookie)
{
	return (*(__u64 *)former_owner(cell) & ~PL_CELL_LEFT) == cookie;
}

/* retake is true for a cell of the socket that the process took to be left. */
static __noinline bool retake(struct decision *d, __u64 cookie)
{
	if (d->owner != (cookie | PL_CELL_LEFT))
		return false;
	return swap(&d->owner, cookie | PL_CELL_LEFT, cookie);
}

/* is_held_by tells whether a cell is the socket's. That it was taken to be left
 * is rare, and a call.
 */
static __always_inline bool is_held_by(struct decision *cell, __u64 cookie)
{
	__u64 other = cell->owner ^ cookie;

	return !other || (other == PL_CELL_LEFT && retake(cell, cookie));
}

/* give_back gives the socket's cell back, if it has one, and nothing is going
 * on there or to come.
 */
static __always_inline void give_back(__u64 cookie)
{
	struct decision *d = cell_at(cookie);

	if (d && d->owner == cookie && !d->pending && !d->followed)
		swap(&d->owner, cookie, 0);
}

/* found looks in both places, and makes storage if create says so. These are
 * macros since a socket is of another type in each hook; cookie is a variable,
 * not a call, which would be made each time. Each pointer is looked
 * at once: one that the verifier of 6.1 knows to be NULL must not be met again.
 */
#define found(sk, cookie, create)                                        \
	({                                                               \
		struct decision *there = cell_at(cookie);                \
                                                                         \
		if (!there || !is_held_by(there, cookie))                \
			there = bpf_sk_storage_get(&decisions, sk, NULL, \
						   create);              \
		there;                                                   \
	})

#define carry_to(before, sk, cookie)                                    \
	do {                                                            \
		struct decision *now =                                  \
			found(sk, cookie, BPF_SK_STORAGE_GET_F_CREATE); \
                                                                        \
		if (now)                                                \
			carry(before, now);                             \
	} while (0)

/* carry_any brings the entry of a socket up to date with a former one. */
#define carry_any(sk, cookie)                                              \
	do {                                                               \
		void *before;                                              \
                                                                           \
		if (cfg_moves & PL_MOVES_SOCKETS) {                        \
			before = bpf_sk_storage_get(&former, sk, NULL, 0); \
			if (before)                                        \
				carry_to(before, sk, cookie);              \
		}                                                          \
		if (cfg_moves & PL_MOVES_CELLS) {                          \
			before = former_cell_at(cookie);                   \
			if (before && formerly(before, cookie))            \
				carry_to(before, sk, cookie);              \
		}                                                          \
	} while (0)

/* decision_of gives the decision on a socket, or NULL. */
#define decision_of(sk, cookie)        \
	({                             \
		carry_any(sk, cookie); \
		found(sk, cookie, 0);  \
	})

/* stored_with gives the one in storage: of a socket that was looked up, of
 * which no hook knows the cookie. What is to be moved back is left to who knows
 * it.
 */
#define stored_with(sk)                                                   \
	({                                                                \
		if ((cfg_moves & (PL_MOVES_SOCKETS | PL_MOVES_BACK)) ==   \
		    PL_MOVES_SOCKETS) {                                   \
			void *before =                                    \
				bpf_sk_storage_get(&former, sk, NULL, 0); \
			struct decision *now;                             \
                                                                          \
			if (before) {                                     \
				now = bpf_sk_storage_get(                 \
					&decisions, sk, NULL,             \
					BPF_SK_STORAGE_GET_F_CREATE);     \
				if (now)                                  \
					carry(before, now);               \
			}                                                 \
		}                                                         \
		bpf_sk_storage_get(&decisions, sk, NULL, 0);              \
	})
