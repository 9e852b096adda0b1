package events

import (
	"math"
	"net/netip"
	"time"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
)

// readable reports whether every enum of e has a value that this build knows.
func readable(e *bpf.ConnEvent) bool {
	if flow.Reason(e.Reason) >= flow.KernelReasons {
		return false
	}
	switch e.Kind {
	case bpf.EventDenied:
		return flow.Path(e.Path) == flow.PathDeny
	case bpf.EventEnd:
		return endPath(flow.Path(e.Path)) && e.Ending <= bpf.EndingAbandoned
	default:
		return false
	}
}

// endPath reports whether a connection on p can end.
func endPath(p flow.Path) bool {
	return p == flow.PathPass || p == flow.PathDirect || p == flow.PathRelay
}

// record writes to r what the kernel side alone can tell about a connection. e
// must be readable. r is given, so that an event allocates nothing.
func (c clock) record(e *bpf.ConnEvent, r *flow.Record) {
	*r = flow.Record{
		Cookie:      e.Cookie,
		Cgroup:      e.Cgroup,
		Source:      netip.AddrPortFrom(bpf.ToAddr(e.Source), e.SourcePort),
		OrigDst:     netip.AddrPortFrom(bpf.ToAddr(e.Orig), e.OrigPort),
		Path:        flow.Path(e.Path),
		Reason:      flow.Reason(e.Reason),
		Start:       c.wall(e.Opened),
		Duration:    between(e.Opened, e.Ended),
		RTT:         time.Duration(e.SrttUs) * time.Microsecond,
		Retransmits: e.Retransmits,
	}
	r.Sent, r.Received = payload(e)
	r.End = endOf(e)
	if r.Path == flow.PathRelay {
		// What the application dialed there is a slot, and how long that took
		// is not the endpoint's doing: the handler tells.
		return
	}
	r.Connect = time.Duration(min(e.Connect, math.MaxInt64))
	r.Endpoint = endpoint(e)
	settle(r)
}

// settle makes what the kernel side says of a kernel path fit a record: on pass the
// endpoint is what was asked for, and not worth telling, unless another agent's
// program rewrote it.
func settle(r *flow.Record) {
	switch {
	case r.Path == flow.PathDirect:
		r.Attempts = 1
	case r.Endpoint == r.OrigDst:
		r.Endpoint = netip.AddrPort{}
	}
}

// endpoint is what was dialed, not valid if nothing was.
func endpoint(e *bpf.ConnEvent) netip.AddrPort {
	if a := bpf.ToAddr(e.Endpoint); a.IsValid() {
		return netip.AddrPortFrom(a, e.EndpointPort)
	}
	return netip.AddrPort{}
}

// endOf names how a connection ended as far as the kernel side can tell. For
// one on relay that is the end of a connection that the handler never spoke of.
func endOf(e *bpf.ConnEvent) flow.Reason {
	relay := flow.Path(e.Path) == flow.PathRelay
	switch {
	case e.Kind == bpf.EventDenied:
		return flow.Reason(e.Reason)
	case e.Ending == bpf.EndingUnreachable:
		return flow.ReasonDialUnreachable
	case e.Ending == bpf.EndingAbandoned:
		return flow.ReasonAbandoned
	case relay && e.Ending == bpf.EndingRefused:
		// It did not get as far as a dial.
		return flow.ReasonRefused
	case relay && e.Ending == bpf.EndingTimeout:
		return flow.ReasonTimeout
	case relay:
		return flow.ReasonHandlerLost
	case e.Ending == bpf.EndingRefused:
		return flow.ReasonDialRefused
	case e.Ending == bpf.EndingTimeout:
		return flow.ReasonDialTimeout
	case e.Ending == bpf.EndingReset:
		return flow.ReasonReset
	default:
		return flow.ReasonClosed
	}
}

// payload is how many bytes the application sent and received. The kernel
// counts sequence numbers, and SYN and FIN take one each, which are in sent when
// they were acknowledged.
func payload(e *bpf.ConnEvent) (sent, received uint64) {
	switch e.Ending {
	case bpf.EndingClosed:
		return e.Sent - min(e.Sent, 2), e.Received
	case bpf.EndingReset:
		return e.Sent - min(e.Sent, 1), e.Received
	default:
		return e.Sent, e.Received
	}
}

// merge makes one record of both sides': the handler knows what was done with
// the connection, the kernel side when the application opened and closed it.
func merge(handler, kernel *flow.Record) flow.Record {
	r := *handler
	r.Start, r.Duration = kernel.Start, kernel.Duration
	if r.Cgroup == 0 {
		r.Cgroup = kernel.Cgroup
	}
	if !r.Source.IsValid() {
		r.Source = kernel.Source
	}
	if !r.OrigDst.IsValid() {
		r.OrigDst = kernel.OrigDst
	}
	if r.Reason == flow.ReasonNone {
		r.Reason = kernel.Reason
	}
	return r
}
