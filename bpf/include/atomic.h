/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What clang has for -mcpu=v3 only. */
#pragma once
#include <linux/types.h>

/* barrier keeps the compiler from moving what is written across it. */
#define barrier() asm volatile("" ::: "memory")

/* fetch_add adds, and returns what was there. */
static __always_inline __u32 fetch_add(__u32 *p, __u32 by)
{
	register __u64 r0 asm("r0") = by;

	asm volatile("w0 = atomic_fetch_add((u32 *)(%1 + 0), w0)"
		     : "+r"(r0)
		     : "r"(p)
		     : "memory");
	return r0;
}

/* FETCH_ADD is fetch_add at a constant offset of a map's value. */
#define FETCH_ADD(p, offset, by)                                           \
	({                                                                 \
		register __u64 r0 asm("r0") = by;                          \
                                                                           \
		asm volatile("w0 = atomic_fetch_add((u32 *)(%1 + " #offset \
			     "), w0)"                                      \
			     : "+r"(r0)                                    \
			     : "r"(p)                                      \
			     : "memory");                                  \
		(__u32) r0;                                                \
	})

/* exchange puts with in the place of what was there, and returns that. */
static __always_inline __u64 exchange(__u64 *p, __u64 with)
{
	register __u64 r0 asm("r0") = with;

	asm volatile("r0 = xchg_64(%1 + 0, r0)" : "+r"(r0) : "r"(p) : "memory");
	return r0;
}

/* fence has what was written before be seen before anything behind it is read,
 * on every architecture: what returns the value that was there is a full
 * barrier (arm64's JIT has it since Linux 5.18).
 */
static __always_inline void fence(void)
{
	__u64 any = 0;

	exchange(&any, 0);
}

/* swap puts with in the place of was, if that is still there. */
static __always_inline _Bool swap(__u64 *p, __u64 was, __u64 with)
{
	register __u64 r0 asm("r0") = was;

	asm volatile("r0 = cmpxchg_64(%1 + 0, r0, %2)"
		     : "+r"(r0)
		     : "r"(p), "r"(with)
		     : "memory");
	return r0 == was;
}
