/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The contract between the kernel side and the process: every map's key and
 * value, and the enums. Natural alignment, padding spelled out and zeroed.
 *
 * Addresses are 16 bytes in network byte order, IPv4 as ::ffff:a.b.c.d, so that
 * one key serves both families. Ports are in host byte order unless a comment
 * says otherwise. Times are bpf_ktime_get_ns(): CLOCK_MONOTONIC, ns.
 */
#pragma once
#include <linux/types.h>

/* Changes with every layout or meaning below: a process refuses the pins of
 * another ABI.
 */
#define PL_ABI 10

/* The slot supernets: no instance captures an address of them, whoever owns
 * it. An instance claims one /16 and one /64.
 *   240.0.0.0/10 of the reserved class E
 *   fd70:696c:6c69::/48 a unique local prefix ("pilli")
 */
#define PL_SLOT4_SUPER 0xf0000000
#define PL_SLOT4_SUPER_MASK 0xffc00000
#define PL_SLOT6_SUPER_W0 0xfd70696c
#define PL_SLOT6_SUPER_H2 0x6c69

/* Slots per instance: the low 16 bits of the address. The ends of the range
 * are kept for Pillion itself.
 */
#define PL_SLOTS 65536
#define PL_SLOT_FIRST 1
#define PL_SLOT_LAST 0xffef /* the last that may name an address */
#define PL_SLOT_LISTENER 0xfffd /* where the handler listens */
#define PL_SLOT_CANARY 0xfffe /* where it tests itself */

/* Listeners: worker w of family f (0: IPv4, 1: IPv6) is at
 * f * PL_WORKERS_MAX + w.
 */
#define PL_WORKERS_MAX 32
/* And what answers at the canary slot of family f is at this and f. */
#define PL_CANARY_LISTENER 64

/* The headers of a held answer: Ethernet 14, IPv6 40 and TCP 60 bytes at most,
 * rounded up.
 */
#define PL_FRAME_MAX 120

/* Services that may have endpoint sets, and endpoints of all of them: 10,000
 * services fit, and 1,000 of 100 endpoints beside one of 10,000.
 */
#define PL_SETS 16384
#define PL_ENDPOINTS 131072

/* Connections that may have a cell for what is decided, and, on PATH_DIRECT,
 * one for what was asked: see decision.h and sent.h. They are what 4 MB hold.
 * More connections than that fit too, and cost more.
 */
#define PL_CELLS 16384
#define PL_SENT_BUCKETS 4032 /* as many words as fit one block of pages */
#define PL_CELL_LEFT 0x8000000000000000 /* in owner: others may take it */

/* What is moved from another layout, of what hooks write to. */
#define PL_MOVES_SOCKETS 1 /* decisions */
#define PL_MOVES_LIVE 2 /* live and departed */
#define PL_MOVES_SLOTS 4
#define PL_MOVES_COUNTS 8 /* endpoints, state or usage_by_group */
#define PL_MOVES_BACK 16 /* entries of ours may be the older ones */
#define PL_MOVES_CELLS 32 /* decisions, of builds that have cells */

/* The rows of a set: three of head, then its endpoints, then its tables. */
#define PL_SET_HEAD 3
#define PL_SET_TABLE_ROW 8 /* table entries in a row */
#define PL_SET_ENDPOINTS 16384 /* of one service */
#define PL_SET_TABLE 131072 /* entries of one table, at most */

/* Who carries the bytes. The same as flow.Path. */
enum conn_path {
	PATH_NONE,
	PATH_DENY,
	PATH_PASS,
	PATH_DIRECT,
	PATH_RELAY,
	PATH_HTTP,
	PATH_ESCAPED,
	PATH__COUNT,
};

