package loader

import (
	"errors"
	"fmt"
	"net/netip"
	"time"
	"unsafe"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/redirect/flow"
	"golang.org/x/sys/unix"
)

// States of TCP (include/net/tcp_states.h): since the SYN, with the own FIN
// acknowledged, and those in which the peer's has come in.
const (
	tcpSynSent   = 2
	tcpFinWait2  = 5
	tcpCloseWait = 8
	tcpLastAck   = 9
	tcpClosing   = 11
)

// decided calls f for the open sockets of the namespace that a connect hook
// decided on.
func (d *Datapath) decided(f func(*socket, *bpf.Decision)) (err error) {
	m, stored, open, size := d.moving.Load(), d.maps.Decisions, d.openCells, int(unsafe.Sizeof(bpf.Decision{}))
	former := m.has("decisions") && m.again != goesBack
	if former {
		stored, open, size = m.old["decisions"], m.openCells, int(m.from.Maps["decisions"].ValueSize)
	}
	inCells, err := open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, inCells.close()) }()
	return d.network.storages(stored, func(s *socket) {
		raw := inCells.of(s.cookie())
		switch {
		case raw != nil:
		case len(s.storage) == size:
			raw = s.storage
		default:
			return // it has none
		}
		if former {
			raw = m.value("decisions", raw)
		}
		v := valueAs[bpf.Decision](raw)
		f(s, &v)
	})
}

// Connections returns the open connections on flow.PathDirect and flow.PathPass of
// the namespace. Service and Cluster of a record are left empty. It takes CAP_BPF
// and no more.
func (d *Datapath) Connections() ([]flow.Record, error) {
	var all []flow.Record
	now, wall := d.monotonic(), time.Now()
	err := d.decided(func(s *socket, v *bpf.Decision) {
		if path := flow.Path(v.Path); path == flow.PathDirect || path == flow.PathPass {
			all = append(all, openRecord(s, v, now, wall))
		}
	})
	if err != nil {
		return nil, err
	}
	return all, nil
}

// openRecord is the record of an open connection; now and wall are the same moment
// by the clocks of hooks and records.
func openRecord(s *socket, v *bpf.Decision, now int64, wall time.Time) flow.Record {
	age := time.Duration(max(0, now-int64(v.Opened)))
	r := flow.Record{
		Cookie:   s.cookie(),
		Cgroup:   v.Cgroup,
		Source:   s.local,
		OrigDst:  netip.AddrPortFrom(bpf.ToAddr(v.Orig), v.OrigPort),
		Endpoint: s.remote,
		Path:     flow.Path(v.Path),
		Reason:   flow.Reason(v.Reason),
		Start:    wall.Add(-age),
		Duration: age,
		Open:     true,
	}
	if r.Path == flow.PathDirect {
		r.Attempts = 1
	}
	if v.Established > v.Opened {
		r.Connect = time.Duration(v.Established - v.Opened)
	}
	var info unix.TCPInfo
	copy((*[unsafe.Sizeof(info)]byte)(unsafe.Pointer(&info))[:], s.info)
	r.RTT = time.Duration(info.Rtt) * time.Microsecond
	r.Retransmits = info.Total_retrans
	r.Sent, r.Received = info.Bytes_acked, info.Bytes_received
	// Both are of sequence numbers, and SYN and FIN take one each.
	if s.state != tcpSynSent {
		r.Sent -= min(r.Sent, 1)
	}
	switch s.state {
	case tcpFinWait2:
		r.Sent -= min(r.Sent, 1)
	case tcpCloseWait, tcpLastAck, tcpClosing:
		r.Received -= min(r.Received, 1)
	}
	return r
}

// End ends the open connections on flow.PathDirect of a service to an endpoint: the
// endpoint gets a reset, the application ECONNABORTED. Only those are ended that
// the connect hook sent there, and not those that their application has closed: what it
// said last is on its way, and the kernel ends them. (On MPTCP nobody knows of that.) The endpoint may be removed, and the
// service too. It returns how many were ended, and takes CAP_NET_ADMIN.
func (d *Datapath) End(service, endpoint netip.AddrPort) (int, error) {
	d.sets.mu.Lock()
	own, index, err := d.sets.findEndpoint(service, endpoint)
	// A count is never too low, and to list all sockets takes long: of a thousand
	// endpoints that are gone, most have nobody.
	idle := err == nil && d.sets.table.at(index).live().Load() == 0 && d.moving.Load() == nil
	d.sets.mu.Unlock()
	if err != nil || idle {
		return 0, err
	}
	// An index is kept while anybody is counted, so it still means the same.
	var sockets []*socket
	err = d.decided(func(s *socket, v *bpf.Decision) {
		if flow.Path(v.Path) == flow.PathDirect && v.Released == 0 && v.Set == own.id && v.Endpoint == index {
			sockets = append(sockets, s)
		}
	})
	if err != nil {
		return 0, err
	}
	ended := 0
	var errs []error
	for _, s := range sockets {
		switch err := d.network.destroy(s); {
		case err == nil:
			ended++
		case !errors.Is(err, unix.ENOENT):
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return ended, fmt.Errorf("end connections to endpoint %s of service %s: %w", endpoint, service, err)
	}
	return ended, nil
}
