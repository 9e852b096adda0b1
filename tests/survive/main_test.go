package survive

import (
	"os"
	"testing"

	"github.com/pillion-project/pillion/tests/rig/app"
	"github.com/pillion-project/pillion/tests/testutil"
)

func TestMain(m *testing.M) {
	app.Main()
	testutil.Main(m, func() { os.RemoveAll(faultyDir()) })
}
