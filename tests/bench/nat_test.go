package main

import (
	"context"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"testing"
)

// TestTranslation dials a service in an application's network namespace by each
// of the peers, and counts which endpoints answer.
func TestTranslation(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes network namespaces")
	}
	base, err := newNetns()
	if err != nil {
		t.Fatal(err)
	}
	defer base.Close()
	w := &world{}
	defer w.close()
	hits := &hits{by: map[netip.AddrPort]int{}}
	defer hits.all.Wait()
	err = within(base, func() error {
		if err := addEndpoints(); err != nil {
			return err
		}
		for _, e := range endpoints {
			ln, err := net.Listen("tcp", e.String())
			if err != nil {
				return err
			}
			w.later(ln.Close)
			hits.all.Go(func() { hits.count(ln, e) })
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range nats {
		t.Run(p.name, func(t *testing.T) { testTranslation(t, w, base, i+1, p, hits) })
	}
	if err := w.close(); err != nil {
		t.Error(err)
	}
}

func testTranslation(t *testing.T, w *world, base *os.File, n int, p nat, h *hits) {
	const dials = 60
	if program, ok := map[string]string{"nftables": "nft", "iptables": "iptables-legacy"}[p.name]; ok {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("is not installed: %v", err)
		}
	}
	var ns *os.File
	err := within(base, func() (err error) {
		ns, err = w.namespace(n)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.install(ns, serviceAddr, endpoints); err != nil {
		if p.name == "nftables" {
			t.Fatal(err) // every kernel that Pillion supports has it
		}
		t.Skipf("cannot be here: %v", err)
	}
	h.reset()
	err = within(ns, func() error {
		for range dials {
			c, err := new(net.Dialer).DialContext(context.Background(), "tcp", serviceAddr.String())
			if err != nil {
				return err
			}
			// Until it has been counted, and closed.
			if _, err := c.Read(make([]byte, 1)); err == nil {
				t.Error("the server speaks")
			}
			c.Close()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	sum := 0
	for _, e := range endpoints {
		got := h.of(e)
		sum += got
		if got == 0 {
			t.Errorf("%v has none of %d connections", e, dials)
		}
	}
	if sum != dials {
		t.Errorf("%d of %d connections arrived", sum, dials)
	}
}

// hits counts who was dialed.
type hits struct {
	all sync.WaitGroup
	mu  sync.Mutex // guards by
	by  map[netip.AddrPort]int
}

// count counts until ln is closed.
func (h *hits) count(ln net.Listener, e netip.AddrPort) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		h.mu.Lock()
		h.by[e]++
		h.mu.Unlock()
		c.Close()
	}
}

func (h *hits) of(e netip.AddrPort) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.by[e]
}

func (h *hits) reset() {
	h.mu.Lock()
	defer h.mu.Unlock()
	clear(h.by)
}
