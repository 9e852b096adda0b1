/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* All maps. Names have at most 15 characters: the kernel truncates. */
#pragma once
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "abi.h"

/* writer: loader; reader: loader; deleter: nobody. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct instance);
} instance SEC(".maps");

/* writer: loader; reader: every hook; deleter: nobody. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
} settings SEC(".maps");

/* Memory-mapped, so that the process can add to it without losing what a hook
 * adds, and the kernel can note its death. writer: connect, sockops, loader;
 * reader: the same, lookup.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct state);
} state SEC(".maps");

/* writer: loader, up to ten times a second; reader: connect. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct beat);
} beat SEC(".maps");

/* writer: loader; reader: lookup; deleter: the kernel, with the listener. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, PL_CANARY_LISTENER + 2);
	__type(key, __u32);
	__type(value, __u64);
} listeners SEC(".maps");

/* writer, deleter: loader; reader: connect. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct endpoint_key);
	__type(value, struct service);
} services SEC(".maps");

/* The endpoints of each service, by service.id: see struct set_tiers. writer:
 * loader (a set is published whole), connect and sockops (its state); reader:
 * connect; deleter: loader.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, PL_SETS);
	__type(key, __u32);
	__array(
		values, struct {
			__uint(type, BPF_MAP_TYPE_ARRAY);
			__uint(max_entries, PL_SET_HEAD);
			__uint(map_flags, BPF_F_INNER_MAP);
			__uint(key_size, sizeof(__u32));
			__uint(value_size, sizeof(struct set_row));
		});
} sets SEC(".maps");

/* Memory-mapped, so that the process reads and corrects without losing what a
 * hook adds. writer: connect, sockops, loader; reader: the same; deleter:
 * loader, by zeroing, when nobody is counted.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PL_ENDPOINTS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct endpoint);
} endpoints SEC(".maps");

/* Whose each entry of endpoints is, for a process that takes over, and for what
 * an index was put off with. An array, since many are written at once. writer,
 * deleter: loader; reader: connect, sockops, loader.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PL_ENDPOINTS);
	__type(key, __u32);
	__type(value, struct endpoint_name);
} endpoint_names SEC(".maps");

/* writer, deleter: loader; reader: connect. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct rule_key);
	__type(value, __u32);
} deny SEC(".maps");

/* writer, deleter: loader; reader: connect. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct rule_key);
	__type(value, __u32);
} exclude SEC(".maps");

/* The namespace's routes, so that a destination without one is left to the
 * kernel, and an application sees its route's source. writer, deleter: loader,
 * from rtnetlink; reader: connect.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct prefix_key);
	__type(value, struct route);
} routes SEC(".maps");

/* The namespace's own addresses. writer, deleter: loader, from rtnetlink;
 * reader: connect.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct ip_addr);
	__type(value, __u32);
} own_addrs SEC(".maps");

/* Of the 64 classes of addresses (hash.h) a bit each: 1: own_addrs has none of
 * it, but for loopback and link-local, which are left alone whoever has them.
 * writer: loader, from rtnetlink; reader: connect.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} not_own SEC(".maps");

/* writer: connect, loader (services); reader: connect; deleter: loader, when a
 * slot retires.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PL_SLOTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct ip_addr);
	__type(value, __u32);
} slot_by_orig SEC(".maps");

/* writer: connect, loader; reader: getpeername, loader; deleter: loader, by
 * zeroing.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PL_SLOTS);
	__type(key, __u32);
	__type(value, struct slot);
} slots SEC(".maps");

/* Retired slots, to be named again. writer: loader, connect (when it lost a
 * race); reader and deleter: connect.
 */
struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, PL_SLOTS);
	__type(value, __u32);
} free_slots SEC(".maps");