/* Why. The same as the first reasons of flow.Reason; the comments are there. */
enum reason {
	REASON_NONE,
	REASON_SERVICE,
	REASON_DEFAULT,
	REASON_PROTOCOL,
	REASON_NETNS,
	REASON_BOUND_DEVICE,
	REASON_LOOPBACK,
	REASON_LINK_LOCAL,
	REASON_METADATA,
	REASON_OWN_ADDRESS,
	REASON_MULTICAST,
	REASON_SELF,
	REASON_FOREIGN_SLOT,
	REASON_EXCLUDED,
	REASON_DEFAULT_PASS,
	REASON_NO_ROUTE,
	REASON_FOREIGN_SOURCE,
	REASON_DENIED,
	REASON_SLOT_ADDRESS,
	REASON_HANDLER_ABSENT,
	REASON_HANDLER_STALE,
	REASON_HANDLER_BUSY,
	REASON_NO_SLOT,
	REASON_SLOT_QUOTA,
	REASON_LIVE_FULL,
	REASON_CONN_QUOTA,
	REASON_NO_FAMILY,
	REASON_NO_MEMORY,
	REASON_NO_ENDPOINT,
	REASON_ADMITTED,
	REASON_PROBE,
	REASON_NOT_LIVE,
	REASON_NO_LISTENER,
	REASON_HELD,
	REASON_INJECTED,
	REASON_HOLD_STALE,
	REASON_HOLD_FULL,
	REASON_FORGED,
	REASON_AWAITED,
	REASON_NO_DECISION,
	REASON_EXISTING,
	REASON_UNSENT,
	REASON_LIVE_LOST,
	REASON__COUNT,
};

/* How an application's socket ended, as sockops can tell. */
enum ending {
	ENDING_CLOSED, /* FINs both ways */
	ENDING_RESET, /* established, then reset by either side */
	ENDING_REFUSED, /* SYN_SENT, and something answered */
	ENDING_TIMEOUT, /* SYN_SENT, and nothing answered in time */
	ENDING_UNREACHABLE, /* SYN_SENT, and the network said that it cannot */
	ENDING_ABANDONED, /* SYN_SENT, and the application closed it */
	ENDING__COUNT,
};

/* Counters beside the reasons: what the conservation law is made of.
 * Independent hooks write them: DECIDED by connect, UNSENT by connect and
 * sock_release, the others by sockops.
 */
enum tally {
	TALLY_CONNECTS, /* active opens in scope */
	TALLY_DECIDED, /* connects that a hook let through, any path */
	TALLY_DENIED, /* connects that a hook refused */
	TALLY_UNSENT, /* decided, then refused by the kernel itself */
	TALLY_ESCAPED, /* active opens without a decision */
	TALLY_SENT_PASS, /* active opens by the path of their decision */
	TALLY_SENT_DIRECT,
	TALLY_SENT_RELAY,
	TALLY_EVENTS_LOST, /* the ring buffer was full */
	TALLY_STORED, /* decisions that got socket storage, not a cell */
	TALLY__COUNT,
};

struct ip_addr {
	__u32 w[4]; /* network byte order */
};

struct endpoint_key {
	struct ip_addr addr;
	__u16 port;
	__u16 zero;
};

/* When the application's handshake ends. */
enum connect_mode {
	CONNECT_EARLY, /* at once; a failed dial is a reset */
	CONNECT_MIRROR, /* when the dial has; a failed one is its errno */
	CONNECT_ADAPTIVE, /* early where a dial was answered lately */
	CONNECT__COUNT,
};

/* What the kernel side needs of a service. */
struct service {
	__u32 id; /* index in sets; stays while the service has its address */
	__u8 on_failure; /* enum on_failure */
	__u8 connect; /* enum connect_mode */
	__u8 no_endpoint; /* errno while unavailable */
	__u8 path; /* PATH_PASS, PATH_DIRECT or PATH_RELAY */
	__u64 unavailable; /* until then no endpoint can be picked */
};

/* How a set's endpoint is picked. The same as flow.Policy. */
enum policy {
	POLICY_LEAST_CONNECTIONS, /* the less loaded of two drawn at random */
	POLICY_ROUND_ROBIN, /* in turn, by a table */
	POLICY_RANDOM, /* by weight */
	POLICY_MAGLEV, /* by a hash, through a table */
	POLICY__COUNT,
};

/* What POLICY_MAGLEV hashes. The same as flow.HashOn. */
enum hash_on {
	HASH_SOURCE, /* the address that the application has or would get */
	HASH_DESTINATION, /* what it asked for */
	HASH__COUNT,
};

/* The endpoints of one service at one moment: an array of rows, replaced as a
 * whole. A pick takes the same time however many there are.
 *
 * Row 0: two tiers. The endpoints of the local zone are the first, all others
 * the second; a set without zones has the first alone.
 */
struct set_tier {
	__u32 first; /* of its endpoints, from 0 */
	__u32 count;
	__u32 table; /* row of its table */
	__u32 entries; /* in the table; indices into the tier; 0: none */
};

