package admin

import (
	"cmp"
	"net/url"
	"slices"
	"strconv"

	"github.com/pillion-project/pillion/redirect/flow"
)

// FlowQuery says which flow records to list. The zero value lists every ended
// connection that is remembered.
type FlowQuery struct {
	// Live lists the open connections instead.
	Live bool
	// Limit keeps only the newest ones; 0 keeps all.
	Limit int
	// Path and End keep only those with this path and this end; PathNone and
	// ReasonNone keep all.
	Path flow.Path
	End  flow.Reason
}

// Apply returns the records that q asks for: open ones in the order of their
// start, ended ones as they come. It changes records.
func (q FlowQuery) Apply(records []flow.Record) []flow.Record {
	records = slices.DeleteFunc(records, func(r flow.Record) bool {
		return q.Path != flow.PathNone && r.Path != q.Path || q.End != flow.ReasonNone && r.End != q.End
	})
	if q.Live {
		slices.SortStableFunc(records, func(a, b flow.Record) int {
			return cmp.Or(a.Start.Compare(b.Start), cmp.Compare(a.Cookie, b.Cookie))
		})
	}
	if q.Limit > 0 && len(records) > q.Limit {
		records = records[len(records)-q.Limit:]
	}
	return records
}

// values is the inverse of parseFlowQuery.
func (q FlowQuery) values() url.Values {
	v := url.Values{}
	if q.Live {
		v.Set("live", "true")
	}
	if q.Limit != 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	if q.Path != flow.PathNone {
		v.Set("path", q.Path.String())
	}
	if q.End != flow.ReasonNone {
		v.Set("end", q.End.String())
	}
	return v
}

// parseFlowQuery reads the parameters of /v1/flows; an empty one counts as not
// given. Its errors are bad requests.
func parseFlowQuery(v url.Values) (q FlowQuery, err error) {
	if s := v.Get("live"); s != "" {
		if q.Live, err = strconv.ParseBool(s); err != nil {
			return q, badRequest("live %q: want true or false", s)
		}
	}
	if s := v.Get("limit"); s != "" {
		if q.Limit, err = strconv.Atoi(s); err != nil || q.Limit < 0 {
			return q, badRequest("limit %q: want a number from 0", s)
		}
	}
	if s := v.Get("path"); s != "" {
		if err := q.Path.UnmarshalText([]byte(s)); err != nil || q.Path == flow.PathNone {
			return q, badRequest("path %q: no such path", s)
		}
	}
	if s := v.Get("end"); s != "" {
		if err := q.End.UnmarshalText([]byte(s)); err != nil || q.End == flow.ReasonNone {
			return q, badRequest("end %q: no such reason", s)
		}
	}
	return q, nil
}
