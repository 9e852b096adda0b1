package failure

import (
	"flag"
	"fmt"
	"os"
	"testing"

	"github.com/pillion-project/pillion/tests/testutil"
)

// sideBySide is how many faults are tried at once, each in a world of its own:
// most of the time they wait.
const sideBySide = "4"

func TestMain(m *testing.M) {
	if os.Getenv(envJump) != "" {
		fmt.Fprintln(os.Stderr, letIn(os.Args[1:]))
		os.Exit(1)
	}
	if tid := os.Getenv(envHold); tid != "" {
		holdMain(tid)
		return
	}
	if os.Getenv(envApp) != "" {
		appMain()
		return
	}
	flag.Parse()
	if err := flag.Set("test.parallel", sideBySide); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	testutil.Main(m)
}
