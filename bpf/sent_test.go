package bpf

import (
	"net"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/tests/testutil"
)

// TestNamesElsewhere: in another network namespace of the scope the same addresses are
// those of another connection, which was sent nowhere.
func TestNamesElsewhere(t *testing.T) {
	testutil.CheckLeaks(t)
	const asked, endpoint = "10.96.0.12:80", "127.0.0.1:8001"
	h := newHooks(t)
	h.serve(t)
	h.service(t, asked, Service{Id: 1, Path: uint8(PathDirect)})
	h.publish(t, 1, healthy, 0, 10, []endpointOf{{endpoint, 1}}, []uint32{0})
	there := *h
	there.ns = testutil.NewNS(t)
	listen := func(ns *testutil.NS) (l net.Listener) {
		ns.Do(t, func() (err error) {
			l, err = net.Listen("tcp", endpoint)
			return err
		})
		t.Cleanup(func() { l.Close() })
		return l
	}
	here := listen(h.ns)
	listen(there.ns)

	a := h.start(t, "mptcp="+asked, "wait", "peer")
	conn, err := here.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	step := "mptcp=" + conn.RemoteAddr().String() + "," + endpoint
	if diff := cmp.Diff([]string{step + " " + endpoint}, there.steps(t, step)); diff != "" {
		t.Errorf("the peer elsewhere (-want +got):\n%s", diff)
	}
	a.write("\n")
	want := []string{"mptcp=" + asked + " " + asked, "wait", "peer " + asked}
	if diff := cmp.Diff(want, a.said(t, len(want))); diff != "" {
		t.Errorf("peers (-want +got):\n%s", diff)
	}
}
