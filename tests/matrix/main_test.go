package matrix

import (
	"fmt"
	"os"
	"testing"

	"github.com/pillion-project/pillion/tests/testutil"
)

func TestMain(m *testing.M) {
	if names := os.Getenv(envNames); names != "" {
		if err := goApp(names, os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	testutil.Main(m)
}