struct set_tiers {
	struct set_tier tier[2];
};

/* Row 1: settings. spill is written in place, the rest is not. */
struct set_config {
	__u32 spill; /* share of 2^32 of connections for the second tier */
	__u32 base; /* ms of the first wait of an ejected endpoint */
	__u32 max; /* ms of the longest wait */
	__u16 failures; /* in a row until it is ejected; 0: never */
	__u8 policy; /* enum policy */
	__u8 hash; /* enum hash_on */
	__u8 panic; /* percent available below which ejections do not count */
	__u8 zero[15];
};

/* Row 2: what the hooks keep. The process hands it on to the next set, for the
 * turns; a verdict lasts a second at most.
 */
struct set_state {
	__u32 turn[2]; /* of POLICY_ROUND_ROBIN, by tier */
	__u64 verdict_until; /* panics holds until then, or a change */
	__u32 verdict_changes; /* changes when the verdict was made */
	__u32 panics; /* 1: too few are available, ejections do not count */
	__u32 changes; /* of endpoint health, ever */
	__u32 zero;
};

/* Rows from PL_SET_HEAD on. cut and alias draw by weight in one step: endpoint
 * i of the tier stays i for cut of 2^32 draws (0xffffffff: all), and is alias
 * otherwise.
 */
struct set_endpoint {
	struct ip_addr addr;
	__u16 port;
	__u16 weight;
	__u32 id; /* index in endpoints */
	__u32 cut;
	__u32 alias; /* index in the tier */
};

/* Rows behind the endpoints. */
struct set_table {
	__u32 entry[PL_SET_TABLE_ROW];
};

struct set_row {
	__u64 d[4];
};

/* What is known of an endpoint; it outlives sets. down is the process's to
 * write, the rest the hooks'; live is corrected by the process. Who is down is
 * never picked; who is ejected is in a panic: while, of those that are not
 * down, less than set_config.panic percent are not ejected.
 */
struct endpoint {
	__u32 live; /* that connect, or are open and not closed by who did */
	__u32 failures; /* in a row, while not ejected */
	__u64 until; /* ejected until then; set until a connect is answered */
	__u64 connects; /* answered */
	__u64 failed;
	__u32 ejections;
	__u16 round; /* of the present ejection, from 1 */
	__u8 down; /* 1: a health check says so */
	__u8 last; /* enum ending of the last failed connect */
};

/* Whose an endpoint is. All zero: nobody's. */
struct endpoint_name {
	struct ip_addr addr;
	__u32 set; /* service.id */
	__u16 port; /* never 0 */
	__u16 weight; /* in the last set; 0: removed from it */
};

enum on_failure {
	ON_FAILURE_OPEN,
	ON_FAILURE_CLOSED,
	ON_FAILURE__COUNT,
};

/* Deny and exclude rules: longest prefix match. The port comes first, so that
 * a look-up asks once for the port and once for any port (0).
 */
struct rule_key {
	__u32 prefixlen; /* 32 + bits of addr */
	__u16 port; /* 0: any */
	__u16 family; /* 4 or 6: ::/0 is not to match mapped IPv4 */
	struct ip_addr addr;
};

#define PL_RULE_PORT_BITS 32

struct prefix_key {
	__u32 prefixlen; /* bits of addr */
	struct ip_addr addr;
};

enum route_kind {
	ROUTE_NONE, /* unreachable, prohibit, blackhole: the kernel answers */
	ROUTE_UNICAST,
	ROUTE__COUNT,
};

/* The value of a prefix in routes. */
struct route {
	__u32 kind; /* enum route_kind */
	/* Zero: that of the slot routes, which stands at the supernets. */
	struct ip_addr source;
};

enum slot_state {
	SLOT_FREE,
	SLOT_NAMED, /* a connect hook gave it to an address */
	SLOT_RESERVED, /* a service has it; never retired while it does */
	SLOT_RETIRING, /* not handed out, still resolves */
	SLOT__COUNT,
};

struct slot {
	struct ip_addr orig;
	__u64 used; /* time of the last connect, to the second */
	__u64 group; /* whose quota it counts against; 0: nobody's */
	__u32 state; /* enum slot_state */
	__u32 zero;
};

/* What one container uses, against its quotas. */
struct usage {
	__u64 slots;
	__u64 conns;
	__u64 events_lost;
};

