package upgrade

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/tests/rig"
	"github.com/pillion-project/pillion/tests/testutil"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// otherABI is the ABI of the build with other maps.
const otherABI = 1007

// source returns the directory of this tree.
func source(t testing.TB) string {
	t.Helper()
	mod, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Dir(strings.TrimSpace(string(mod)))
}

// replaced replaces what a pattern finds, and that must be there.
func replaced(t testing.TB, path string, changes map[string]string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for pattern, with := range changes {
		r := regexp.MustCompile(pattern)
		if !r.Match(text) {
			t.Fatalf("%s has no %s", path, pattern)
		}
		text = r.ReplaceAll(text, []byte(with))
	}
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Where they are given, TestLayouts writes the build with other maps, and does nothing
// else: scripts/vm-test.sh takes that into its virtual machine.
var (
	layoutTo   = flag.String("layout-to", "", "the file that TestLayouts only writes the other build to")
	layoutArch = flag.String("layout-arch", runtime.GOARCH, "for which architecture")
)

// buildWithLayout builds this tree with the contract of bpf/include/abi.h changed: the
// objects are compiled again, and stand in for the committed ones.
func buildWithLayout(t testing.TB, changes map[string]string) string {
	t.Helper()
	if _, ok := testutil.Prebuilt("pillion-layout"); ok {
		return testutil.Build(t, "pillion-layout")
	}
	testutil.Need(t, "clang-19", "llvm-strip-19")
	tree, dir := source(t), t.TempDir()
	run := func(at string, env []string, line ...string) {
		t.Helper()
		cmd := exec.Command(line[0], line[1:]...)
		cmd.Dir, cmd.Env = at, append(os.Environ(), env...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", strings.Join(line, " "), err, out)
		}
	}
	sources := filepath.Join(dir, "bpf")
	if err := os.CopyFS(sources, os.DirFS(filepath.Join(tree, "bpf"))); err != nil {
		t.Fatal(err)
	}
	replaced(t, filepath.Join(sources, "include", "abi.h"), changes)
	for file, changes := range otherRings {
		replaced(t, filepath.Join(sources, file), changes)
	}
	replaced(t, filepath.Join(sources, "include", "abi.h"), map[string]string{`#define PL_ABI \d+`: fmt.Sprintf("#define PL_ABI %d", otherABI)})
	replaced(t, filepath.Join(sources, "types.go"), map[string]string{`(ABI +)= \d+`: fmt.Sprintf("${1}= %d", otherABI)})
	compiler := filepath.Join(dir, "bpf2go")
	run(tree, nil, "go", "build", "-o", compiler, "github.com/cilium/ebpf/cmd/bpf2go")
	lines, err := os.ReadFile(filepath.Join(sources, "gen.go"))
	if err != nil {
		t.Fatal(err)
	}
	overlay := map[string]string{filepath.Join(tree, "bpf", "types.go"): filepath.Join(sources, "types.go")}
	for _, line := range strings.Split(string(lines), "\n") {
		if args, ok := strings.CutPrefix(line, "//go:generate go tool bpf2go "); ok {
			run(sources, []string{"GOPACKAGE=bpf"}, "sh", "-c", compiler+" "+args)
			words := strings.Fields(args)
			stem := words[len(words)-2]
			for _, suffix := range []string{"_bpfel.go", "_bpfel.o"} {
				overlay[filepath.Join(tree, "bpf", stem+suffix)] = filepath.Join(sources, stem+suffix)
			}
		}
	}
	text, err := json.Marshal(map[string]any{"Replace": overlay})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "overlay.json"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	binary, env := filepath.Join(dir, "pillion"), []string{"CGO_ENABLED=0"}
	if *layoutTo != "" {
		binary, env = *layoutTo, append(env, "GOARCH="+*layoutArch)
	}
	run(tree, env, "go", "build", "-overlay", filepath.Join(dir, "overlay.json"),
		"-ldflags=-s -w -X main.version=v0.0.1-layout -E=github.com/pillion-project/pillion/cmd/pillion/keeper.entry", "-o", binary, "./cmd/pillion")
	return binary
}

// hot are maps that hooks write to all the time. All of them differ.
var hot = []string{"cells", "decisions", "departed", "endpoints", "live", "slots", "state", "usage_by_group"}

// otherLayout moves about what is stored with sockets and what hooks write to, and adds
// to that and to maps of the configuration.
var otherLayout = map[string]string{
	`struct decision \{\n`:                                     "struct decision {\n\t__u64 spare;\n\t__u64 established;\n",
	`\t__u64 established; /\* 0: not yet \*/\n`:                "",
	`struct settings \{\n`:                                     "struct settings {\n\t__u32 spare[4];\n",
	`struct service \{\n`:                                      "struct service {\n\t__u64 spare;\n",
	`struct beat \{\n`:                                         "struct beat {\n\t__u64 spare;\n",
	`struct endpoint_name \{\n`:                                "struct endpoint_name {\n\t__u64 spare;\n",
	`struct live \{\n`:                                         "struct live {\n\t__u64 spare[2];\n",
	`struct slot \{\n(\t[^\n]*\n\t[^\n]*\n)`:                   "struct slot {\n\t__u64 spare;\n\t__u64 group_before;\n${1}",
	`struct usage \{\n\t__u64 slots;\n`:                        "struct usage {\n\t__u64 spare;\n",
	`\t__u64 events_lost;\n\};\n\n/\* Settings`:                "\t__u64 events_lost;\n\t__u64 slots;\n};\n\n/* Settings",
	`struct state \{\n(\t[^\n]*\n)(\t[^\n]*\n)`:                "struct state {\n\t__u64 spare;\n${2}${1}",
	`struct endpoint \{\n(\t[^\n]*\n)(\t[^\n]*\n)(\t[^\n]*\n)`: "struct endpoint {\n\t__u64 spare;\n${3}${2}${1}",
	`struct instance \{\n(\t__u32 abi; [^\n]*\n)`:              "struct instance {\n${1}\t__u32 spare;\n\t__u32 more;\n\t__u32 still;\n",
}

var (
	// direct2 is a service on direct, and half of ejected's endpoints refuse.
	direct2 = netip.MustParseAddrPort("10.96.0.2:80")
	ejected = netip.MustParseAddrPort("10.96.0.3:80")
	refuses = netip.MustParseAddrPort("198.51.100.1:1")
	// Every address of wide answers: each is named by a slot of its own.
	wide = netip.MustParsePrefix("10.77.0.0/16")
)

// layoutConfig says that a container may have so many connections and not many more: one
// that is counted still after its end would soon be seen.
const layoutConfig = `
flow_log: %s
default: relay
limits: {connections_per_container: %d}
%s  - {name: d, address: %q, path: direct, endpoints: [%q, %q]}
  - {name: p, address: %q, path: pass}
  - name: e
    address: %q
    path: direct
    policy: round_robin
    health: {failures: 2, base: 1h, max: 1h}
    endpoints: [%q, %q]
`

// layoutStage starts an instance, and applications that stay connected at these
// addresses, so many at each; there is room for some later. More comes before the
// configuration.
func layoutStage(t *testing.T, log, more string, conns, later int, to ...netip.AddrPort) (*rig.Rig, *rig.Instance, peers) {
	t.Helper()
	r := rig.New(t)
	for _, e := range ends {
		r.Serve(t, e, echo)
	}
	r.World.Do(t, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{
			LinkIndex: lo.Attrs().Index, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST,
			Dst: &net.IPNet{IP: wide.Addr().AsSlice(), Mask: net.CIDRMask(wide.Bits(), 32)},
		})
	})
	r.Serve(t, netip.AddrPortFrom(netip.IPv4Unspecified(), widePort), echo)
	i := r.Run(t, more+fmt.Sprintf(layoutConfig, log, conns+later+roomForVisitors, service(ends[0], ends[1]),
		direct2, ends[0], ends[1], ends[2], ejected, ends[0], refuses))
	i.OccupyCells(t, 2)
	for range 6 { // two of which fail
		_, _ = r.Try(os.Args[0], "-test.run=^TestKnock$", "-knock="+ejected.String())
	}
	if v := refusing(statusOf(t, i)); !v.Ejected || v.Failures != 2 {
		t.Fatalf("the endpoint that refuses: %+v", v)
	}
	q := peersTask{To: to, Conns: conns, Pause: 2 * time.Millisecond}
	if later > 0 {
		q.Pause = 10 * time.Millisecond // it takes longer
	}
	if slices.Contains(to, vip) { // who is relayed outlives the process
		q.Wide, q.WidePort = wide, widePort
	}
	app := newPeers(t, r, q)
	app.turn(t, "turn")
	return r, i, app
}

