package loader

import (
	"fmt"
	"net/netip"
	"syscall"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
)

// Verdict is what the connect hook would do with a connection.
type Verdict struct {
	Path   flow.Path
	Reason flow.Reason
	// Rule is the index in Rules.Deny or Rules.Exclude of the rule that decides;
	// -1: none does.
	Rule int
	// Service is not valid when none has the address.
	Service netip.AddrPort
	// Endpoint is what a pick gives for a service with a set, whatever the path,
	// and Tier is which it is in. It is not valid when there is nothing to pick.
	Endpoint netip.AddrPort
	Tier     int
	// Errno is what connect(2) returns at once, on flow.PathDeny; else 0.
	Errno syscall.Errno
}

// Before the question stands an Ethernet header, all zero: the kernel wants one.
const dryRunAt = 14

// DryRun asks the connect hook's own code what it would do now with a connection
// from source (not valid: unbound) to dst. It changes no counter.
func (d *Datapath) DryRun(source netip.Addr, dst netip.AddrPort) (Verdict, error) {
	v, err := d.dryRun(bpf.DryRun{Dst: bpf.FromAddr(dst.Addr()), Bound: bpf.FromAddr(source), Port: dst.Port()})
	if err != nil {
		return Verdict{}, fmt.Errorf("ask the connect hook about %s: %w", dst, err)
	}
	verdict := Verdict{Path: flow.Path(v.Path), Reason: flow.Reason(v.Reason), Rule: -1, Tier: int(v.Tier), Errno: syscall.Errno(v.Err)}
	if v.Ruled != 0 {
		verdict.Rule = int(v.Rule)
	}
	if v.Service != 0 {
		verdict.Service = unmapped(dst)
	}
	if a := bpf.ToAddr(v.Endpoint); a.IsValid() {
		verdict.Endpoint = netip.AddrPortFrom(a, v.EndpointPort)
	}
	return verdict, nil
}

func (d *Datapath) dryRun(q bpf.DryRun) (bpf.DryRun, error) {
	const size = unsafe.Sizeof(q)
	frame := make([]byte, dryRunAt+size)
	copy(frame[dryRunAt:], (*[size]byte)(unsafe.Pointer(&q))[:])
	o := ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame))}
	if _, err := d.programs[bpf.ProgExplain].Run(&o); err != nil {
		return q, err
	}
	if len(o.DataOut) != len(frame) {
		return q, fmt.Errorf("the answer has %d bytes, want %d", len(o.DataOut), len(frame))
	}
	copy((*[size]byte)(unsafe.Pointer(&q))[:], o.DataOut[dryRunAt:])
	return q, nil
}
