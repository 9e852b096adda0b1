package main

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/telemetry/metrics"
)

func TestSetStats(t *testing.T) {
	i := &instance{}
	failed := errors.New("full")
	for _, want := range []error{nil, failed, nil} {
		if err := i.sets.publish(func() error { return want }); !errors.Is(err, want) {
			t.Errorf("publish: %v, want %v", err, want)
		}
	}
	i.sets.ended.Add(3)
	c := &control{i: i, services: listingOf([]service{{set: &flow.Set{Endpoints: make([]flow.SetEndpoint, 5)}}, {}})}
	got := c.Sets()
	got.PublishTime = 0
	if diff := cmp.Diff(metrics.SetStats{Sets: 1, SetEndpoints: 5, Publishes: 2, Failures: 1, Ended: 3}, got); diff != "" {
		t.Errorf("want -, got +:\n%s", diff)
	}
}
