package main

import "testing"

// TestTold: a refusal is in the log once for each content of the file that it is of,
// and again when the file is as it was after it had been another.
func TestTold(t *testing.T) {
	one, two := content{1}, content{2}
	var log told
	for n, tt := range []struct {
		of   content
		text string
		want bool
	}{
		{content{}, "no such file", true},
		{content{}, "no such file", false},
		{one, "a", true},
		{one, "b", true},
		{one, "a", false},
		{one, "b", false},
		{two, "a", true},
		{two, "a", false},
		{one, "a", true},
	} {
		if got := log.news(tt.of, tt.text); got != tt.want {
			t.Errorf("%d: %q is news: %v", n, tt.text, got)
		}
	}
}
