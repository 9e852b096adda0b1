//go:build ignore
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* No program: it names every type of the contract, so that bpf2go exports them
 * to Go. The other objects carry only the types that their maps use, and there
 * a map and its value share a name.
 */
#include "include/abi.h"

#define EXPORT(kind, name) kind name export_##name

EXPORT(struct, instance);
EXPORT(struct, settings);
EXPORT(struct, state);
EXPORT(struct, beat);
EXPORT(struct, live_key);
EXPORT(struct, live);
EXPORT(struct, decision);
EXPORT(struct, sent);
EXPORT(struct, slot);
EXPORT(struct, usage);
EXPORT(struct, service);
EXPORT(struct, endpoint_key);
EXPORT(struct, rule_key);
EXPORT(struct, prefix_key);
EXPORT(struct, route);
EXPORT(struct, ip_addr);
EXPORT(struct, conn_event);
EXPORT(struct, held);
EXPORT(struct, set_row);
EXPORT(struct, set_tiers);
EXPORT(struct, set_config);
EXPORT(struct, set_state);
EXPORT(struct, set_endpoint);
EXPORT(struct, set_table);
EXPORT(struct, endpoint);
EXPORT(struct, endpoint_name);
EXPORT(struct, dry_run);
EXPORT(struct, move);
EXPORT(struct, set_query);
EXPORT(enum, policy);
EXPORT(enum, hash_on);
EXPORT(enum, slot_state);
EXPORT(enum, route_kind);
EXPORT(enum, event_kind);
EXPORT(enum, held_kind);
EXPORT(enum, hold);
EXPORT(enum, connect_mode);
EXPORT(enum, instance_kind);
EXPORT(enum, on_failure);
EXPORT(enum, conn_path);
EXPORT(enum, reason);
EXPORT(enum, tally);
EXPORT(enum, ending);
