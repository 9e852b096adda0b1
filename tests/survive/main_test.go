package survive

import (
	"os"
	"testing"

	"github.com/pillion-project/pillion/tests/testutil"
)

func TestMain(m *testing.M) {
	testutil.Main(m, func() { os.RemoveAll(faultyDir()) })
}
