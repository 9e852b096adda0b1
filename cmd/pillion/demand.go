package main

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/discover"
	"github.com/pillion-project/pillion/redirect/upstream/discover/kube"
	"github.com/pillion-project/pillion/telemetry/admin"
)

// This file has the services that nobody lists, and that are found because the
// application connects to them.

// asked says that an application connects to what no service names.
func (s *sources) asked(dst netip.AddrPort) {
	if s.demand != nil {
		s.demand.Asked(dst)
	}
}

// pending tells whether a destination that asked was told of may be a service's in
// a moment.
func (s *sources) pending(dst netip.AddrPort) bool {
	return s.demand != nil && s.demand.Pending(dst)
}

// Record implements [events.Sink]. Of a connection on pass no handler tells, and the
// hooks only at its end.
func (s *sources) Record(r *flow.Record) {
	if r.Reason == flow.ReasonDefaultPass {
		s.asked(r.OrigDst)
	}
}

// lookEvery is how soon a connection on pass that does not end is seen.
const lookEvery = time.Second

// look asks for the destinations of open connections on pass until ctx is done. The
// hooks could tell of each when it begins; that would cost all of them, for the few
// that are to a service and outlive the next look.
func (s *sources) look(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	var last uint64
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		passed, err := s.i.datapath.Count(flow.ReasonDefaultPass)
		if err != nil || passed == last {
			continue // nobody has passed since
		}
		last = passed
		open, err := s.i.datapath.Connections()
		if err != nil {
			s.i.log.Error("cannot look which services are used", "error", err)
			continue
		}
		for i := range open {
			s.Record(&open[i])
		}
	}
}

// seek finds services until ctx is done.
func (s *sources) seek(ctx context.Context) {
	found := make(chan []kube.Service)
	s.parts.Go(func() {
		for all := range found {
			s.take(all)
		}
	})
	defer close(found)
	if err := s.demand.Run(ctx, found); err != nil {
		s.i.log.Error("services are not found on demand", "error", err)
	}
}

// take makes all the services that were found.
func (s *sources) take(all []kube.Service) {
	s.mu.Lock()
	s.dynamic = all
	s.mu.Unlock()
	s.changed()
}

// found returns the services that were found.
func (s *sources) found() []kube.Service {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dynamic
}

// finds tells whether a service of that name was found.
func (s *sources) finds(name string) bool {
	return slices.ContainsFunc(s.found(), func(f kube.Service) bool { return f.Name == name })
}

// wantOfFound is wantOf for a service that was found.
func wantOfFound(f *kube.Service) want {
	source := f.Source
	return want{
		kind: admin.SourceKubernetes, name: f.Name, of: f.Name + " " + f.Addr.String(),
		open: func() (discover.Source, error) { return source, nil },
	}
}

// found are the services that were found, and that the configuration does not list.
func (c *control) found(said *said) []service {
	dynamic := c.sources.found()
	if len(dynamic) == 0 {
		return nil
	}
	var all []service
	for _, f := range dynamic {
		if !f.Addr.IsValid() || said.lists(f.Name, f.Addr) {
			continue
		}
		v := config.NewService(f.Name, f.Addr)
		v.Discover = &config.Discover{Kubernetes: kubernetesService(f.Name)}
		if f.Affinity {
			v.Policy, v.Hash = flow.PolicyMaglev, flow.HashSource
		}
		s := c.serviceOf(said, &v)
		s.found = true
		all = append(all, s)
	}
	return all
}

// kubernetesService parts the name of a kube.Service.
func kubernetesService(text string) *config.KubernetesService {
	namespace, rest, _ := strings.Cut(text, "/")
	name, port, _ := strings.Cut(rest, ":")
	port, _, _ = strings.Cut(port, "/") // which of two addresses it is
	return &config.KubernetesService{Namespace: namespace, Name: name, Port: port}
}

// idle tells whether a service is nobody's yet: it was found, and its source has
// not told. Its connections go as those of what no service names, which wait.
func (s *service) idle() bool { return s.found && !s.known }
