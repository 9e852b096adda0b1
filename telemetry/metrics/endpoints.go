package metrics

import (
	"bufio"
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// endpoints writes the endpoints' counters as text, one after the other. There are
// ten thousand of them, ten values each: as the library's metrics they take 50 MB at
// each scrape.
type endpoints struct {
	source Endpoints
	buffer []byte
}

// endpointFamily is one value of every endpoint.
type endpointFamily struct {
	name, kind, help string
	value            func(*EndpointStats) float64
	// placed adds the labels path and zone.
	placed bool
}

func endpointFamilies() []endpointFamily {
	return []endpointFamily{
		{name: "pillion_endpoint_connect_seconds", kind: "gauge", help: "How long the last answered dial took.",
			value: func(s *EndpointStats) float64 { return s.ConnectTime.Seconds() }},
		{name: "pillion_endpoint_connections", kind: "gauge", help: "Connections that are open or being dialed. On direct, what its application has closed is not among them.",
			value: func(s *EndpointStats) float64 { return float64(s.Live) }},
		{name: "pillion_endpoint_connects_total", kind: "counter", help: "Dials that were answered.",
			value: func(s *EndpointStats) float64 { return float64(s.Connects) }},
		{name: "pillion_endpoint_down", kind: "gauge", help: "1 while a health check keeps the endpoint from being picked.",
			value: func(s *EndpointStats) float64 { return oneIf(s.Down) }},
		{name: "pillion_endpoint_ejected", kind: "gauge", help: "1 while its failures keep the endpoint from being picked.",
			value: func(s *EndpointStats) float64 { return oneIf(s.Ejected) }},
		{name: "pillion_endpoint_ejections_total", kind: "counter", help: "How often the endpoint was ejected.",
			value: func(s *EndpointStats) float64 { return float64(s.Ejections) }},
		{name: "pillion_endpoint_failures_total", kind: "counter", help: "Dials that failed.",
			value: func(s *EndpointStats) float64 { return float64(s.Failures) }},
		// Not labels of the others: those would begin anew when a service
		// changes its path.
		{name: "pillion_endpoint_info", kind: "gauge", placed: true,
			help:  "Always 1; the labels tell the endpoint's zone and the path of connections to it.",
			value: func(*EndpointStats) float64 { return 1 }},
		{name: "pillion_endpoint_left_out", kind: "gauge",
			help:  "1 if the connect hook cannot dial the endpoint, whose address is of the other family or on a link: it takes path: relay.",
			value: func(s *EndpointStats) float64 { return oneIf(s.LeftOut) }},
		{name: "pillion_endpoint_weight", kind: "gauge", help: "The endpoint's share, by the configuration or its source.",
			value: func(s *EndpointStats) float64 { return float64(s.Weight) }},
	}
}

// write reads the source and writes all that it tells.
func (e *endpoints) write(w *bufio.Writer) error {
	all := e.source.Endpoints()
	for i := range all {
		all[i].Cluster = valid(all[i].Cluster)
	}
	// Two of the same labels would spoil the whole scrape, and services that
	// share a cluster may list it twice.
	slices.SortStableFunc(all, func(a, b EndpointStats) int {
		return cmp.Or(strings.Compare(a.Cluster, b.Cluster), a.Addr.Compare(b.Addr))
	})
	all = slices.CompactFunc(all, func(a, b EndpointStats) bool { return a.Cluster == b.Cluster && a.Addr == b.Addr })
	if len(all) == 0 {
		return nil
	}
	for _, f := range endpointFamilies() {
		w.WriteString("# HELP " + f.name + " " + f.help + "\n# TYPE " + f.name + " " + f.kind + "\n")
		for i := range all {
			if err := e.line(w, &f, &all[i]); err != nil {
				return err
			}
		}
	}
	return nil
}

// line writes one value.
func (e *endpoints) line(w *bufio.Writer, f *endpointFamily, s *EndpointStats) error {
	b := append(e.buffer[:0], f.name...)
	b = append(b, `{cluster="`...)
	b = appendLabel(b, s.Cluster)
	b = append(b, `",endpoint="`...)
	b = appendAddr(b, s.Addr)
	if f.placed {
		b = append(b, `",path="`...)
		b = append(b, s.Path.String()...)
		b = append(b, `",zone="`...)
		b = appendLabel(b, s.Zone)
	}
	b = append(b, `"} `...)
	b = strconv.AppendFloat(b, f.value(s), 'g', -1, 64)
	e.buffer = append(b, '\n')
	_, err := w.Write(e.buffer)
	return err
}

// appendAddr appends an address as listings have it. That of an IPv6 endpoint may
// have a zone, which may be anything.
func appendAddr(b []byte, a netip.AddrPort) []byte {
	if a.Addr().Zone() != "" {
		return appendLabel(b, a.String())
	}
	return a.AppendTo(b)
}

// appendLabel appends a label's value, made fit for one.
func appendLabel(b []byte, value string) []byte {
	for _, r := range value {
		switch r {
		case '\\', '"':
			b = append(b, '\\', byte(r))
		case '\n':
			b = append(b, '\\', 'n')
		default: // what is no UTF-8 is U+FFFD already
			b = append(b, string(r)...)
		}
	}
	return b
}
