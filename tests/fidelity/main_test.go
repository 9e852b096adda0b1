package fidelity

import (
	"flag"
	"testing"

	"github.com/pillion-project/pillion/tests/testutil"
)

// atOnce is how many tests run side by side: they wait most of the time.
const atOnce = "4"

func TestMain(m *testing.M) {
	flag.Parse()
	if err := flag.Set("test.parallel", atOnce); err != nil {
		panic(err)
	}
	testutil.Main(m)
}
