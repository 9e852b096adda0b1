package traps

import (
	"fmt"
	"os"
	"testing"

	"github.com/pillion-project/pillion/tests/testutil"
)

// The test binary is also what runs as an application: its first argument says
// as what.
const (
	roleSockets = "sockets" // makes sockets for the test
	roleApp     = "app"     // dials once, and says what it heard
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		roles := map[string]func([]string) error{roleSockets: makeSockets, roleApp: beApp}
		if role, ok := roles[os.Args[1]]; ok {
			if err := role(os.Args[2:]); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		}
	}
	testutil.Main(m)
}