/* writer: connect, sockops; reader: connect, loader; deleter: loader, when a
 * container is gone.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct usage);
} usage_by_group SEC(".maps");

/* Connections to slots: who is not here is not let in. writer: sockops before
 * the SYN, loader (canary); reader: lookup, loader; deleter: sockops at CLOSE,
 * loader when it reconciles.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct live_key);
	__type(value, struct live);
} live SEC(".maps");

/* Connections that the application had closed before it heard anything, and so
 * perhaps before anybody accepted them: what it said is to arrive. As many as
 * an accept queue holds; a lost entry costs one such connection. writer:
 * sockops at CLOSE; reader: loader, where live has none; deleter: sockops, when
 * the address is used again.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct live_key);
	__type(value, struct live);
} departed SEC(".maps");

/* What was asked for, of connections on PATH_DIRECT that ended before their
 * application closed anything: it may have an MPTCP socket that goes on without
 * its first subflow. A lost entry has it see the endpoint. writer: sockops at
 * CLOSE; reader: getpeername; deleter: nobody.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct live_key);
	__type(value, struct endpoint_key);
} outlived SEC(".maps");

/* Destinations whose dials were answered lately, and until when that counts. A
 * lost entry costs one connection the wait for its dial. writer, deleter:
 * loader; reader: connect.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct endpoint_key);
	__type(value, __u64);
} answered SEC(".maps");

/* A ring per worker: what is held for it, and who gave up. What a full one has
 * no room for is counted as REASON_HOLD_FULL, and comes again. writer: loader
 * (the rings), hold, sockops; reader: the worker.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, PL_WORKERS_MAX);
	__type(key, __u32);
	__array(
		values, struct {
			__uint(type, BPF_MAP_TYPE_RINGBUF);
			__uint(max_entries, 1 << 17);
		});
} held SEC(".maps");

/* The decisions on sockets, by the last digits of their cookies: see
 * decision.h. Memory-mapped, so that the process can mark what was left without
 * a system call for each. writer: connect, sockops, release; reader: the same,
 * names, loader; deleter: sockops, release, loader (marks).
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PL_CELLS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct decision);
} cells SEC(".maps");

/* What was asked for, of the connections on PATH_DIRECT that have a cell, by
 * the number of that: names of an MPTCP socket, which is not the one that was
 * decided on. See sent.h. writer: sockops; reader: sockops, names; deleter:
 * sockops, loader.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PL_CELLS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct sent);
} sent_by_cell SEC(".maps");

/* Which rows those are, by a hash of their addresses. writer, deleter: sockops;
 * reader: sockops, names.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PL_SENT_BUCKETS);
	__type(key, __u32);
	__type(value, __u64);
} sent_buckets SEC(".maps");

/* Decisions that have no cell, and the handler's tag. writer: connect, sockops,
 * loader (own); reader: sockops, release, names, loader; deleter: the kernel,
 * with the socket.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct decision);
} decisions SEC(".maps");

/* What programs of another layout have: their maps, in their layout, while
 * cfg_moves says so; else nobody looks at them. Not pinned.
 *
 * What is stored with sockets. writer: they, and decision.h; reader:
 * decision.h; deleter: the kernel, with the socket.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct decision);
} former SEC(".maps");

/* writer, reader: as former; deleter: they, sockops. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PL_CELLS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct decision);
} former_cells SEC(".maps");

/* writer: they, lookup, hold; reader: the same, sockops, names, move, loader;
 * deleter: they, sockops, move.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct live_key);
	__type(value, struct live);
} former_live SEC(".maps");

/* writer: they, sockops; reader: loader; deleter: they, sockops, loader. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct live_key);
	__type(value, struct live);
} former_departed SEC(".maps");

/* writer: they, loader; reader: they, names, loader; deleter: loader, by
 * zeroing.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PL_SLOTS);
	__type(key, __u32);
	__type(value, struct slot);
} former_slots SEC(".maps");

/* Where move makes an entry of decisions or live. Not pinned. writer, reader:
 * move.
 */
union bench {
	struct decision decision;
	struct live live;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, union bench);
} workbench SEC(".maps");

/* 1 while a dry run looks for the handler's listener on this CPU: the look-up
 * program is to answer it as it answers the connect hook. writer: explain;
 * reader: lookup.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} dry_runs SEC(".maps");

/* writer: every hook; reader: telemetry. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, REASON__COUNT);
	__type(key, enum reason);
	__type(value, __u64);
} reasons SEC(".maps");

/* writer: every hook; reader: telemetry. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, TALLY__COUNT);
	__type(key, enum tally);
	__type(value, __u64);
} tallies SEC(".maps");

/* writer: connect, sockops; reader and deleter: telemetry/events. A full ring
 * loses the event, counted in TALLY_EVENTS_LOST and per container.
 */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events SEC(".maps");
