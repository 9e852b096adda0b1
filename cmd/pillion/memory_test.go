package main

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestLitter: memory is given back after much was put in force, when it is quiet
// again, and not all the time.
func TestLitter(t *testing.T) {
	t.Parallel()
	var l litter
	now := time.Now()
	after := func(d time.Duration, want bool) {
		t.Helper()
		now = now.Add(d)
		if got := l.due(now); got != want {
			t.Errorf("due: %v, want %v", got, want)
		}
	}
	after(time.Hour, false)
	l.add(litterLeast-1, now)
	after(litterQuiet, false)
	l.add(1, now)
	after(litterQuiet-1, false)
	after(1, true)
	after(litterLate-litterQuiet-1, false)
	after(1, true) // once more
	after(time.Hour, false)
	l.add(litterLeast, now)
	after(litterQuiet, true)
	l.add(litterLeast, now)
	after(litterEvery-1, false)
	after(1, true)
}

// TestPart: what is parted is found whole again, and the kernel maps no more around
// what is used than one part.
func TestPart(t *testing.T) {
	const list = "/proc/self/maps"
	before, err := constantsOf(list)
	if err != nil || len(before) == 0 {
		t.Fatalf("where the program is: %v, %v", before, err)
	}
	lines := func() int {
		t.Helper()
		text, err := os.ReadFile(list)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(text), "\n")
	}
	mapped, size := lines(), 0
	for _, c := range before {
		c.part()
		c.part() // as with every trim
		size += int(c.to - c.from)
	}
	after, err := constantsOf(list)
	if err != nil || !slices.Equal(after, before) {
		t.Errorf("parted, the program is at %x, before at %x: %v", after, before, err)
	}
	if got, want := lines()-mapped, size/max(parted, os.Getpagesize())/2; got < want {
		t.Errorf("%d mappings more, want at least %d", got, want)
	}
}
