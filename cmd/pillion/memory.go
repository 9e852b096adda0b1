package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// ebbEvery is how often it is looked whether a flood of connections is over.
	ebbEvery = 5 * time.Second
	// ebbLeast is how many connections there must have been.
	ebbLeast = 500
)

// ebb gives memory back, until ctx is done, each time that most of many
// connections have ended: the runtime does it by itself, but takes minutes.
func ebb(ctx context.Context, live func() int) error {
	tick := time.NewTicker(ebbEvery)
	defer tick.Stop()
	for most := 0; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now := live()
		most = max(most, now)
		if most >= ebbLeast && now < most/4 {
			trim()
			most = now
		}
	}
}

const (
	// litterLeast is how many endpoints must have been put in force, again or not,
	// before their litter is worth a collection: some 100 bytes of each.
	litterLeast = 20_000
	// litterEvery is how soon memory is given back again, and litterQuiet for how
	// long nothing may have been put in force meanwhile.
	litterEvery = 15 * time.Second
	litterQuiet = 2 * time.Second
	// litterLate is when it is given back once more: the first time, streams that
	// were just opened and connections that were just found still wind up, and
	// stacks are halved but once for each collection.
	litterLate = 20 * time.Second
)

// litter is what putting services in force leaves behind: each change makes all of
// them anew. The runtime would keep twice of what is needed for minutes.
type litter struct {
	endpoints   int
	last, given time.Time
	late        bool // it was given back, and not yet once more
}

// add notes that so many endpoints were put in force.
func (l *litter) add(endpoints int, now time.Time) {
	l.endpoints += endpoints
	l.last = now
}

// due tells whether to give memory back now, and notes that it is.
func (l *litter) due(now time.Time) bool {
	much := l.endpoints >= litterLeast && now.Sub(l.last) >= litterQuiet && now.Sub(l.given) >= litterEvery
	late := l.late && now.Sub(l.last) >= litterLate
	if !much && !late {
		return false
	}
	l.endpoints, l.given, l.late = 0, now, !late
	return true
}

// garbage is how much of it there may be, in percent of what is in use, before it is
// collected. Connections make next to none, so that this costs little but while
// much changes; the runtime's own 100 would be resident for good.
const garbage = 25

// frugal has the runtime collect garbage early, unless GOGC says when.
func frugal() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(garbage)
	}
}

// trim gives back the memory that only the start needed: the heap of parsing
// and loading, and the pages of the program itself, of which serving uses a
// fraction. What is needed after all comes back from the page cache.
func trim() {
	constants, err := constantsOf("/proc/self/maps")
	debug.FreeOSMemory()
	debug.FreeOSMemory() // stacks that the first has shrunk are free only now
	if err != nil {
		return
	}
	for _, c := range constants {
		c.part()
		// An error leaves the pages where they are.
		_ = c.advise(unix.MADV_DONTNEED)
	}
}

// pages are a part of the address space, in whole pages.
type pages struct{ from, to uintptr }

// constantsOf returns where the program's code and constants are, by a process's
// list of what it has mapped. What may be written holds our own changes, and is not
// among them.
func constantsOf(list string) ([]pages, error) {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return nil, fmt.Errorf("find the program: %w", err)
	}
	maps, err := os.Open(list)
	if err != nil {
		return nil, fmt.Errorf("list what is mapped: %w", err)
	}
	defer maps.Close()
	var all []pages
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) < 6 || fields[5] != exe || strings.Contains(fields[1], "w") {
			continue
		}
		var s pages
		if _, err := fmt.Sscanf(fields[0], "%x-%x", &s.from, &s.to); err != nil {
			continue
		}
		// What part has parted is one.
		if n := len(all); n > 0 && all[n-1].to == s.from {
			all[n-1].to = s.to
			continue
		}
		all = append(all, s)
	}
	return all, nil
}

// parted is how much of the program is one mapping, at least a page.
const parted = 4 << 10

// part makes many mappings of one. With the page that is asked for the kernel maps
// up to 64 KiB of its neighbours, as far as the mapping goes: of a program of which
// some page is used everywhere that is most of it, two and a half times what is
// used. The advice that parts them is of no consequence: the program's own pages are
// in no core dump anyway.
func (s pages) part() {
	size := uintptr(max(parted, os.Getpagesize()))
	for at := s.from; at < s.to; at += 2 * size {
		if (pages{at, min(at+size, s.to)}).advise(unix.MADV_DONTDUMP) != nil {
			return
		}
	}
}

func (s pages) advise(advice uintptr) error {
	if _, _, e := unix.RawSyscall(unix.SYS_MADVISE, s.from, s.to-s.from, advice); e != 0 {
		return e
	}
	return nil
}
