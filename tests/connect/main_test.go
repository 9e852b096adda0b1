package connect

import (
	"fmt"
	"os"
	"testing"

	"github.com/pillion-project/pillion/tests/testutil"
)

// envGoApp, when set, makes this binary an application that uses Go's dialer.
const envGoApp = "PILLION_TEST_GO_DIALER"

func TestMain(m *testing.M) {
	if os.Getenv(envGoApp) != "" {
		if err := goDialer(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	testutil.Main(m)
}
