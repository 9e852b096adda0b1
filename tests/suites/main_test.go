package suites

import (
	"os"
	"testing"

	"github.com/pillion-project/pillion/tests/testutil"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// long tells whether the suites run in full.
func long() bool { return os.Getenv("PILLION_SUITES") == "long" }

// amount is how much of something is run: the short form's or the long form's.
func amount(short, full int) int {
	if long() {
		return full
	}
	return short
}
