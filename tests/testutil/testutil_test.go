package testutil

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { Main(m) }

func TestFindCgroup2(t *testing.T) {
	tests := map[string]struct {
		mounts, want string
	}{
		"unified": {mounts: "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", want: "/sys/fs/cgroup"},
		"hybrid": {
			mounts: "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n",
			want:   "/sys/fs/cgroup/unified",
		},
		"none":  {mounts: "proc /proc proc rw 0 0\n"},
		"empty": {},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "mounts")
			if err := os.WriteFile(file, []byte(tt.mounts), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := findCgroup2(file)
			if (err != nil) != (tt.want == "") {
				t.Errorf("error %v", err)
			}
			if got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

// TestCgroupEndsProcesses proves that a process is born in its cgroup and that
// removing the cgroup ends it.
func TestCgroupEndsProcesses(t *testing.T) {
	RequireRoot(t)
	var path string
	cmd := exec.Command("sleep", "1000")
	t.Run("inner", func(t *testing.T) {
		c := NewCgroup(t)
		path = c.Path
		if err := (Place{Cgroup: c.Child(t, "child")}).Start(cmd); err != nil {
			t.Fatal(err)
		}
		line, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(cmd.Process.Pid), "cgroup"))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(line), filepath.Base(path)+"/child") {
			t.Errorf("process is in %s", line)
		}
		if empty, err := c.Empty(); err != nil || empty {
			t.Errorf("empty %v, error %v", empty, err)
		}
	})
	if err := cmd.Wait(); err == nil {
		t.Error("process ended by itself")
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("cgroup is still there: %v", err)
	}
}

// TestPairCarriesTraffic proves that an address of World is reachable from App
// through the default route, and from nowhere else.
func TestPairCarriesTraffic(t *testing.T) {
	p := NewPair(t)
	far := netip.MustParsePrefix("198.51.100.1/32")
	p.World.AddAddr(t, "lo", far)
	addr := netip.AddrPortFrom(far.Addr(), 8080).String()
	var ln net.Listener
	p.World.Do(t, func() (err error) {
		ln, err = net.Listen("tcp", addr)
		return err
	})
	defer ln.Close()
	p.App.Do(t, func() error {
		c, err := net.DialTimeout("tcp", addr, 5*time.Second)
		if err != nil {
			return err
		}
		return c.Close()
	})
	if p.App.Cookie(t) == p.World.Cookie(t) {
		t.Error("both namespaces have one cookie")
	}
}

func TestPlaceLimitsCapabilities(t *testing.T) {
	RequireRoot(t)
	var out strings.Builder
	cmd := exec.Command("grep", "CapEff", "/proc/self/status")
	cmd.Stdout = &out
	if err := (Place{}).With(unix.CAP_NET_BIND_SERVICE).Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if got := strings.Fields(out.String())[1]; got != "0000000000000400" {
		t.Errorf("effective capabilities %s", got)
	}
}

// TestLeaksAreFound proves that the leak check can fail.
func TestLeaksAreFound(t *testing.T) {
	startPoller()
	before, goroutines := openFDs(), countGoroutines()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	left := newFDs(before, openFDs())
	stop := make(chan struct{})
	go func() { <-stop }()
	if got := countGoroutines(); got != goroutines+1 {
		t.Errorf("%d goroutines, want %d", got, goroutines+1)
	}
	close(stop)
	r.Close()
	w.Close()
	pipes := slices.DeleteFunc(left, func(s string) bool { return !strings.Contains(s, "pipe:") })
	if len(pipes) != 2 {
		t.Errorf("found %v, want both ends of the pipe", left)
	}
	if err := leaks(before, goroutines); err != nil {
		t.Errorf("after closing: %v", err)
	}
}
