/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Knobs that are fixed for the life of an instance. loader/consts.go sets every
 * one of them, and fails on an unknown or an unset one.
 */
#pragma once
#include <linux/types.h>

/* Cookie of the network namespace whose sockets we capture. */
volatile const __u64 cfg_netns = 0;
/* Our slots: the first address of the /16, host byte order. */
volatile const __u32 cfg_slot4 = 0;
/* Our slots: bits 48..63 of the /64, host byte order. */
volatile const __u32 cfg_slot6 = 0;
/* The Ethernet source of the frames that the process injects. Random, so that
 * two instances do not take each other's, nor those of an application with raw
 * sockets, for their own. Its lowest bit is set.
 */
volatile const __u64 cfg_frame_tag = 0;
/* Id of the scope's cgroup. */
volatile const __u64 cfg_scope = 0;
/* Depth of the scope's cgroup: the containers are one below. */
volatile const __u32 cfg_scope_level = 0;
/* PL_MOVES_*: of what programs of another layout have maps of their own, which
 * are asked too: see decision.h.
 */
volatile const __u32 cfg_moves = 0;
