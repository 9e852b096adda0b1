/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Entries of maps in the layout of other programs, while cfg_moves says that
 * there are: docs/design.md, section 7a. They are read, and written, where
 * they are, until the process moves them: it does when all hooks are of the new
 * layout. So each is in one place, and what one hook writes another one finds.
 */
#pragma once
#include "config.h"
#include "maps.h"

/* FORMER tells where a field is in a former entry. The loader writes the body,
 * since it knows both layouts.
 */
#define FORMER(field)                                                       \
	static __noinline __attribute__((unused)) void *field(void *entry)  \
	{                                                                   \
		void *at;                                                   \
                                                                            \
		asm volatile("%0 = %1" : "=r"(at) : "r"(entry) : "memory"); \
		return at;                                                  \
	}

FORMER(former_owner)
FORMER(former_cookie)
FORMER(former_hold)
FORMER(former_worker)
FORMER(former_canary)
FORMER(former_orig)
FORMER(former_seen)
FORMER(former_slot_state)
FORMER(former_slot_orig)
