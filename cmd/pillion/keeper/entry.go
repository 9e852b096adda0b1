//go:build linux && (amd64 || arm64)

package keeper

// entry is where the program begins if it is linked with -E. Go never calls it.
func entry()

// state is what entry leaves to the Go program, at offsets that the assembly knows.
// No Go code runs before, and none writes it.
var state struct {
	linked  uint64 // entry is the program's entry point
	memory  uint64 // the memfd
	page    *page  // its first page; nil: there is no keeper
	signals uint64 // what the keeper waits for
	mask    uint64 // what was blocked before
	status  uint64 // of the worker that ended last
	time    [2]uint64
	listing int64  // the descriptor of the directory when it was listed; negative: an error
	listed  uint64 // how much of listed there is
}

// listed has room for half a million descriptors, and costs what is used of it.
var listed [16 << 20]byte

// Texts of the assembly.
var (
	memoryName = "pillion\x00"
	lastWords  = "pillion: keeper: ten workers in a row died too soon: giving up\n"
	noKeeper   = "pillion: keeper: no memory to share with workers\n"
	directory  = "/proc/self/fd\x00"
)

func linked() bool { return state.linked != 0 }

func under() (memory int, p *page) { return int(state.memory), state.page }

// listing is what was open when this process began, as getdents64(2) tells it, and the
// descriptor that told it.
func listing() (entries []byte, fd int) { return listed[:state.listed], int(state.listing) }
