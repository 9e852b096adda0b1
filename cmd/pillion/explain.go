package main

import (
	"context"
	"errors"
	"net"
	"net/netip"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/admin"
)

// verdict is what the kernel side's code says to a connect that is only tried
// out.
type verdict struct {
	path   flow.Path
	reason flow.Reason
	// errno is the name of what connect(2) fails with, empty if it is let
	// through.
	errno string
	// pick is the endpoint, not valid if none was picked.
	pick netip.AddrPort
}

// explainer answers what happens to connections to a destination. All of its
// functions are called by several goroutines at once.
type explainer struct {
	// tryOut asks the kernel side's own code. source is not valid where the
	// kernel is to choose it.
	tryOut func(source netip.Addr, dst netip.AddrPort) (verdict, error)
	// config is the configuration that holds.
	config func() *config.Config
	// services are those of status.
	services func() []admin.ServiceStatus
	// lookUp resolves a host name as the application would: [net.Resolver]'s
	// LookupNetIP.
	lookUp func(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// explain implements the function of [admin.API].
func (e *explainer) explain(_ context.Context, _ admin.ExplainQuery) ([]admin.Explanation, error) {
	return nil, errors.New("explain: not built yet")
}

// explainer returns what answers for an instance.
func (i *instance) explainer() *explainer {
	return &explainer{
		tryOut:   i.tryOut,
		config:   i.control.inForce,
		services: i.control.serviceStatus,
		lookUp:   net.DefaultResolver.LookupNetIP,
	}
}

// tryOut asks the connect hook's own code.
func (i *instance) tryOut(source netip.Addr, dst netip.AddrPort) (verdict, error) {
	v, err := i.datapath.DryRun(source, dst)
	if err != nil {
		return verdict{}, err
	}
	return verdict{path: v.Path, reason: v.Reason, pick: v.Endpoint}, nil
}
