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
	debug.FreeOSMemory()
	debug.FreeOSMemory() // stacks that the first has shrunk are free only now
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		return
	}
	defer maps.Close()
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		// What may be written holds our own changes, and stays.
		if len(fields) < 6 || fields[5] != exe || strings.Contains(fields[1], "w") {
			continue
		}
		var from, to uintptr
		if _, err := fmt.Sscanf(fields[0], "%x-%x", &from, &to); err != nil {
			continue
		}
		// An error leaves the pages where they are.
		_, _, _ = unix.RawSyscall(unix.SYS_MADVISE, from, to-from, unix.MADV_DONTNEED)
	}
}