const (
	widePort = 9000
	// roomForVisitors are connections that come and go: two at a time, and such
	// whose end is under way.
	roomForVisitors = 12
)

// refusing is what is known of the endpoint that refuses.
func refusing(s admin.Status) admin.EndpointStatus {
	for _, v := range s.Services {
		for _, e := range v.Endpoints {
			if e.Address == refuses.String() {
				return e
			}
		}
	}
	return admin.EndpointStatus{}
}

// TestLayouts has two builds follow each other whose maps have other layouts, to and fro,
// while applications are connected on every path.
func TestLayouts(t *testing.T) {
	other := buildWithLayout(t, otherLayout)
	if *layoutTo != "" {
		return
	}
	versions := [2]string{other, rig.Binary(t)}
	t.Run("take over", func(t *testing.T) { testLayouts(t, versions) })
	t.Run("after a kill", func(t *testing.T) { testLayoutsKilled(t, versions) })
	t.Run("killed on the way", func(t *testing.T) { testLayoutsHalfway(t, versions) })
	t.Run("picks and handshakes", func(t *testing.T) { testLayoutRings(t, versions) })
}

func testLayouts(t *testing.T, versions [2]string) {
	t.Helper()
	upgrades, conns := 6, 40
	if testutil.InVM() { // its processor is emulated
		upgrades, conns = 2, 10
	}
	log := filepath.Join(t.TempDir(), "flows")
	_, i, app := layoutStage(t, log, "", conns, 0, vip, direct2, ends[2])
	for n := range upgrades {
		before := statusOf(t, i)
		i.Replace(t, versions[n%2])
		awaitMoves(t, i, n+1) // a count may be too low until then
		after := checkTurn(t, i, app, before, conns)
		if after.TakenOver == nil || after.TakenOver.Version == after.Version {
			t.Errorf("upgrade %d: taken over: %+v, this is %s", n, after.TakenOver, after.Version)
		}
	}
	o := app.turn(t, "end")
	i.Conserved(t)
	want := map[netip.AddrPort]int{}
	total := 0
	for n, to := range []netip.AddrPort{vip, direct2, ends[2]} {
		t.Logf("%s: %d new connections", to, o.New[n])
		if o.New[n] < 10 {
			t.Errorf("%s: only %d new connections", to, o.New[n])
		}
		want[to] = conns + o.New[n]
		total += want[to]
	}
	t.Logf("%d new destinations", o.Wide)
	if o.Wide < 10 {
		t.Errorf("only %d new destinations", o.Wide)
	}
	want[wideAny] = o.Wide
	want[ejected] = 6 // of before
	total += o.Wide + 6
	var all []flow.Record
	testutil.Eventually(t, rig.Limit, func() bool {
		all = rig.ReadFlows(t, log)
		return len(all) >= total
	}, "records of ", total, " connections")
	checkRecords(t, all, want)
	awaitNobody(t, i)
}

