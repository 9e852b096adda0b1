package upgrade

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"golang.org/x/sys/unix"
)

// otherRings are changes, by file, to what is in rings and in endpoint sets, and to their
// sizes: fields that are moved about, wider, or new.
var otherRings = map[string]map[string]string{
	"include/abi.h": {
		`struct conn_event \{\n`: "struct conn_event {\n\t__u64 spare;\n\t__u64 srtt_us;\n\t__u32 retransmits;\n\t__u32 more;\n",
		`(?s)\t__u32 srtt_us;\n\t__u32 retransmits;\n(\t__u16 source_port;\n.*?\t__u16 endpoint_port;\n)\t__u8 zero\[6\];\n`: "${1}\t__u8 zero[2];\n",

		`struct held \{\n`: "struct held {\n\t__u64 spare;\n",
		`\t__u8 kind; (/\* enum held_kind \*/)\n\t__u8 size; /\* of the frame \*/\n\t__u8 zero\[6\];\n`: "\t__u16 size;\n\t__u8 kind; ${1}\n\t__u8 zero[5];\n",

		`struct set_row \{\n\t__u64 d\[4\];`: "struct set_row {\n\t__u64 d[5];",
		`\t__u32 entry\[`:                    "\t__u64 spare;\n\t__u32 entry[",
		`entry(\[PL_SET_TABLE_ROW\];\n)`:     "entry${1}\t__u64 more[2];\n",
		`struct set_tiers \{\n`:              "struct set_tiers {\n\t__u64 spare;\n",
		`struct set_config \{\n`:             "struct set_config {\n\t__u32 spare;\n\t__u32 more;\n",
		`\t__u32 first; /\* of its endpoints, from 0 \*/\n\t__u32 count;\n`: "\t__u32 count;\n\t__u32 first;\n",
		`\t__u64 verdict_until;`:                     "\t__u64 spare;\n\t__u64 verdict_until;",
		`struct set_endpoint \{\n`:                   "struct set_endpoint {\n\t__u32 alias;\n\t__u32 spare;\n",
		`\t__u32 alias; /\* index in the tier \*/\n`: "\t__u32 more;\n",
		`#define PL_SET_TABLE_ROW 8`:                 "#define PL_SET_TABLE_ROW 4",
		`#define PL_SETS 16384`:                      "#define PL_SETS 20000",
	},
	"include/maps.h": {
		`(BPF_MAP_TYPE_RINGBUF\);\n\t\t\t__uint\(max_entries, )1 << 17`: "${1}1 << 16",
		`(BPF_MAP_TYPE_RINGBUF\);\n\t__uint\(max_entries, )1 << 20`:     "${1}1 << 21",
	},
	"former.bpf.c": {`1 << 20`: "1 << 21"},
	"types.go": {
		`(SetTableRow +)= 8`: "${1}= 4",
		`(Sets +)= 16384`:    "${1}= 20000",
	},
}

var (
	mirrored = netip.MustParseAddrPort("10.96.0.11:80")
	steady   = netip.MustParseAddrPort("10.96.0.12:80")
	weighted = netip.MustParseAddrPort("10.96.0.13:80")
	zoned    = netip.MustParseAddrPort("10.96.0.14:80")
)

// ringsConfig has picks that tell of what endpoint sets hold, and handshakes that wait.
const ringsConfig = `
flow_log: %s
zone: a
services:
  - {name: m, address: %q, connect: mirror, endpoints: [%q]}
  - {name: s, address: %q, path: direct, policy: maglev, hash: destination, endpoints: [%q, %q, %q]}
  - {name: w, address: %q, path: direct, policy: round_robin, endpoints: [{address: %q, weight: 3}, {address: %q, weight: 1}]}
  - {name: z, address: %q, path: direct, endpoints: [{address: %q, zone: a}, {address: %q, zone: b}]}
`

// testLayoutRings has picks go by the same tables, turns, weights and zones, and every
// handshake end as fast as ever, while sets and rings change their layout.
func testLayoutRings(t *testing.T, versions [2]string) {
	t.Helper()
	upgrades := 4
	if testutil.InVM() { // its processor is emulated
		upgrades = 2
	}
	r := rig.New(t)
	for _, e := range ends[:3] {
		r.Serve(t, e, echo)
	}
	log := filepath.Join(t.TempDir(), "flows")
	i := r.Run(t, fmt.Sprintf(ringsConfig, log, mirrored, ends[0], steady, ends[0], ends[1], ends[2],
		weighted, ends[0], ends[1], zoned, ends[0], ends[1]))
	to := []netip.AddrPort{mirrored, steady, weighted, zoned}
	app := newVisitors(t, r, to)
	app.turn(t)
	for n := range upgrades {
		i.Replace(t, versions[n%2])
		app.turn(t)
	}
	testutil.Eventually(t, rig.Limit, func() bool {
		return len(movedRings.FindAllString(i.Log(), -1)) == upgrades
	}, "sets and rings are moved each time")
	o := app.end(t)
	i.Conserved(t)
	want := map[netip.AddrPort]int{}
	total := 0
	for n, count := range o.Come {
		want[to[n]] = count
		total += count
	}
	t.Logf("connections %v; %d times a segment of a handshake was sent again", o.Come, o.Again)
	// Each lost answer costs one of them a second. A machine that is too busy may too.
	if o.Again > total/100 {
		t.Errorf("of %d connections %d sent a segment of their handshake again", total, o.Again)
	}
	var all []flow.Record
	testutil.Eventually(t, rig.Limit, func() bool {
		all = rig.ReadFlows(t, log)
		return len(all) >= total
	}, "records of ", total, " connections")
	checkPicks(t, all, want)
}

