package config

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
)

// Changes is what differs between two configurations, and what a reload from the
// one to the other does.
type Changes struct {
	Services []ServiceChange `json:"services,omitempty"`
	// Settings are outside the services.
	Settings []Change `json:"settings,omitempty"`
}

// Change is one value that differs, in the form that it has in the file. Old or
// New is empty where it is not said. Of a list they have only what is in one of
// the two.
type Change struct {
	Key string `json:"key"`
	Old string `json:"old,omitempty"`
	New string `json:"new,omitempty"`
	// Restart means that a reload does not change it.
	Restart bool `json:"restart,omitempty"`
}

// ServiceChange is a service that differs.
type ServiceChange struct {
	Name string     `json:"name"`
	Kind ChangeKind `json:"change"`
	// Fields are those that differ, with what the service takes from outside of
	// it: its path is never auto.
	Fields []Change `json:"fields,omitempty"`
	// Added and Removed are the endpoints that only the new or the old one
	// lists. Those that a source finds are in neither.
	Added   []netip.AddrPort `json:"endpoints_added,omitempty"`
	Removed []netip.AddrPort `json:"endpoints_removed,omitempty"`
	// SourceRemoved is true if the service has no source any more, or is gone: then
	// all that it found goes, but for what is in Added.
	SourceRemoved bool `json:"source_removed,omitempty"`
	// OnRemove is what becomes of connections to the endpoints removed, and
	// After when, for OnRemoveClose. Empty if none was removed.
	OnRemove OnRemove `json:"on_remove,omitempty"`
	After    string   `json:"after,omitempty"`
}

// ChangeKind says what happens to a service.
type ChangeKind string

// The values of ChangeKind.
const (
	ServiceAdded   ChangeKind = "added"
	ServiceRemoved ChangeKind = "removed"
	ServiceChanged ChangeKind = "changed"
)

// Empty reports whether nothing differs.
func (c Changes) Empty() bool { return len(c.Services) == 0 && len(c.Settings) == 0 }

// Restart reports whether there is a change that a reload does not make.
func (c Changes) Restart() bool {
	return slices.ContainsFunc(c.Settings, func(s Change) bool { return s.Restart })
}

// Fate says what becomes of connections to the endpoints removed.
func (s ServiceChange) Fate() string {
	switch s.OnRemove {
	case OnRemoveClose:
		return "are closed after " + s.After
	case OnRemoveReset:
		return "are reset"
	default:
		return "live on"
	}
}

// startOnly are the settings that size or open something at the start.
var startOnly = []string{
	"existing", "survive", "relay.workers", "limits.connections", "limits.connections_per_container", "flow_log", "metrics", "probes",
	"kubernetes.on_demand", "kubernetes.server", "kubernetes.token_file", "kubernetes.ca_file", "kubernetes.kubeconfig", "kubernetes.idle",
}

// NeedsRestart reports whether a setting is read at the start only, by its path,
// such as relay.workers.
func NeedsRestart(path string) bool { return slices.Contains(startOnly, path) }

// Diff tells what differs from old to c. A service is the one of the same name,
// or else the one of the same address.
func (c *Config) Diff(old *Config) Changes {
	var d Changes
	d.Settings = compare(flatten(old.settings()), flatten(c.settings()))
	for i := range d.Settings {
		d.Settings[i].Restart = NeedsRestart(d.Settings[i].Key)
	}
	m := &merge{draft: &draft{config: *c}, last: old, problems: make([][]problem, len(c.Services))}
	m.match()
	for i := range c.Services {
		s := c.Effective(&c.Services[i])
		var change ServiceChange
		if was := m.was[i]; was >= 0 {
			before := old.Effective(&old.Services[was])
			change = diffService(&before, &s)
			change.Fields = withoutImplied(change.Fields, &old.Services[was], &c.Services[i])
		} else {
			change = diffService(&Service{}, &s)
			change.Kind = ServiceAdded
		}
		if change.Kind != "" {
			d.Services = append(d.Services, change)
		}
	}
	for _, was := range m.gone {
		before := old.Effective(&old.Services[was])
		change := diffService(&before, &Service{})
		change.Name, change.Kind = before.Name, ServiceRemoved
		d.Services = append(d.Services, change)
	}
	return d
}

// diffService compares a service with what it becomes; the zero value is none,
// whose fields are of no interest.
func diffService(old, s *Service) ServiceChange {
	d := ServiceChange{Name: s.Name}
	before, after := addresses(old.Endpoints), addresses(s.Endpoints)
	// A source may find them all again.
	if s.Discover == nil {
		d.Removed = without(before, after)
	}
	d.Added = without(after, before)
	d.SourceRemoved = old.Discover != nil && s.Discover == nil
	if len(d.Removed) > 0 || d.SourceRemoved {
		// A service that is gone cannot say what is to become of its connections.
		by := s
		if s.Name == "" {
			by = old
		}
		d.OnRemove = by.OnRemove
		if by.OnRemove == OnRemoveClose {
			d.After = by.RemoveAfter.String()
		}
	}
	if old.Name != "" && s.Name != "" {
		// What is in one only is told as added or removed.
		both := without(after, without(after, before))
		d.Fields = compare(fieldsOf(old, both), fieldsOf(s, both))
	}
	if len(d.Fields) > 0 || len(d.Removed) > 0 || len(d.Added) > 0 {
		d.Kind = ServiceChanged
	}
	return d
}

