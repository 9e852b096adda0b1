package kube

import (
	"context"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"time"
)

// TestRecall: services that were in use before are in the list while the API server is
// away; when it is back it says what they are, and they are dropped like any.
func TestRecall(t *testing.T) {
	t.Parallel()
	k := startKube(t)
	var away atomic.Bool
	c := k.client(t, func(o *Options) {
		o.Exempt = func(int) error {
			if away.Load() {
				return os.ErrPermission
			}
			return nil
		}
	})
	c.settle = 50 * time.Millisecond
	away.Store(true)
	k.put("services", "default", "web", "", `{"spec":{"clusterIP":"10.96.0.10","clusterIPs":["10.96.0.10","fd00::10"],"ports":[{"name":"http","port":80}]}}`)
	k.put("endpointslices", "default", "web-1", "web", sliceOf("IPv4", httpPort, ep("10.0.0.1")))
	var now atomic.Int64
	d := &demanded{t: t, Demand: c.Demand(DemandOptions{Idle: 40 * time.Millisecond, Now: func() time.Time { return time.Unix(now.Load(), 0) }})}
	of := func(name, addr string) Service {
		return Service{Name: name, Addr: netip.MustParseAddrPort(addr), Affinity: true}
	}
	got := d.Recall([]Service{
		of("default/web:80", "10.96.0.10:80"), of("default/web:80/ipv6", "[fd00::10]:80"), of("default/gone:80", "10.96.0.11:80"),
		of("no service", "10.96.0.12:80"), {Name: "default/headless:80"},
	})
	if len(got) != 3 || got[0].Source == nil || got[0].Host != "web.default.svc.cluster.local" || !got[0].Affinity {
		t.Fatalf("recalled %+v", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	out, ended := make(chan []Service), make(chan error, 2)
	go func() { ended <- d.Run(ctx, out) }()
	go func() { d.collect(ctx, out); ended <- nil }()
	defer func() {
		cancel()
		for range 2 {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
	}()
	d.waitFor("default/gone:80=10.96.0.11:80", "default/web:80=10.96.0.10:80", "default/web:80/ipv6=[fd00::10]:80")
	web := listen(t, got[0].Source)
	web.waitErr("permission denied")
	away.Store(false)
	web.waitFor("10.0.0.1:8080")
	d.waitFor("default/web:80=10.96.0.10:80", "default/web:80/ipv6=[fd00::10]:80")
	eventually(t, "what the server says of it", func() bool { return !d.at(0).Affinity })
	now.Store(61)
	d.waitFor()
}