/* Settings that may change while connections run. */
struct settings {
	__u32 workers; /* listeners per family */
	__u32 deny_rules; /* 0: skip the look-up */
	__u32 exclude_rules;
	__u32 default_path; /* PATH_PASS or PATH_RELAY */
	__u32 on_failure; /* enum on_failure */
	__u32 slot_quota; /* unnamed destinations per container */
	__u32 conn_quota; /* open relayed connections per container, 0: none */
	__u32 live_max; /* open relayed connections of all */
	__u32 families; /* bit 0: IPv4 slots, bit 1: IPv6 slots */
	__u32 draining; /* 1: shutting down, on_failure decides */
	__u32 connect; /* enum connect_mode, of what no service names */
	__u32 zero;
	__u64 own_group; /* Pillion's own container: it passes. 0: none */
};

/* What the hooks themselves keep. */
struct state {
	__u32 next_slot; /* never used below; then free_slots */
	__u32 live; /* entries in live */
	/* The process, as the owner of a robust futex: the id of one of its
	 * threads, or 0. The kernel makes it PL_OWNER_DIED when that thread
	 * ends, and so before it closes any listener of the process.
	 */
	__u32 owner;
	__u32 zero;
};

#define PL_OWNER_DIED 0x40000000 /* FUTEX_OWNER_DIED */

/* The process's sign of life. */
struct beat {
	__u64 stamp; /* 0: the process itself knows that it cannot serve */
	__u64 max_age;
	__u32 busy; /* 1: the accept queues are nearly full */
	__u32 zero;
};

/* A connection to a slot, named as sk_lookup sees it. */
struct live_key {
	struct ip_addr source; /* the application */
	struct ip_addr slot;
	__u16 source_port;
	__u16 slot_port; /* the original port */
};

/* What becomes of the handler's answer to a connection. */
enum hold {
	HOLD_NO, /* it passes, and the connection is early */
	HOLD_YES, /* it waits for the dial */
	HOLD_OVER, /* the dial has ended, and what comes is its result */
	HOLD__COUNT,
};

struct live {
	__u64 cookie;
	__u64 cgroup;
	__u64 group;
	__u64 opened;
	struct ip_addr orig;
	struct ip_addr bound; /* zero: the application bound no address */
	__u32 mark;
	__u32 priority;
	__u8 tos;
	__u8 reason; /* enum reason */
	__u8 canary;
	__u8 hold; /* enum hold */
	__u8 worker; /* who serves it, from 1; 0: nobody yet. Held ones only */
	__u8 keep_count; /* 0: no keep-alive */
	__u16 keep_idle; /* s */
	__u16 keep_interval; /* s */
	__u16 zero;
	__u32 user_timeout; /* ms; 0: none */
	__u8 congestion[16]; /* the algorithm's name; zero: not known */
	struct ip_addr seen; /* as in decision */
};

/* The decision on one socket, from the connect hook to its end. */
struct decision {
	/* What the kernel dials: by the connect hook what was picked, by
	 * sockops what it became.
	 */
	struct live_key key;
	__u32 mark;
	struct ip_addr orig;
	struct ip_addr bound;
	struct ip_addr seen; /* what getsockname shows; zero: the truth */
	__u64 cgroup;
	__u64 group;
	__u64 opened;
	__u32 priority;
	__u16 orig_port;
	__u8 path; /* enum conn_path */
	__u8 reason; /* enum reason */
	__u8 pending; /* decided, and no SYN yet */
	__u8 own; /* the process tagged it as the handler's */
	__u8 open; /* counted in live */
	__u8 followed; /* sockops reports its end */
	__u8 hold; /* HOLD_NO or HOLD_YES */
	__u8 counted; /* in the endpoint's live */
	__u8 released; /* the application has closed it */
	__u8 expired; /* the kernel waited as long as it does */
	__u32 set; /* PATH_DIRECT: the service's id, */
	__u32 endpoint; /* and the endpoint's index */
	__u64 established; /* 0: not yet */
	/* Bytes received when its own end was acknowledged; while pending on
	 * PATH_DIRECT, the until of the trial that it is, or 0.
	 */
	__u64 half;
	__u64 closed_first; /* 1: that was after the application closed it */
	__u64 owner; /* of a cell: the socket's cookie; 0: nobody */
};

/* What was asked for by a connection on PATH_DIRECT, by where it was sent. */
struct sent {
	struct live_key key;
	struct endpoint_key asked;
	__u64 owner; /* the socket's cookie; 0: nobody */
};

