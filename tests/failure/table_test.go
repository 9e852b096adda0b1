package failure

import (
	"net/netip"
	"testing"
	"time"
)

// fault is something that goes wrong: a row of the table.
type fault struct {
	name string
	// how says how the test makes it, mended how it ends, or what an operator
	// does about it.
	how, mended string
	// falls means that the handler cannot be reached: new connections go by
	// on_failure.
	falls bool
	// atOnce means that not one connection that starts after the fault may find
	// the handler, still; else the time to notice is bounded by noticeLimit.
	atOnce bool
	// brief means that Pillion mends it before anybody can look.
	brief bool
	// escapes means that nobody may be there to capture, for a moment.
	escapes bool
	// lingers means that the handler may not hear of an end at once, and has to find
	// out.
	lingers bool
	// news is what becomes of new connections otherwise than falls says, by kind;
	// empty: by on_failure.
	news map[string]word
	// open is what becomes of open connections that the handler carries, if
	// they are not unaffected.
	open word
	// config is more configuration; prepare comes before the start and returns
	// more services.
	config  string
	prepare func(*testing.T, *stage) string
	// targets is where tries go, if not as usual; nil: as usual.
	targets func(*stage, string) []netip.AddrPort
	// breaks makes it so; mends undoes it, nil: Pillion does.
	breaks, mends func(*testing.T, *stage)
	// check looks at what the fault shows itself by, while it lasts; then after.
	check, after func(*testing.T, *stage)
}