// testLayoutsKilled has each process killed, and one of the other build started: what the
// kernel carries goes on.
func testLayoutsKilled(t *testing.T, versions [2]string) {
	t.Helper()
	kills, conns := 3, 20
	if testutil.InVM() {
		kills, conns = 2, 10
	}
	r, i, app := layoutStage(t, filepath.Join(t.TempDir(), "flows"), "", conns, 0, direct2, ends[2])
	for n := range kills {
		before := statusOf(t, i)
		i.Kill(t)
		r.Program = versions[n%2]
		i.Launch(t)
		awaitMoves(t, i, n+1)
		checkTurn(t, i, app, before, conns)
	}
	app.turn(t, "end")
	i.Conserved(t)
	awaitNobody(t, i)
}

func statusOf(t testing.TB, i *rig.Instance) admin.Status {
	t.Helper()
	s, err := i.Status(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// checkTurn wants that every connection goes on, and that no count has gone back or is
// wrong.
func checkTurn(t *testing.T, i *rig.Instance, app peers, before admin.Status, conns int) admin.Status {
	t.Helper()
	if o := app.turn(t, "turn"); o.Least < 2 {
		t.Error("a connection stands still")
	}
	after := statusOf(t, i)
	for why, count := range before.Counters {
		if after.Counters[why] < count {
			t.Errorf("counter %s went from %d to %d", why, count, after.Counters[why])
		}
	}
	if v := refusing(after); !v.Ejected || v.Failures < 2 {
		t.Errorf("the endpoint that was ejected: %+v", v)
	}
	// Beside those that stay there is a visitor, and one whose end is under way.
	if live := liveOf(after, "d"); live < int64(conns) || live > int64(conns)+2 {
		t.Errorf("%d connections are open on direct, want %d and a visitor", live, conns)
	}
	return after
}

// awaitMoves waits until maps were moved so often, all of them: the last process may be
// at it still.
func awaitMoves(t *testing.T, i *rig.Instance, want int) {
	t.Helper()
	var got int
	testutil.Eventually(t, rig.Limit, func() bool {
		got = strings.Count(i.Log(), "moved to another layout of maps")
		return got == want
	}, "maps are moved each time: ", &got)
	for _, name := range hot {
		if n := len(regexp.MustCompile(`maps="\[[^\]]*\b`+name+`\b`).FindAllString(i.Log(), -1)); n != want {
			t.Errorf("map %s was moved %d times, want %d", name, n, want)
		}
	}
}

func awaitNobody(t *testing.T, i *rig.Instance) {
	t.Helper()
	testutil.Eventually(t, rig.Limit, func() bool {
		s := statusOf(t, i)
		return s.Live == 0 && liveOf(s, "d") == 0 && liveOf(s, "s") == 0
	}, "nobody is counted as connected")
}

// wideAny stands for all of wide.
var wideAny = netip.AddrPortFrom(wide.Addr(), widePort)

// checkRecords wants one record of each connection, by what was asked for, on the path
// that was configured, with an end that tells nothing but that it was closed.
func checkRecords(t *testing.T, all []flow.Record, want map[netip.AddrPort]int) {
	t.Helper()
	paths := map[netip.AddrPort]flow.Path{
		vip: flow.PathRelay, direct2: flow.PathDirect, ends[2]: flow.PathPass, wideAny: flow.PathRelay,
	}
	got := map[netip.AddrPort]int{}
	cookies := map[uint64]bool{}
	late := 0
	for _, r := range all {
		if cookies[r.Cookie] {
			t.Errorf("two records of one connection: %+v", r)
		}
		cookies[r.Cookie] = true
		if wide.Contains(r.OrigDst.Addr()) {
			r.OrigDst = wideAny
		}
		got[r.OrigDst]++
		switch {
		case r.OrigDst == ejected:
		case r.End != flow.ReasonClosed || r.Connect == 0 || r.Sent == 0 || r.Sent != r.Received:
			t.Errorf("a record is not that of a whole connection: %+v", r)
		case r.Path == paths[r.OrigDst]:
		case r.OrigDst == vip && r.Path == flow.PathDirect && r.Reason == flow.ReasonHandlerStale:
			late++
		default:
			t.Errorf("a connection took another path: %+v", r)
		}
	}
	if late > 0 {
		// A machine that is too busy for heartbeats: on_failure.
		t.Logf("%d connections were not relayed, since a heartbeat was late", late)
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("records by destination (-want +got):\n%s", diff)
	}
}

func liveOf(s admin.Status, name string) (live int64) {
	n := slices.IndexFunc(s.Services, func(v admin.ServiceStatus) bool { return v.Name == name })
	for _, e := range s.Services[n].Endpoints {
		live += e.Live
	}
	return live
}
