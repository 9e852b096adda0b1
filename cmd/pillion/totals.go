package main

import (
	"bytes"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"sync"

	"github.com/pillion-project/pillion/telemetry/metrics"
	"golang.org/x/sys/unix"
)

// handedTotals are counters that the next process goes on from. One that does not know
// of them begins at 0, as after a restart.
type handedTotals struct {
	Metrics   metrics.Totals
	Endpoints []endpointTotals
}

// endpointTotals are what the handler has counted of an endpoint.
type endpointTotals struct {
	Cluster                       string
	Addr                          netip.AddrPort
	Connects, Failures, Ejections uint64
}

// totals are those of this process, when nothing moves any more.
func (i *instance) totals() (t handedTotals) {
	var err error
	if t.Metrics, err = i.metrics.Totals(); err != nil {
		i.log.Warn("the counters of the metrics will begin at 0", "error", err)
	}
	for _, c := range i.snapshot.Load().Clusters() {
		for _, e := range c.Endpoints {
			if s := e.State(); s.Connects+s.Failures+s.Ejections > 0 {
				t.Endpoints = append(t.Endpoints, endpointTotals{c.Name, s.Addr, s.Connects, s.Failures, s.Ejections})
			}
		}
	}
	return t
}

// countOn goes on from the totals of the process before.
func (i *instance) countOn(t *handedTotals) {
	if err := i.metrics.Resume(t.Metrics); err != nil {
		i.log.Warn("the counters of the metrics begin at 0", "why", err)
	}
	before := make(map[string][]endpointTotals)
	for _, e := range t.Endpoints {
		before[e.Cluster] = append(before[e.Cluster], e)
	}
	for _, c := range i.snapshot.Load().Clusters() {
		at := make(map[netip.AddrPort]endpointTotals, len(before[c.Name]))
		for _, e := range before[c.Name] {
			at[e.Addr] = e
		}
		for _, e := range c.Endpoints {
			if was, ok := at[e.Addr]; ok {
				e.Resume(was.Connects, was.Failures, was.Ejections)
			}
		}
	}
}

// totalsName is what a registry calls the file with the totals.
const totalsName = "totals"

// keptTotals is the file that a worker leaves, for the case that it is killed. Each is
// another one, so that the next worker finds all of the last one, or of the one before.
type keptTotals struct {
	mu   sync.Mutex // orders scrapes
	file *os.File   // nil: none yet
}

// keepTotals has the next worker count on from what is about to be told: so to who
// reads the metrics no counter jumps back.
func (i *instance) keepTotals() {
	s := i.global.survival
	i.kept.mu.Lock()
	defer i.kept.mu.Unlock()
	f, err := writeTotals(i.totals())
	if err == nil && !s.registry.KeepSocket(totalsName, int(f.Fd())) {
		err = errors.Join(errors.New("the registry has no room"), f.Close())
	}
	if err != nil {
		i.log.Warn("after a kill the counters of the metrics will jump back", "error", err)
		return
	}
	before := i.kept.file
	if i.kept.file = f; before != nil {
		before.Close()
	}
}

func writeTotals(t handedTotals) (*os.File, error) {
	fd, err := unix.MemfdCreate(totalsName, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("keep totals: %w", os.NewSyscallError("memfd_create", err))
	}
	f := os.NewFile(uintptr(fd), totalsName)
	var b bytes.Buffer
	if err = gob.NewEncoder(&b).Encode(t); err == nil {
		_, err = f.WriteAt(b.Bytes(), 0)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("keep totals: %w", err), f.Close())
	}
	return f, nil
}

// recallTotals goes on from what the worker before told last, and has the totals kept
// from then on.
func (i *instance) recallTotals() {
	s := i.global.survival
	if s == nil {
		return
	}
	if fd, ok := s.sockets[totalsName]; ok {
		delete(s.sockets, totalsName)
		defer func() {
			if i.kept.file != nil {
				unix.Close(fd) // the registry names another one by then
			}
		}()
		t, err := readTotals(fd)
		if err != nil {
			i.log.Warn("the counters of the metrics begin at 0", "why", err)
		} else {
			i.countOn(&t)
		}
	}
	i.keepTotals()
	i.metrics.BeforeTelling(i.keepTotals)
}

// readTotals leaves the descriptor open: the registry names it until there is another.
func readTotals(fd int) (t handedTotals, err error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return t, fmt.Errorf("read totals: %w", err)
	}
	f := os.NewFile(uintptr(dup), totalsName)
	defer f.Close()
	if err := gob.NewDecoder(io.NewSectionReader(f, 0, 1<<30)).Decode(&t); err != nil {
		return t, fmt.Errorf("read totals: %w", err)
	}
	return t, nil
}