var movedRings = regexp.MustCompile(`maps="\[[^\]]*\bevents\b[^\]]*\bheld\b[^\]]*\bsets\b`)

func checkPicks(t *testing.T, all []flow.Record, want map[netip.AddrPort]int) {
	t.Helper()
	cookies, got := map[uint64]bool{}, map[netip.AddrPort]int{}
	picked := map[netip.AddrPort]map[netip.AddrPort]int{}
	for _, r := range all {
		if cookies[r.Cookie] || r.End != flow.ReasonClosed || r.Connect == 0 || r.Sent == 0 || r.Sent != r.Received {
			t.Errorf("the record of no whole connection, or a second one: %+v", r)
		}
		cookies[r.Cookie] = true
		got[r.OrigDst]++
		if picked[r.OrigDst] == nil {
			picked[r.OrigDst] = map[netip.AddrPort]int{}
		}
		picked[r.OrigDst][r.Endpoint]++
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("records by destination (-want +got):\n%s", diff)
	}
	if len(picked[steady]) != 1 {
		t.Errorf("a hash is picked by, and gives %v", picked[steady])
	}
	if len(picked[zoned]) != 1 || picked[zoned][ends[0]] == 0 {
		t.Errorf("the zone is not kept to: %v", picked[zoned])
	}
	// In turn: exact but for a few around each move.
	if n := want[weighted]; abs(picked[weighted][ends[0]]-n*3/4) > n/20+10 {
		t.Errorf("of %d connections by weights of 3 and 1: %v", n, picked[weighted])
	}
}

func abs(n int) int { return max(n, -n) }

// envVisitors makes this test binary an application that connects over and over.
const envVisitors = "PILLION_TEST_UPGRADE_VISITORS"

// visitorsOutcome is what became of it: connections by address, what failed, and how often
// a segment of a handshake was sent again.
type visitorsOutcome struct {
	Come  []int
	Errs  []string
	Again int
}

// visitors is the application of TestVisitors.
type visitors struct{ player }

func newVisitors(t testing.TB, r *rig.Rig, to []netip.AddrPort) visitors {
	t.Helper()
	return visitors{newPlayer(t, r, "TestVisitors", envVisitors, to)}
}

// turn returns when each address was connected to twenty times more.
func (v visitors) turn(t testing.TB) { v.ask(t, "turn") }

// end stops it, and tells what became of all.
func (v visitors) end(t testing.TB) visitorsOutcome { return v.ask(t, "end") }

func (v visitors) ask(t testing.TB, word string) visitorsOutcome {
	t.Helper()
	return ask(t, v.player, word, func(o *visitorsOutcome) []string { return o.Errs })
}

// TestVisitors is the application. As a test it does nothing.
func TestVisitors(*testing.T) {
	text := os.Getenv(envVisitors)
	if text == "" {
		return
	}
	var to []netip.AddrPort
	if err := json.Unmarshal([]byte(text), &to); err != nil {
		panic(err)
	}
	var mu sync.Mutex
	var all sync.WaitGroup
	o, end := visitorsOutcome{Come: make([]int, len(to))}, make(chan struct{})
	for n := range to {
		all.Go(func() {
			for stream := uint64(n); ; {
				select {
				case <-end:
					return
				case <-time.After(rest(time.Millisecond)):
				}
				again, err := visitOnce(to[n], &stream)
				mu.Lock()
				o.Come[n]++
				o.Again += again
				if err != nil && len(o.Errs) < 20 {
					o.Errs = append(o.Errs, err.Error())
				}
				mu.Unlock()
			}
		})
	}
	least := func() int {
		mu.Lock()
		defer mu.Unlock()
		return slices.Min(o.Come)
	}
	out := json.NewEncoder(os.Stdout)
	for {
		var word string
		if _, err := fmt.Scanln(&word); err != nil {
			os.Exit(0)
		}
		if word == "end" {
			close(end)
			all.Wait()
		} else {
			limit := time.Now().Add(rig.Limit)
			for before := least(); least() < before+20 && time.Now().Before(limit); {
				time.Sleep(5 * time.Millisecond)
			}
		}
		mu.Lock()
		out.Encode(o)
		o.Errs = nil
		mu.Unlock()
	}
}

// visitOnce connects, and tells how often a segment of the handshake was sent again.
func visitOnce(to netip.AddrPort, stream *uint64) (again int, err error) {
	d := net.Dialer{Timeout: rig.Limit}
	d.SetMultipathTCP(false)
	c, err := d.Dial("tcp", to.String())
	if err != nil {
		return 0, err
	}
	defer c.Close()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	raw.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			again = int(info.Total_retrans)
		}
	})
	if err := talkOnce(c, stream, 10); err != nil {
		return again, fmt.Errorf("connection to %s: %w", to, err)
	}
	return again, nil
}
