package kube

import (
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/redirect/upstream/discover"
)

// TestMemory: 200 services of 50 endpoints each take no more than 2,000 bytes
// for each endpoint, stacks included, and the server's side of it too, which
// runs in the same process here. tests/kubernetes has the resident memory.
func TestMemory(t *testing.T) {
	const services, endpoints = 200, 50
	k, c := clusterKube(t)
	var addrs []netip.AddrPort
	for i := range services {
		addr := netip.AddrFrom4([4]byte{10, 96, 1, byte(i)})
		name := fmt.Sprintf("s%d", i)
		k.put("services", "default", name, "", strings.ReplaceAll(webSpec, "10.96.0.10", addr.String()))
		list := make([]string, endpoints)
		for j := range list {
			list[j] = ep(fmt.Sprintf("10.0.%d.%d", i, j), fmt.Sprintf(`"zone":"zone-%d"`, j%3))
		}
		k.put("endpointslices", "default", name+"-1", name, sliceOf("IPv4", httpPort, list...))
		addrs = append(addrs, netip.AddrPortFrom(addr, 80))
	}
	k.forget()
	k.mu.Lock()
	k.oldest = 0
	k.mu.Unlock()
	before := inUse()
	d := demand(t, c, DemandOptions{})
	var all []*heard
	for i, addr := range addrs {
		eventually(t, "found", func() bool { d.Asked(addr); return d.Stats().Services > i })
	}
	eventually(t, "listed", func() bool { return len(d.list()) == services })
	for i := range services {
		h := listen(t, d.at(i).Source)
		h.wait("all endpoints", func(last discover.Snapshot) bool { return len(last.Endpoints) == endpoints })
		all = append(all, h)
	}
	k.mu.Lock()
	k.requests = nil
	k.mu.Unlock()
	each := (inUse() - before) / (services * endpoints)
	runtime.KeepAlive(all)
	t.Logf("%d bytes for each endpoint", each)
	if each > 2000 {
		t.Errorf("%d bytes for each endpoint", each)
	}
}

func inUse() int {
	runtime.GC()
	runtime.GC() // what the first one could only mark for finalizing
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc + m.StackInuse)
}