enum held_kind {
	HELD_ANSWER, /* a SYN-ACK for the application, kept back */
	HELD_GONE, /* the application gave up */
	HELD__COUNT,
};

/* One record in a worker's ring. */
struct held {
	struct live_key key;
	__u32 mark; /* of the frame */
	__u8 kind; /* enum held_kind */
	__u8 size; /* of the frame */
	__u8 zero[6];
	__u8 frame[PL_FRAME_MAX]; /* as on the wire; checksums are partial */
};

enum event_kind {
	EVENT_END, /* a connection ended */
	EVENT_DENIED, /* a connect was refused */
	EVENT__COUNT,
};

/* One record in the ring buffer. */
struct conn_event {
	__u64 cookie;
	__u64 cgroup;
	__u64 group;
	__u64 opened;
	__u64 ended;
	__u64 sent; /* bytes acknowledged by the peer */
	__u64 received; /* without the peer's FIN */
	__u64 connect; /* ns until it was answered; 0: it was not */
	struct ip_addr source;
	struct ip_addr orig;
	struct ip_addr endpoint; /* what was dialed; zero: a slot, or nothing */
	__u32 srtt_us;
	__u32 retransmits;
	__u16 source_port;
	__u16 orig_port;
	__u8 kind; /* enum event_kind */
	__u8 path; /* enum conn_path */
	__u8 reason; /* enum reason */
	__u8 ending; /* enum ending */
	__u16 endpoint_port;
	__u8 zero[6];
};

/* The question to pl_explain, and its answer: what the connect hook would do
 * now. It stands behind 14 bytes of Ethernet, all zero.
 */
struct dry_run {
	/* In. */
	struct ip_addr dst;
	struct ip_addr bound; /* zero: no source of its own */
	__u64 group; /* the container whose quotas count; 0: nobody's */
	__u32 seed; /* of the pick; 0: a random one */
	__u16 port;
	/* Out. */
	__u8 path; /* enum conn_path */
	__u8 reason; /* enum reason */
	struct ip_addr
		endpoint; /* what a pick gives, on any path; zero: none */
	__u16 endpoint_port;
	__u8 err; /* errno of PATH_DENY */
	__u8 service; /* 1: a service has the address, and this is it: */
	__u32 set; /* service.id */
	__u32 index; /* of the endpoint in its set, from 0 */
	__u32 id; /* of the endpoint in endpoints */
	__u32 rule; /* the value of the rule that decided, */
	__u8 ruled; /* 1: one did; reason says of which kind */
	__u8 tier; /* of the endpoint */
	__u8 hold; /* 1: the handshake would wait for the dial */
	__u8 zero;
};

/* The question to pl_move and pl_move_live, which socket, and to pl_add and
 * pl_add_usage, which counter. It stands as that of pl_explain does.
 */
struct move {
	struct ip_addr own;
	struct ip_addr peer;
	__u64 add;
	__u32 counter; /* enum reason, or enum tally where that is 1: */
	__u32 tally;
	__u16 own_port;
	__u16 peer_port;
	__u32 last; /* pl_move_live: 1: the former entry is to go */
	__u64 group; /* whose usage */
	__u64 slots; /* what to add to each */
	__u64 conns;
	__u64 events_lost;
	__u64 cookie; /* of the socket */
};

/* The question to pl_rows: which rows. It stands as that of pl_explain does. */
struct set_query {
	__u32 set; /* service.id */
	__u32 first;
};

/* Written once, when the instance is created: what a later process needs to
 * adopt or to sweep it.
 */
struct instance {
	__u32 abi; /* PL_ABI */
	__u32 slot4; /* first address of the /16, host byte order */
	__u32 slot6; /* bits 48..63 of the /64, host byte order */
	__u32 kind; /* enum instance_kind */
	__u64 netns; /* cookie */
	__u64 cgroup; /* id of the scope */
	__u64 pid; /* of the creator, and its start time in clock ticks: */
	__u64 pid_start; /* together they name one process */
	__u32 families; /* as in settings */
	__u32 scope_level; /* depth of the scope's cgroup */
	__u64 sandbox; /* cgroup of the pod's sandbox; 0: none known */
};

enum instance_kind {
	INSTANCE_RUN,
	INSTANCE_EXEC,
	INSTANCE_INIT, /* made for a run to come; it lives like one */
	INSTANCE__COUNT,
};
