package l4_test

import (
	"runtime"
	"testing"

	"github.com/pillion-project/pillion/tests/testutil"
)

func TestMain(m *testing.M) {
	// A relay wants two processors more than it has workers.
	runtime.GOMAXPROCS(max(6, runtime.GOMAXPROCS(0)))
	testutil.Main(m)
}
