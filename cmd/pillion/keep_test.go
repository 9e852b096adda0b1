package main

import (
	"os"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/cmd/pillion/handover"
	"github.com/pillion-project/pillion/redirect/l4"
	"golang.org/x/sys/unix"
)

func TestRestarts(t *testing.T) {
	const own = `pillion@my\x2dapp.service`
	tests := map[string]struct {
		jobs string
		want bool
	}{
		"none":              {jobs: ""},
		"restart":           {jobs: "643 " + own + " restart running\n", want: true},
		"stop":              {jobs: "643 " + own + " stop running\n"},
		"among others":      {jobs: "1 a.service start waiting\n643 " + own + " restart running\n2 b.service stop running\n", want: true},
		"another's restart": {jobs: "643 pillion@my.service restart running\n644 " + own + " stop waiting\n"},
		"no list":           {jobs: "No jobs running.\n"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if got := restarts(tt.jobs, own); got != tt.want {
				t.Errorf("%v, want %v", got, tt.want)
			}
		})
	}
}

// TestUnpack: what waits in the store is taken from a process that this one
// understands, and from no other.
func TestUnpack(t *testing.T) {
	good := handover.Hello{
		Protocol: handover.Protocol, ABI: bpf.ABI, Carry: l4.CarryVersion, Build: "1.0", Instance: "shop", Pid: 7,
	}
	tests := map[string]struct {
		change func(*handover.Hello)
		want   string // in the error; empty: there is none
	}{
		"the same":         {change: func(*handover.Hello) {}},
		"another build":    {change: func(h *handover.Hello) { h.Build = "2.0" }},
		"another protocol": {change: func(h *handover.Hello) { h.Protocol++ }, want: "another version (1.0)"},
		"other maps":       {change: func(h *handover.Hello) { h.ABI++ }, want: "another version (1.0)"},
		"maps that move":   {change: func(h *handover.Hello) { h.ABI++; h.Moves = true }},
		"other carrying":   {change: func(h *handover.Hello) { h.Carry++ }, want: "another version (1.0)"},
		"another instance": {change: func(h *handover.Hello) { h.Instance = "pay" }, want: `of instance "pay", this is "shop"`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			conn, other, err := handover.Pair()
			if err != nil {
				t.Fatal(err)
			}
			hello := good
			tt.change(&hello)
			file, err := os.Open(os.DevNull)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			if err := conn.SendJSON(handover.KindHello, hello, nil); err != nil {
				t.Fatal(err)
			}
			// Any descriptor does: nobody listens here.
			if err := conn.SendJSON(handover.KindWelcome, handover.Welcome{Pid: 7, Listeners: [2]int{1, 0}}, []int{int(file.Fd())}); err != nil {
				t.Fatal(err)
			}
			conn.Close() // its process has ended
			fd, err := other.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			var taken *handover.Conn
			if err := fd.Control(func(fd uintptr) { taken, err = handover.Open(dup(t, int(fd))) }); err != nil {
				t.Fatal(err)
			}
			other.Close()
			if err != nil {
				t.Fatal(err)
			}
			ing := &taking{conn: taken}
			defer ing.close()
			err = ing.unpack("shop")
			switch {
			case tt.want == "" && err != nil:
				t.Error(err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("%v, want %q", err, tt.want)
			case tt.want == "" && (ing.welcome.Pid != 7 || len(ing.listeners[0]) != 1):
				t.Errorf("%+v", ing.welcome)
			}
		})
	}
}

func dup(t *testing.T, fd int) int {
	t.Helper()
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
