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

Written by ` + "`tests/matrix`" + `; do not edit. A cell is what becomes of a connection that is made that way, with glibc and with
musl, in the modes adaptive, mirror and early (all the same, unless it says so). Each was made without Pillion first, and then the
application saw the same: the result of every call, the peer, its own address (and port, if bound), the options, and the bytes,
exactly, both ways. The flow record has the destination that it asked for, its cgroup and the bytes; every decision is counted,
and nothing is unaccounted for.

- relay: captured.
- pass: left alone, and on record, for this [reason](reasons.md).
- existing: left alone, and reported when Pillion starts, since it is older.
- not seen: the kernel runs no hook of ours, since the socket was not made in the scope. It is no connection of the scope's.
- an error: the kernel's own answer, with and without Pillion.
- open: it does not hold yet. ` + "`TestOpen`" + ` has what it should be.
- -: there is no such combination.

`

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
func (found table) render(corner string, rows, columns []string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "| %s | %s |\n", corner, strings.Join(columns, " | "))
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

// compare compares all with the document, or writes it.
func (found table) compare(t *testing.T) {
	t.Helper()
	var rows, columns []string
	for _, f := range families() {
		columns = append(columns, f.title)
	}
	for _, w := range ways() {
		rows = append(rows, w.title)
		for _, f := range families() {
			if slices.Contains(w.open, f.name) {
				found[[2]string{w.title, f.title}] = []string{"open"}
			}
		}
	}
	text := preface + found.render("way", rows, columns)
	t.Logf("\n%s", text)
	if *update {
		if err := os.WriteFile(golden, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if text != string(want) && !t.Failed() {
		t.Errorf("%s is not what was found: run this test with -update", golden)
	}
}
