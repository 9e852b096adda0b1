package admin

import (
	"net/url"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pillion-project/pillion/redirect/flow"
)

func TestFlowQueryRoundTrip(t *testing.T) {
	t.Parallel()
	for _, q := range []FlowQuery{
		{},
		{Live: true, Limit: 7, Path: flow.PathRelay, End: flow.ReasonDialRefused},
	} {
		got, err := parseFlowQuery(q.values())
		if err != nil || got != q {
			t.Errorf("%+v became %+v, %v", q, got, err)
		}
	}
	got, err := parseFlowQuery(url.Values{"live": {""}, "limit": {""}, "path": {""}, "end": {""}})
	if err != nil || got != (FlowQuery{}) {
		t.Errorf("empty: %+v, %v", got, err)
	}
}

func TestFlowQueryApply(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		q    FlowQuery
		want []uint64
	}{
		{FlowQuery{}, []uint64{1, 2, 3}},
		{FlowQuery{Live: true}, []uint64{2, 3, 1}},
		{FlowQuery{Limit: 2}, []uint64{2, 3}},
		{FlowQuery{Live: true, Limit: 1}, []uint64{1}},
		{FlowQuery{Path: flow.PathRelay}, []uint64{1, 3}},
		{FlowQuery{End: flow.ReasonReset}, []uint64{2, 3}},
		{FlowQuery{Path: flow.PathRelay, End: flow.ReasonReset, Limit: 9}, []uint64{3}},
		{FlowQuery{Path: flow.PathDeny}, nil},
	} {
		var got []uint64
		for _, r := range tt.q.Apply(records()) {
			got = append(got, r.Cookie)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%+v: %s", tt.q, diff)
		}
	}
}
