package handler

import (
	"net/netip"
	"testing"
	"time"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/l4"
	"github.com/pillion-project/pillion/redirect/route"
	"github.com/pillion-project/pillion/redirect/upstream"
)

// Connections that were carried come to what their service is now, as far as it is
// there; with all they count for in any case.
func TestPlacement(t *testing.T) {
	var (
		one, other = netip.MustParseAddrPort("10.0.0.1:80"), netip.MustParseAddrPort("10.0.0.2:80")
		stays      = netip.MustParseAddrPort("192.0.2.1:80")
		gone       = netip.MustParseAddrPort("192.0.2.2:80")
	)
	snapshot, err := upstream.Build(nil, []upstream.ClusterSpec{
		{Name: "one", Endpoints: []upstream.EndpointSpec{{Addr: stays, Weight: 1}}},
	}, upstream.Options{})
	if err != nil {
		t.Fatal(err)
	}
	common := flow.Limits{DialTimeout: time.Second, DialBudget: time.Second, Attempts: 2}
	own := flow.Limits{DialTimeout: time.Second, DialBudget: time.Second, Attempts: 5}
	table, err := route.NewTable([]route.Service{
		{Name: "one", Addr: one, Cluster: snapshot.Cluster("one"), Terms: flow.Terms{Limits: own}},
	}, common)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		conn     l4.Carried
		same     bool   // it is the table's cluster
		cluster  string // otherwise of this name, or none
		service  string
		attempts int
	}{
		"as it was":         {l4.Carried{Service: "one", Cluster: "one", Endpoint: stays}, true, "one", "one", 5},
		"nothing dialed":    {l4.Carried{Service: "one", Cluster: "one"}, true, "one", "one", 5},
		"endpoint gone":     {l4.Carried{Service: "one", Cluster: "one", Endpoint: gone, Tried: []netip.AddrPort{stays, gone}}, false, "one", "one", 5},
		"another service":   {l4.Carried{Service: "was", Cluster: "was", Endpoint: gone}, false, "was", "was", 2},
		"service gone":      {l4.Carried{Service: "two", Cluster: "two", Endpoint: gone, Downstream: flow.Downstream{OrigDst: flow.OrigDst{AddrPort: other}}}, false, "two", "two", 2},
		"nobody's, and now": {l4.Carried{}, false, "", "", 2},
	} {
		t.Run(name, func(t *testing.T) {
			if !tt.conn.Downstream.OrigDst.IsValid() {
				tt.conn.Downstream.OrigDst.AddrPort = one
			}
			tt.conn.Downstream.Cookie = 7
			p, err := newPlacement(table, &l4.Given{Conns: []l4.Carried{tt.conn}})
			if err != nil {
				t.Fatal(err)
			}
			got := p.target(&tt.conn)
			if got.Downstream != tt.conn.Downstream || got.Terms.Service != tt.service || got.Terms.Attempts != tt.attempts {
				t.Errorf("target %+v, terms %+v", got, *got.Terms)
			}
			if (got.Cluster == snapshot.Cluster("one")) != tt.same {
				t.Errorf("the table's cluster: %v, want %v", !tt.same, tt.same)
			}
			if tt.cluster == "" {
				if got.Cluster != nil {
					t.Errorf("cluster %s, want none", got.Cluster.Name)
				}
				return
			}
			if got.Cluster == nil || got.Cluster.Name != tt.cluster {
				t.Fatalf("cluster %+v, want %s", got.Cluster, tt.cluster)
			}
			if tt.conn.Endpoint.IsValid() {
				has := false
				for _, e := range got.Cluster.Endpoints {
					has = has || e.Addr == tt.conn.Endpoint
				}
				if !has {
					t.Errorf("cluster %s has no %s", tt.cluster, tt.conn.Endpoint)
				}
			}
		})
	}
}
