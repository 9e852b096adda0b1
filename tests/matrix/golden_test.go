package matrix

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write docs/matrix.md")

const golden = "../../docs/matrix.md"

const preface = `# Every way to connect

Written by ` + "`tests/matrix`" + `; do not edit. A cell is what becomes of a connection that is made that way, in the modes adaptive,
mirror and early (the same in all, unless it says so), and on path direct, where every destination is a service whose endpoint has
another address and another port. Each was made without Pillion first, and then the application saw the same:
the result of every call, the peer, its own address (and port, if bound), the options, and the bytes, exactly, both ways. The flow
record has the destination that it asked for, its cgroup and the bytes; every decision is counted, and nothing is unaccounted for.

- relay: captured.
- direct: captured, and sent to the endpoint, which the record names. The peer that the application is shown is what it asked for, its
  own address is what the endpoint saw, and at the end the endpoint's count of open connections is 0.
- pass: left alone, and on record, for this [reason](reasons.md).
- existing: left alone, and reported when Pillion starts, since it is older.
- not seen: the kernel runs no hook of ours, since the socket was not made in the scope. It is no connection of the scope's.
- an error: the kernel's own answer, with and without Pillion.
- -: there is no such combination.

`

// A section is its heading and what stands before its table.
const (
	waySection = `## Sockets

One program in C, with glibc and with musl.

`
	directSection = `## Sockets, on direct

`
	runtimeSection = `## Runtimes

A name has an address of IPv6 and one of IPv4. With the first one refused or silent, in the mode early a connect to it succeeds all
the same, so that column is of adaptive and mirror.

`
	directRuntimeSection = `## Runtimes, on direct

With IPv6 without a route, refused or silent, so is the service's endpoint.

`
)

// table is what was found, by the row and the column.
type table map[[2]string][]string

// note adds what became of a connection, if it is new.
func (found table) note(c conn, what string) {
	key := [2]string{c.way.title, c.family.title}
	if !slices.Contains(found[key], what) {
		found[key] = append(found[key], what)
	}
}

// render writes the table of some rows and columns.
func (found table) render(rows, columns []string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "| | %s |\n", strings.Join(columns, " | "))
	fmt.Fprintf(&b, "|%s\n", strings.Repeat("---|", len(columns)+1))
	for _, row := range rows {
		fmt.Fprintf(&b, "| %s |", row)
		for _, column := range columns {
			what := found[[2]string{row, column}]
			if what == nil {
				what = []string{none}
			}
			fmt.Fprintf(&b, " %s |", strings.Join(what, ", then "))
		}
		fmt.Fprintln(&b)
	}
	return b.String()
}

// compare compares a section with the document, or writes it.
func (found table) compare(t *testing.T, section string, rows, columns []string) {
	t.Helper()
	text := section + found.render(rows, columns)
	t.Logf("\n%s", text)
	b, err := os.ReadFile(golden)
	if err != nil && !*update {
		t.Fatal(err)
	}
	all := map[string]string{section: text}
	sections := []string{waySection, directSection, runtimeSection, directRuntimeSection}
	for _, s := range sections {
		heading, _, _ := strings.Cut(s, "\n")
		_, rest, _ := strings.Cut(string(b), heading+"\n")
		rest, _, _ = strings.Cut(rest, "\n## ")
		if s != section {
			all[s] = heading + "\n" + strings.TrimRight(rest, "\n") + "\n"
		}
	}
	want := preface
	for n, s := range sections {
		if n > 0 {
			want += "\n"
		}
		want += all[s]
	}
	if *update {
		if err := os.WriteFile(golden, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if string(b) != want && !t.Failed() {
		t.Errorf("%s is not what was found: run this test with -update", golden)
	}
}
