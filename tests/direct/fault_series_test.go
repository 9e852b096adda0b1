package direct

import (
	"bufio"
	"context"
	"strconv"
	"testing"

	"github.com/pillion-project/pillion/tests/rig"
)

// series returns the metrics of an instance, by name and labels as written.
func series(t testing.TB, i *rig.Instance) map[string]float64 {
	t.Helper()
	body, err := i.Metrics(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	all := map[string]float64{}
	lines := bufio.NewScanner(body)
	for lines.Scan() {
		text := lines.Text()
		at := len(text) - 1
		for at > 0 && text[at] != ' ' {
			at--
		}
		if n, err := strconv.ParseFloat(text[at+1:], 64); err == nil && at > 0 {
			all[text[:at]] = n
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return all
}