// table is every fault. It is made anew for each reader.
func table() []fault {
	return []fault{
		{
			name: "handler killed", how: "kill -9", mended: "whoever started it starts it again",
			falls: true, atOnce: true, open: reset, breaks: kill, mends: launch,
		},
		{
			name: "handler killed, survive: crash", how: "kill -9 of the process that carries", mended: "the keeper starts the next one, which goes on with all connections",
			config: "survive: crash\n", brief: true, breaks: killWorker,
		},
		{
			name: "handler out of memory", how: "killed by the kernel, in a memory cgroup that is full", mended: "whoever started it starts it again",
			falls: true, open: reset, breaks: exhaust, mends: launch,
		},
		{
			name: "handler stopped", how: "SIGSTOP", mended: "SIGCONT; a liveness probe restarts one that hangs",
			falls: true, open: waits, breaks: stop, mends: proceed,
		},
		{
			name: "handler does not accept", how: "SIGSTOP, and an accept queue of 16 that fills meanwhile", mended: "SIGCONT",
			falls: true, open: waits, prepare: shortQueue("16"), breaks: stop, mends: proceed,
		},
		{
			name: "accept queue full", how: "the worker's thread is stopped, and the queue holds 16", mended: "by itself, when the worker goes on",
			falls: true, open: waits, prepare: shortQueue("16"), breaks: hang, mends: undo, after: busy,
		},
		{
			name: "no descriptors", how: "RLIMIT_NOFILE of 8", mended: "by itself, when there are some",
			falls: true, breaks: noFiles, mends: files,
		},
		{
			name: "canary does not arrive", how: "a firewall drops what goes to slots", mended: "by itself, when the rule is gone",
			falls: true, open: waits, breaks: firewall, mends: noFirewall,
		},
		{
			name: "loopback interface down", how: "ip link set lo down", mended: "by itself, when it is up: Pillion adds the slots' routes again",
			falls: true, open: waits, breaks: loDown, mends: loUp,
		},
		{
			name: "slot route deleted", how: "ip route del, both families", mended: "Pillion adds it again at the news of it",
			brief: true, lingers: true, breaks: unroute,
		},
		{
			name: "events ring full", how: "a record that is never committed, before the reader", mended: "by itself; what was lost is counted",
			config: "deny: [100.64.0.0/10]\n", breaks: fillRing, check: ringLoses, mends: undo, after: recorded,
		},
		{
			name: "live full", how: "limits.connections: 60, and a crowd", mended: "by itself, as connections end",
			config: "limits: {connections: 60, connections_per_container: 60}\n",
			falls:  true, breaks: crowd, mends: disperse, check: full("live_full"),
		},
		{
			name: "container's connections full", how: "limits.connections_per_container: 60, and a crowd", mended: "by itself, as connections end",
			config: "limits: {connections_per_container: 60}\n",
			falls:  true, breaks: crowd, mends: disperse, check: full("conn_quota"),
		},
		{
			name: "slots full", how: "every slot is named; connections to addresses that have none yet", mended: "by itself, as slots are not used any more",
			news: map[string]word{toUnnamed: ""}, prepare: manyServers, targets: newAddresses,
			breaks: noSlots, check: full("no_slot"), mends: undo,
		},
		{
			name: "endpoints full", how: "a source tells more endpoints than a service may have", mended: "by itself, when there are fewer; until then the last ones stay",
			prepare: someEndpoints, breaks: tooManyEndpoints, mends: fewerEndpoints,
		},
		{
			name: "bpffs unmounted", how: "umount -l, in a mount namespace of its own", mended: "Pillion mounts it and pins everything again, within a second",
			prepare: ownPins, breaks: unmount, check: pinnedAgain, after: takenOver,
		},
		{
			name: "pins deleted", how: "rm -r of the instance's directory", mended: "Pillion pins everything again, within a second",
			breaks: unpin, check: pinnedAgain, after: takenOver,
		},
		{
			name: "look-up pin deleted, handler killed", how: "rm of one link's pin while it is stopped, and kill -9: nothing brings connections to slots any more", mended: "whoever started it starts it again",
			falls: true, atOnce: true, open: reset, breaks: unpinLookup, mends: launch,
		},
		{
			name: "look-up detached", how: "by bpf_link_detach", mended: "Pillion attaches it again, within a second",
			brief: true, breaks: detachLookup,
		},
		{
			name: "connect hooks detached", how: "by bpf_link_detach", mended: "Pillion attaches them again, within a second",
			brief: true, escapes: true, breaks: detachConnect,
		},
		{
			name: "cgroup removed and made again", how: "the application moves elsewhere, rmdir, mkdir; another one starts in the new one", mended: "Pillion attaches to the new one at the news of it",
			brief: true, escapes: true, breaks: renewScope,
		},
		{
			name: "handler killed, cgroup made again", how: "both of the above, while nobody is there to see the second", mended: "the next one removes what is of a cgroup that is gone, and begins anew",
			news: map[string]word{toRelay: passed, toOther: passed, toUnnamed: passed, toDirect: passed},
			open: reset, escapes: true, breaks: renewAlone, mends: launch,
		},
		{
			name: "cgroup made again, handler killed, survive: crash", how: "the cgroup as above, while the process that carries is being killed", mended: "the keeper starts the next one, which attaches to the new one",
			config: "survive: crash\n", brief: true, escapes: true, breaks: renewBereft,
		},
		{
			name: "clock jumps ahead", how: "ten years, in what the process reads", mended: "nothing to mend",
			prepare: ownClock, breaks: jumps(10 * year), check: jumped, mends: setBack,
		},
		{
			name: "clock jumps back", how: "ten years, in what the process reads", mended: "nothing to mend",
			prepare: ownClock, breaks: jumps(-10 * year), check: jumped, mends: setBack,
		},
		{
			name: "handler stopped, its clock a day ahead", how: "SIGSTOP, in a time namespace of its own", mended: "SIGCONT",
			falls: true, open: waits, prepare: inTime("86400"), breaks: stop, mends: proceed,
		},
		{
			name: "handler stopped, its clock an hour behind", how: "SIGSTOP, in a time namespace of its own", mended: "SIGCONT",
			falls: true, open: waits, prepare: inTime("-3600"), breaks: stop, mends: proceed,
		},
		{
			name: "disk full", how: "the flow log is on a full file system of 32 KiB", mended: "by itself, when there is room; lines that were lost are counted",
			config: "flow_log: " + flowLog + "\n", prepare: logOnDisk,
			breaks: fillDisk, check: diskIsFull, mends: rotate, after: logsAgain,
		},
		{
			name: "admin socket removed", how: "rm", mended: "Pillion makes it again, within a second",
			breaks: removeSocket, after: answersAgain,
		},
		{
			name: "socket for takers removed", how: "rm", mended: "Pillion makes it again, within a second",
			breaks: removeTakers, after: takersCome,
		},
		{
			name: "second instance, same name", how: "pillion run once more", mended: "nothing to mend: it is refused",
			breaks: sameName,
		},
		{
			name: "second instance, other name", how: "pillion run --name other, without services", mended: "SIGTERM of either",
			news: map[string]word{toDirect: carried, toPass: carried}, breaks: otherName, mends: endOther,
		},
	}
}

const year = 365 * 24 * time.Hour