// ofRelay are the fields that only services on relay have, which take them from
// outside where they say nothing.
var ofRelay = []string{"attempts", "idle_timeout", "max_lifetime", "connect"}

// withoutImplied leaves out what comes and goes with the path: neither the old service
// nor the new one says it.
func withoutImplied(fields []Change, old, s *Service) []Change {
	if !slices.ContainsFunc(fields, func(c Change) bool { return c.Key == "path" }) {
		return fields
	}
	before, after := byKey(flatten(old.object())), byKey(flatten(s.object()))
	return slices.DeleteFunc(fields, func(c Change) bool {
		_, was := before[c.Key]
		_, is := after[c.Key]
		return slices.Contains(ofRelay, c.Key) && (c.Old == "" || c.New == "") && !was && !is
	})
}

// fieldsOf returns the values of a service, and of its endpoints those that are
// among some.
func fieldsOf(s *Service, some []netip.AddrPort) []value {
	rest := *s
	rest.Endpoints = nil
	fields := flatten(rest.object())
	for _, e := range s.Endpoints {
		if _, in := slices.BinarySearchFunc(some, unmap(e.Addr), netip.AddrPort.Compare); !in {
			continue
		}
		key := "endpoints[" + unmap(e.Addr).String() + "]."
		fields = append(fields, value{key: key + "weight", text: fmt.Sprint(e.Weight)})
		if e.Zone != "" {
			fields = append(fields, value{key: key + "zone", text: e.Zone})
		}
	}
	return fields
}

func addresses(endpoints []Endpoint) []netip.AddrPort {
	var all []netip.AddrPort
	for _, e := range endpoints {
		all = append(all, unmap(e.Addr))
	}
	slices.SortFunc(all, netip.AddrPort.Compare)
	return all
}

// without returns what is in a and not in b, both sorted.
func without(a, b []netip.AddrPort) []netip.AddrPort {
	return slices.DeleteFunc(slices.Clone(a), func(addr netip.AddrPort) bool {
		_, found := slices.BinarySearchFunc(b, addr, netip.AddrPort.Compare)
		return found
	})
}

// value is a scalar by its path, or a list, whose items then are there in place
// of text.
type value struct {
	key, text string
	items     []string
}

// flatten returns all values of an object, in its order.
func flatten(o object) []value {
	var all []value
	for _, m := range o {
		switch v := m.value.(type) {
		case object:
			if len(v) == 0 {
				all = append(all, value{key: m.key, text: "{}"})
			}
			for _, inner := range flatten(v) {
				inner.key = m.key + "." + inner.key
				all = append(all, inner)
			}
		case []any:
			list := value{key: m.key}
			for _, item := range v {
				list.items = append(list.items, fmt.Sprint(item))
			}
			all = append(all, list)
		default:
			all = append(all, value{key: m.key, text: fmt.Sprint(v)})
		}
	}
	return all
}

// compare returns what differs, in the order of the new values and then of those
// that are only in old.
func compare(old, new []value) []Change {
	before, after := byKey(old), byKey(new)
	var all []Change
	add := func(key string) {
		a, b := before[key], after[key]
		c := Change{Key: key, Old: a.text, New: b.text}
		if a.items != nil || b.items != nil {
			// Of rules the order says nothing.
			c.Old, c.New = lists(a.items, b.items, key != "deny" && key != "exclude")
		}
		if c.Old != c.New {
			all = append(all, c)
		}
	}
	for _, v := range new {
		add(v.key)
	}
	for _, v := range old {
		if _, both := after[v.key]; !both {
			add(v.key)
		}
	}
	return all
}

func byKey(values []value) map[string]value {
	all := make(map[string]value, len(values))
	for _, v := range values {
		all[v.key] = v
	}
	return all
}

// lists returns what is only in one and only in the other, or both whole if the
// order is all that differs and means something.
func lists(old, new []string, ordered bool) (string, string) {
	text := func(items []string) string {
		if len(items) == 0 {
			return ""
		}
		quoted, err := json.Marshal(items)
		if err != nil {
			return err.Error()
		}
		return string(quoted)
	}
	only := func(a, b []string) []string {
		in := make(map[string]bool, len(b))
		for _, s := range b {
			in[s] = true
		}
		return slices.DeleteFunc(slices.Clone(a), func(s string) bool { return in[s] })
	}
	left, right := only(old, new), only(new, old)
	if ordered && len(left)+len(right) == 0 {
		left, right = old, new
	}
	return text(left), text(right)
}
