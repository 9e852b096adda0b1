package l4

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// registryTwice maps one registry as two processes would.
func registryTwice(t *testing.T) (before, after *Registry) {
	t.Helper()
	fd, err := unix.MemfdCreate("pillion", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	for _, r := range []**Registry{&before, &after} {
		if *r, err = OpenRegistry(fd, 4096); err != nil {
			t.Fatal(err)
		}
	}
	return before, after
}

func TestHandles(t *testing.T) {
	before, after := registryTwice(t)
	if got := after.Handles("b1"); got != nil {
		t.Errorf("of nobody: %v", got)
	}
	want := map[string]int{"map live": 7, "link pl_connect4": 0}
	if !before.SetHandles("b1", want) {
		t.Fatal("they are too many")
	}
	if diff := cmp.Diff(want, after.Handles("b1")); diff != "" {
		t.Error(diff)
	}
	if got := after.Handles("b2"); got != nil {
		t.Errorf("of another build: %v", got)
	}
	before.DropHandles()
	if got := after.Handles("b1"); got != nil {
		t.Errorf("dropped: %v", got)
	}
	want = map[string]int{"pins": 9}
	before.SetHandles("b1", want)
	if diff := cmp.Diff(want, after.Handles("b1")); diff != "" {
		t.Error(diff)
	}
	many := map[string]int{}
	for i := range handlesMost + 1 {
		many[strings.Repeat("x", i%20)+string(rune('0'+i/20))] = i
	}
	for what, fails := range map[string]bool{
		"too many":   before.SetHandles("b1", many),
		"long name":  before.SetHandles("b1", map[string]int{strings.Repeat("x", handleName+1): 1}),
		"long build": before.SetHandles(strings.Repeat("x", buildName+1), want),
	} {
		if fails || after.Handles("b1") != nil {
			t.Errorf("%s: written %v: %v", what, fails, after.Handles("b1"))
		}
	}
}

func TestSockets(t *testing.T) {
	before, after := registryTwice(t)
	before.KeepSocket("admin", 5)
	before.KeepSocket("metrics", 6)
	before.KeepSocket("admin", 8)
	if diff := cmp.Diff(map[string]int{"admin": 8, "metrics": 6}, after.Sockets()); diff != "" {
		t.Error(diff)
	}
	before.DropSocket("admin")
	before.DropSocket("nobody's")
	before.KeepSocket("probes", 0)
	if diff := cmp.Diff(map[string]int{"metrics": 6, "probes": 0}, after.Sockets()); diff != "" {
		t.Error(diff)
	}
	for n := range socketsMost {
		before.KeepSocket(string(rune('a'+n)), n)
	}
	if len(after.Sockets()) != socketsMost || before.KeepSocket("one more", 1) {
		t.Errorf("%d sockets are kept: %v", len(after.Sockets()), after.Sockets())
	}
	if after.Charged() {
		t.Error("it is somebody's")
	}
	before.SetCharged()
	if !after.Charged() {
		t.Error("it is nobody's")
	}
}
