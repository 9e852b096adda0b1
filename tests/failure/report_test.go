package failure

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	reportFile = "../../docs/failure.md"
	// envReport is where the report is written, with the times of this run.
	envReport = "PILLION_FAILURE"
	// timesFrom begins the part that is another one each time.
	timesFrom = "## Times\n"
)

const head = `# What failures do to connections

Written by ` + "`make failure`" + ` from the table in tests/failure, which is executed: do not edit.

Each fault is made in a world of its own, beside a running instance with an application that connects all the time, over IPv4 and
IPv6 in turn. While it lasts, %d connections are made to each kind of destination, and %d that are open are used in both directions.
Where Pillion mends it before anybody could look, both is done afterwards. In the end all must be as before, nothing may be
unaccounted for (the conservation law), and nothing be left behind.

- *relay*: a service on that path, with endpoints; *relay, other*: one whose own ` + "`on_failure`" + ` is the opposite of the
  configuration's, which the second column has; *relay, unnamed*: an address that no service names; *direct*, *pass*: services on
  these paths.
- New connections: *carried* by the handler; *direct*, by the kernel to an endpoint; *passed*, by the kernel to where they were
  going; *refused*, at once. Open ones: *unaffected*; *waits*, until the fault is mended, and then all bytes are there, once and in
  order; *reset*.
- The application listens on the ports that it dials, on all of its addresses, and never reaches itself; getpeername(2) says what it asked for.
- The number is how many were tried, and all of them came out so. Connections on *direct* and *pass* never fail, also
  in the moment of the fault: of those that the application makes all the time, not one did (but see the second instance).

`

// rows are a fault's two. Of open connections, those that the handler carries are
// counted together.
func (f *fault) rows(get func(cell) tally) string {
	var b strings.Builder
	for _, setting := range []string{onOpen, onClosed} {
		fmt.Fprintf(&b, "| %s | %s |", f.name, setting)
		for _, kind := range kinds {
			fmt.Fprintf(&b, " %s |", get(cell{f.name, setting, kind, false}))
		}
		relayed := tally{}
		for _, kind := range redirected {
			relayed.add(get(cell{f.name, setting, kind, true}))
		}
		fmt.Fprintf(&b, " %s | %s | %s |\n", relayed, get(cell{f.name, setting, toDirect, true}), get(cell{f.name, setting, toPass, true}))
	}
	return b.String()
}

func (c tally) add(more tally) {
	for w, n := range more {
		c[w] += n
	}
}

// String is how a cell is shown.
func (c tally) String() string {
	var all []string
	for _, w := range words {
		if n := c[w]; n > 0 {
			all = append(all, fmt.Sprintf("%d %s", n, w))
		}
	}
	return strings.Join(all, ", ")
}

// render writes the report of what get says of each cell, without the times.
func render(all []fault, get func(cell) tally) string {
	var b strings.Builder
	fmt.Fprintf(&b, head, attempts, openPer)
	b.WriteString("| fault | on_failure | new: relay | relay, other | relay, unnamed | direct | pass | open: relay | direct | pass |\n")
	b.WriteString("|---|---|---|---|---|---|---|---|---|---|\n")
	for _, f := range all {
		b.WriteString(f.rows(get))
	}
	b.WriteString("\n## What is done, and how it ends\n\n| fault | made by | mended |\n|---|---|---|\n")
	for _, f := range all {
		fmt.Fprintf(&b, "| %s | %s | %s |\n", f.name, f.how, f.mended)
	}
	b.WriteString("\n" + notes + "\n")
	return b.String()
}

// wanted is what the table says of a cell.
func wanted(all []fault) func(cell) tally {
	return func(c cell) tally {
		f := all[slices.IndexFunc(all, func(f fault) bool { return f.name == c.fault })]
		if c.open {
			return tally{f.wantOpen(c.kind): openPer}
		}
		return tally{f.want(c.kind, c.setting): attempts}
	}
}

// times renders the figures.
func times(all []fault, figures map[string]figures) string {
	var b strings.Builder
	b.WriteString(timesFrom + `
As measured when this file was written, the longer of both settings. *Noticed*: from the fault to the last connection that began
and did not go by ` + "`on_failure`" + `; *back*: from its end (for a handler that was killed: from when the next one is ready) to the last one
that the handler did not carry. The bound is 500 ms, and 0 for a listener that is gone; the pace of the connections, one in
` + fmt.Sprint(pace) + ` to each kind, limits how well it can be told. *Suffered*: connections to what the handler carries, of those that
began in between, that did not come out in one of the usual ways.

| fault | noticed | back | suffered |
|---|---|---|---|
`)
	for _, f := range all {
		one, two := figures[f.name+"/"+onOpen], figures[f.name+"/"+onClosed]
		notice := "-"
		if f.falls {
			notice = max(one.notice, two.notice).Round(time.Millisecond).String()
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %d |\n", f.name, notice, max(one.back, two.back).Round(time.Millisecond), one.felt+two.felt)
	}
	return b.String()
}

// report holds docs/failure.md to what was observed, or writes it.
func (r *results) report(t *testing.T, all []fault) {
	t.Helper()
	text := render(all, func(c cell) tally { return r.cells[c] })
	if path := os.Getenv(envReport); path != "" {
		if err := os.WriteFile(path, []byte(text+times(all, r.figures)), 0o644); err != nil {
			t.Error(err)
		}
		return
	}
	compare(t, text)
}

// TestReport holds docs/failure.md to the table.
func TestReport(t *testing.T) {
	if os.Getenv(envReport) != "" {
		t.Skip("it is being written")
	}
	all := table()
	compare(t, render(all, wanted(all)))
}

func compare(t *testing.T, text string) {
	t.Helper()
	b, err := os.ReadFile(reportFile)
	if err != nil {
		t.Fatal(err)
	}
	have, _, found := strings.Cut(string(b), timesFrom)
	if !found {
		t.Errorf("%s tells no times: make failure", reportFile)
	}
	if have == text {
		return
	}
	is, want := strings.Split(have, "\n"), strings.Split(text, "\n")
	for n := range max(len(is), len(want)) {
		a, b := line(is, n), line(want, n)
		if a != b {
			t.Fatalf("%s is not what the table yields (make failure). Line %d is\n%s\nwant\n%s", reportFile, n+1, a, b)
		}
	}
}

func line(all []string, n int) string {
	if n < len(all) {
		return all[n]
	}
	return "(none)"
}
