package traps

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/peers"
)

const scoreFile = "../../docs/traps.md"

const head = `# The traps

Written by ` + "`make traps`" + ` from the table in tests/traps: do not edit.

What broke earlier systems of this kind, each a real thread, as a test. The same test runs against Pillion and
against proxies that a user could take instead, with what they document as best for carrying TCP (tests/peers): time-outs of
an hour, also half-closed; splicing; keep-alive; Envoy passes resets on. Envoy stands behind an nftables REDIRECT of the
application's cgroup and goes on to the original destination, as in a mesh; HAProxy and nginx have a port for each destination, which
the application dials.

*pass* and *fail* are what the test says; *n/a*: the system cannot meet it, and why; *open*: Pillion has not got there yet, and
nobody was tested. A *fail* is no bug in every case: some traps come with any proxy that the kernel does not help.
`

// thread renders a link.
func thread(l string) string {
	if strings.HasPrefix(l, "https://") {
		return fmt.Sprintf("[%s](%s)", strings.TrimSuffix(strings.TrimPrefix(l, "https://"), "/"), l)
	}
	w := strings.Split(l, "/")
	return fmt.Sprintf("[%s/%s#%s](https://github.com/%s)", w[0], w[1], w[3], l)
}

func links(tr trap) string {
	var all []string
	for _, l := range tr.links {
		all = append(all, thread(l))
	}
	return strings.Join(all, ", ")
}

func (v verdict) cell() string {
	if v == fail {
		return "**fail**"
	}
	return string(v)
}

// opening is the part of a row that needs no peer.
func opening(tr trap, r result) string {
	return fmt.Sprintf("| [%d](#%d) | %s | %s |", tr.number, tr.number, tr.title, r.verdict.cell())
}

// body is the part of a trap's section that needs no peer.
func body(tr trap) string {
	var b strings.Builder
	fmt.Fprintf(&b, "\n### %d\n\n%s.", tr.number, tr.title)
	if tr.how != "" {
		fmt.Fprintf(&b, " %s", tr.how)
	}
	if len(tr.links) > 0 {
		fmt.Fprintf(&b, "\n\nSeen in: %s.", links(tr))
	}
	return b.String() + "\n"
}

// render writes the score.
func render(all []trap, score map[int]map[system]result) (string, error) {
	var b strings.Builder
	b.WriteString(head)
	fmt.Fprint(&b, "\n| trap | | pillion |")
	for _, p := range systems[1:] {
		version, err := peers.Version(string(p))
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, " %s %s |", p, version)
	}
	b.WriteString("\n|---|---|---|---|---|---|\n")
	sums := map[system]map[verdict]int{}
	for _, tr := range all {
		b.WriteString(opening(tr, score[tr.number][pillion]))
		for _, sys := range systems {
			v := score[tr.number][sys].verdict
			if v == "" {
				return "", fmt.Errorf("trap %d has no verdict for %s", tr.number, sys)
			}
			if sums[sys] == nil {
				sums[sys] = map[verdict]int{}
			}
			sums[sys][v]++
			if sys != pillion {
				fmt.Fprintf(&b, " %s |", v.cell())
			}
		}
		b.WriteString("\n")
	}
	for _, v := range []verdict{pass, fail, none, open} {
		fmt.Fprintf(&b, "| | *%s* |", v)
		for _, sys := range systems {
			fmt.Fprintf(&b, " %d |", sums[sys][v])
		}
		b.WriteString("\n")
	}
	b.WriteString("\n## What each is, and why not\n")
	for _, tr := range all {
		b.WriteString(body(tr))
		b.WriteString(reasons(score[tr.number]))
	}
	return b.String(), nil
}

// reasons says why a trap was not passed, once for all who have the same.
func reasons(results map[system]result) string {
	if open := results[pillion]; open.verdict == "open" {
		return fmt.Sprintf("\n- open: %s\n", open.why)
	}
	var lines []string
	for n, sys := range systems {
		r := results[sys]
		if r.why == "" || slices.ContainsFunc(systems[:n], func(s system) bool { return results[s] == r }) {
			continue
		}
		var same []string
		for _, other := range systems[n:] {
			if results[other] == r {
				same = append(same, string(other))
			}
		}
		lines = append(lines, fmt.Sprintf("- %s: %s: %s\n", strings.Join(same, ", "), r.verdict.cell(), oneLine(r.why)))
	}
	if len(lines) == 0 {
		return ""
	}
	return "\n" + strings.Join(lines, "")
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// TestTable wants every trap once, with a thread, and with either a test or the
// reason why there is none.
func TestTable(t *testing.T) {
	want := 1
	for _, tr := range traps() {
		if tr.number != want {
			t.Fatalf("trap %d comes where %d should", tr.number, want)
		}
		want++
		if tr.title == "" || (tr.run == nil) != (tr.open != "") || (tr.how == "") != (tr.open != "") {
			t.Errorf("trap %d: a title, and a test that is described or a reason", tr.number)
		}
	}
	if want != 51 {
		t.Errorf("%d traps, want 50", want-1)
	}
}

// TestScore holds docs/traps.md to the table, but for the others' columns:
// Pillion passes, or the trap is open or not one for it.
func TestScore(t *testing.T) {
	text, err := os.ReadFile(scoreFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(text, []byte(head)) {
		t.Errorf("%s begins otherwise than this table would: make traps", scoreFile)
	}
	for _, tr := range traps() {
		r := result{verdict: pass}
		if tr.open != "" {
			r.verdict = open
		}
		for _, part := range []string{opening(tr, r), body(tr)} {
			if !bytes.Contains(text, []byte(part)) {
				t.Errorf("%s lacks, or has otherwise (make traps): %s", scoreFile, part)
			}
		}
	}
}
