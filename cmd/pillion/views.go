package main

import (
	"cmp"
	"net/netip"
	"time"

	"github.com/pillion-project/pillion/loader"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream"
	"github.com/pillion-project/pillion/redirect/upstream/discover"
	"github.com/pillion-project/pillion/redirect/upstream/health/check"
	"github.com/pillion-project/pillion/telemetry/admin"
	"github.com/pillion-project/pillion/telemetry/metrics"
)

// knowledge is what the parts of an instance know of one service at one moment.
// What does not apply is nil.
type knowledge struct {
	// endpoints are those that hold: the static ones, or the last good ones of
	// the source.
	endpoints []discover.Endpoint
	// kernel is what the connect hook counts, handler what the handler does.
	kernel  []loader.EndpointState
	handler []upstream.EndpointState
	// departed is what the handler has of endpoints that were removed and still have
	// connections.
	departed []upstream.EndpointState
	// checks are the active ones, of the service's cluster.
	checks []check.Status

	// Of the last views, to be used again: of hundreds of services, what is made
	// anew for each is megabytes.
	all []endpointView
	at  map[netip.AddrPort]int
}

// endpointView is one endpoint, joined.
type endpointView struct {
	discover.Endpoint
	ejected, down, removed        bool
	live                          int64
	connects, failures, ejections uint64
	connectTime                   time.Duration
	last                          flow.Reason
	checkError                    string
	checksPassed, checksFailed    uint64
}

// views joins what is known, in the order of the endpoints; those that were
// removed and still have connections come last. Counts are sums: a service on
// relay may have connections on direct from when the handler was gone. Whether an
// endpoint is ejected says the one that picks on path. They are good until the next
// call.
func (k *knowledge) views(path flow.Path) []endpointView {
	if k.at == nil {
		k.at = make(map[netip.AddrPort]int, len(k.endpoints))
	}
	clear(k.at)
	all, at := k.all[:0], k.at
	defer func() { k.all = all }()
	for _, e := range k.endpoints {
		at[e.Addr] = len(all)
		all = append(all, endpointView{Endpoint: e})
	}
	// removed is the view of an endpoint that is none any more.
	removed := func(a netip.AddrPort) int {
		at[a] = len(all)
		all = append(all, endpointView{Endpoint: discover.Endpoint{Addr: a}, removed: true})
		return at[a]
	}
	for _, s := range k.handler {
		i, ok := at[s.Addr]
		if !ok && s.Live > 0 {
			i, ok = removed(s.Addr), true
		}
		if ok {
			all[i].addHandler(&s, path == flow.PathRelay)
		}
	}
	for _, s := range k.departed {
		if i, ok := at[s.Addr]; ok {
			all[i].live += s.Live // it is back; its counts began anew
		} else if s.Live > 0 {
			all[removed(s.Addr)].addHandler(&s, path == flow.PathRelay)
		}
	}
	for _, s := range k.kernel {
		i, ok := at[s.Addr]
		if !ok && s.Live > 0 {
			i, ok = removed(s.Addr), true
		}
		if ok {
			all[i].addKernel(&s, path == flow.PathDirect)
		}
	}
	for _, s := range k.checks {
		if i, ok := at[s.Addr]; ok && !all[i].removed {
			all[i].down = all[i].down || s.State == check.StateDown
			all[i].checkError = s.Err
			all[i].checksPassed, all[i].checksFailed = s.Passed, s.Failed
		}
	}
	return all
}

// addHandler adds what the handler knows. picks is true when it is the one that
// picks.
func (v *endpointView) addHandler(s *upstream.EndpointState, picks bool) {
	v.live += s.Live
	v.connects += s.Connects
	v.failures += s.Failures
	v.ejections += s.Ejections
	v.connectTime = s.ConnectTime
	v.down = v.down || s.Down
	if picks {
		v.ejected = s.Ejected
	}
	if picks || v.last == flow.ReasonNone {
		v.last = cmp.Or(s.LastReason, v.last)
	}
}

// addKernel adds what the connect hook knows, as addHandler does.
func (v *endpointView) addKernel(s *loader.EndpointState, picks bool) {
	v.live += int64(s.Live)
	v.connects += s.Connects
	v.failures += s.Failed
	v.ejections += uint64(s.Ejections)
	v.down = v.down || s.Down
	if picks {
		v.ejected = s.Ejected > 0
	}
	if picks || v.last == flow.ReasonNone {
		v.last = cmp.Or(s.Last, v.last)
	}
}

// status is the endpoint as listings have it; local is the instance's own zone.
func (v *endpointView) status(local string) admin.EndpointStatus {
	state := admin.StateOf(v.ejected, v.down)
	if v.removed {
		state = admin.EndpointRemoved
	}
	return admin.EndpointStatus{
		Address:    v.Addr.String(),
		Weight:     v.Weight,
		Zone:       v.Zone,
		Local:      v.Zone != "" && v.Zone == local,
		State:      state,
		Ejected:    v.ejected,
		Down:       v.down,
		Live:       v.live,
		Connects:   v.connects,
		Failures:   v.failures,
		LastReason: v.last,
		CheckError: v.checkError,

		ChecksPassed: v.checksPassed,
		ChecksFailed: v.checksFailed,
	}
}

// stats is the endpoint as metrics have it.
func (v *endpointView) stats(cluster string, path flow.Path) metrics.EndpointStats {
	return metrics.EndpointStats{
		Cluster:     cluster,
		Addr:        v.Addr,
		Weight:      v.Weight,
		Zone:        v.Zone,
		Path:        path,
		Ejected:     v.ejected,
		Down:        v.down,
		Live:        v.live,
		Connects:    v.connects,
		Failures:    v.failures,
		Ejections:   v.ejections,
		ConnectTime: v.connectTime,
	}
}

// checkStats sums the active checks, which are sorted by cluster.
func checkStats(all []check.Status) []metrics.CheckStats {
	var stats []metrics.CheckStats
	for _, s := range all {
		if n := len(stats); n == 0 || stats[n-1].Cluster != s.Cluster {
			stats = append(stats, metrics.CheckStats{Cluster: s.Cluster})
		}
		c := &stats[len(stats)-1]
		switch s.State {
		case check.StateUp:
			c.Up++
		case check.StateDown:
			c.Down++
		default:
			c.Unknown++
		}
		if s.Err != "" {
			c.Failing++
		}
	}
	return stats
}
