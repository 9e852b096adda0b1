package config

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// The text of an error is cut short, and what it is made of is not: each problem has its
// place.
func TestProblems(t *testing.T) {
	const n = maxProblems + 7
	for name, line := range map[string]string{
		"values": "k%d: 1\n",
		"tokens": "k%d: &a 1\n",
	} {
		var text strings.Builder
		for i := range n {
			fmt.Fprintf(&text, line, i)
		}
		_, err := Parse("p.yaml", []byte(text.String()))
		checkPlaces(t, name, Problems(err), n)
		if lines := strings.Split(err.Error(), "\n"); len(lines) != maxProblems+1 || lines[maxProblems] != "and 7 more problems" {
			t.Errorf("%s: %d lines, the last is %q", name, len(lines), lines[len(lines)-1])
		}
		// Of two files, too.
		if all := Problems(errors.Join(err, err)); len(all) != 2*n {
			t.Errorf("%s: %d problems of two, want %d", name, len(all), 2*n)
		}
		// A process keeps fewer.
		last := Default()
		_, _, err = ParsePartial("p.yaml", []byte(text.String()), &last, nil)
		all := Problems(err)
		checkPlaces(t, name, all, maxProblems)
		if i := slices.IndexFunc(all, func(p Problem) bool { return strings.HasSuffix(p.Text, " (and 7 more problems)") }); i != maxProblems-1 {
			t.Errorf("%s: problem %d tells of more, want the last: %q", name, i, all[len(all)-1].Text)
		}
	}
	if err := (joined{}).err(); err != nil {
		t.Errorf("no problem: %v", err)
	}
}

func checkPlaces(t *testing.T, name string, all []Problem, want int) {
	t.Helper()
	if len(all) != want {
		t.Fatalf("%s: %d problems, want %d", name, len(all), want)
	}
	for i, p := range all {
		if p.File != "p.yaml" || p.Line != i+1 || p.Column < 1 {
			t.Errorf("%s: problem %d: %+v", name, i, p)
		}
	}
}
