package origdst

import (
	"fmt"
	"net/netip"

	"github.com/pillion-project/pillion/redirect/flow"
)

// ErrNotOurs means that no live entry names a connection: nobody in scope
// opened it, or it is over already.
var ErrNotOurs = flow.NewError(flow.ReasonNotOurs, "the kernel side does not know the connection")

// Live is what the kernel side keeps of each connection to a slot.
type Live interface {
	// Live returns what is kept under the application's address and the slot
	// with the original port. It returns false when there is nothing. It is
	// called on the handler's threads and must not block.
	Live(source, slot netip.AddrPort) (flow.Downstream, bool)
	// Open tells whether the application's socket of such a connection is open. It
	// may be called and must not block as Live.
	Open(source, slot netip.AddrPort) bool
}

// Resolver resolves accepted connections.
type Resolver struct{ live Live }

// NewResolver returns a resolver that asks live.
func NewResolver(live Live) *Resolver { return &Resolver{live: live} }

// Resolve tells about the connection that was accepted with this local and
// remote address. It fails with [ErrNotOurs].
func (r *Resolver) Resolve(local, remote netip.AddrPort) (flow.Downstream, error) {
	d, ok := r.live.Live(remote, local)
	if !ok {
		return flow.Downstream{}, fmt.Errorf("resolve %s from %s: %w", local, remote, ErrNotOurs)
	}
	return d, nil
}

// Present tells whether the application's socket of the connection that was accepted
// with this local and remote address is open.
func (r *Resolver) Present(local, remote netip.AddrPort) bool { return r.live.Open(remote, local) }
