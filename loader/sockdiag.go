package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// socket is a TCP socket of the namespace, as socket diagnostics show it.
type socket struct {
	local, remote netip.AddrPort // unmapped
	family, state uint8
	id            []byte // struct inet_diag_sockid, as it came
	cgroup        uint64 // 0 if the kernel does not say
	// Only what was asked for: struct tcp_info, and the value of a map of socket
	// storages. Nil if the socket has none.
	info, storage []byte
}

// Layout of inet_diag_req_v2 and inet_diag_msg, and the attribute that names the
// cgroup (include/uapi/linux/inet_diag.h).
const (
	diagIDSize      = 48
	diagRequestSize = 8 + diagIDSize
	diagMessageSize = 4 + diagIDSize + 20
	diagInfo        = 2
	diagStorages    = 20
	diagCgroupID    = 21
	diagDeviceAt    = 36 // in inet_diag_sockid
	diagCookieAt    = 40
)

// Attributes that ask for socket storage, and those of the answer
// (include/uapi/linux/sock_diag.h).
const (
	diagAskStorages = 2
	diagAskMapFD    = 1
	diagStorage     = 1
	diagStorageData = 3
	attrTypeMask    = 0x3fff // without the flags
)

// TCP states, as bits of a request (include/net/tcp_states.h).
const (
	tcpTimeWait   = 6
	tcpClose      = 7
	tcpListen     = 10
	tcpNewSynRecv = 12
)

// diagRequest is the payload of a request.
type diagRequest struct {
	family uint8
	states uint32 // bits
	id     []byte // of one socket
	info   bool   // with struct tcp_info
}

func (r diagRequest) Len() int { return diagRequestSize }

func (r diagRequest) Serialize() []byte {
	b := make([]byte, diagRequestSize)
	b[0], b[1] = r.family, unix.IPPROTO_TCP
	if r.info {
		b[2] = 1 << (diagInfo - 1)
	}
	binary.NativeEndian.PutUint32(b[4:], r.states)
	copy(b[8:], r.id)
	return b
}

// Those that are connected or connecting.
const tcpOpen = ^uint32(1<<tcpTimeWait | 1<<tcpClose | 1<<tcpListen | 1<<tcpNewSynRecv)

// sockets calls f for every open TCP socket of the namespace that is connected
// or connecting.
func (n *network) sockets(f func(*socket)) error { return n.dump(tcpOpen, f) }

// storages does the same with tcp_info and what a map of socket storages has for
// the socket.
func (n *network) storages(m *ebpf.Map, f func(*socket)) error {
	ask := nl.NewRtAttr(diagAskStorages|unix.NLA_F_NESTED, nil)
	ask.AddRtAttr(diagAskMapFD, nl.Uint32Attr(uint32(m.FD())))
	return n.dumpWith(diagRequest{states: tcpOpen, info: true}, ask, f)
}

// listening calls f for every listening TCP socket of the namespace.
func (n *network) listening(f func(*socket)) error {
	return n.dump(1<<tcpListen, f)
}

func (n *network) dump(states uint32, f func(*socket)) error {
	return n.dumpWith(diagRequest{states: states}, nil, f)
}

func (n *network) dumpWith(r diagRequest, ask *nl.RtAttr, f func(*socket)) error {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		req := n.diag(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
		r.family = family
		req.AddData(r)
		if ask != nil {
			req.AddData(ask)
		}
		err := req.ExecuteIter(unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY, func(msg []byte) bool {
			if s, ok := parseSocket(msg); ok {
				f(s)
			}
			return true
		})
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return fmt.Errorf("list sockets: %w", err)
		}
	}
	return nil
}

// diag makes a request that goes to the namespace of n, whatever thread sends
// it.
func (n *network) diag(kind, flags int) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(kind, flags)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_INET_DIAG: n.diagSocket}
	return req
}

func parseSocket(msg []byte) (*socket, bool) {
	if len(msg) < diagMessageSize {
		return nil, false
	}
	s := &socket{family: msg[0], state: msg[1], id: append([]byte(nil), msg[4:4+diagIDSize]...)}
	s.local = diagAddr(s.family, s.id[4:20], s.id[0:2])
	s.remote = diagAddr(s.family, s.id[20:36], s.id[2:4])
	attrs, err := nl.ParseRouteAttr(msg[diagMessageSize:])
	if err != nil {
		return s, true // the cgroup is then unknown
	}
	for _, a := range attrs {
		switch kind := a.Attr.Type & attrTypeMask; {
		case kind == diagCgroupID && len(a.Value) == 8:
			s.cgroup = binary.NativeEndian.Uint64(a.Value)
		case kind == diagInfo:
			s.info = a.Value
		case kind == diagStorages:
			s.storage = storageData(a.Value)
		}
	}
	return s, true
}

// storageData finds the value of the one map that was asked for.
func storageData(nested []byte) []byte {
	for _, level := range []uint16{diagStorage, diagStorageData} {
		attrs, err := nl.ParseRouteAttr(nested)
		if err != nil {
			return nil
		}
		nested = nil
		for _, a := range attrs {
			if a.Attr.Type&attrTypeMask == level {
				nested = a.Value
			}
		}
	}
	return nested
}

// cookie names the socket for its whole life.
func (s *socket) cookie() uint64 { return binary.NativeEndian.Uint64(s.id[diagCookieAt:]) }

// device is the index of the interface that the socket is bound to; 0: to none.
func (s *socket) device() uint32 { return binary.NativeEndian.Uint32(s.id[diagDeviceAt:]) }

func diagAddr(family uint8, ip, port []byte) netip.AddrPort {
	var a netip.Addr
	if family == unix.AF_INET {
		a = netip.AddrFrom4([4]byte(ip[:4]))
	} else {
		a = netip.AddrFrom16([16]byte(ip)).Unmap()
	}
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(port))
}

// destroy ends a socket: its owner gets ECONNABORTED, the peer a reset. It fails
// with ENOENT when the socket is gone.
func (n *network) destroy(s *socket) error {
	req := n.diag(nl.SOCK_DESTROY, unix.NLM_F_ACK)
	req.AddData(diagRequest{family: s.family, states: 1 << s.state, id: s.id})
	_, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
	if err != nil {
		return fmt.Errorf("end connection %s -> %s: %w", s.local, s.remote, err)
	}
	return nil
}
