package config

import (
	"cmp"
	"fmt"
	"github.com/pillion-project/pillion/redirect/upstream/discover/spelling"
	"net/netip"
	"slices"
	"strings"
)

// Refused is a part of a configuration that was not taken.
type Refused struct {
	// Name is the service's, as far as it could be read, or that of the section
	// kubernetes.
	Name string `json:"name"`
	// Source is true if it is a source: only where the service's endpoints come
	// from was refused and the rest of it was taken, or it is that section.
	Source bool `json:"source,omitempty"`
	// Where is the place of its first problem: pillion.yaml:12:5.
	Where string `json:"where"`
	// Text is all its problems, one a line, each with its place.
	Text string `json:"text"`
	// Kept are the names of the services that stay as they were on its account,
	// which is its own, the one that it had before, or all that it might be the
	// new state of. Empty: there was nothing to keep, and it is left out.
	Kept []string `json:"kept,omitempty"`
}

// LoadPartial reads the configuration in the file at path for a process that has
// one, last. Each service and each source is taken or refused by itself, and one
// that is refused is in the configuration as it was in last. An error, as of
// [Load], means that nothing was taken: it is not YAML, there are problems outside
// the services and the section kubernetes, or it is empty and last is not.
//
// A service is the one of the same name in last, or else the one of the same
// address; those that flags said are nobody's. What the file no longer has is gone,
// unless the file has a service whose name or address cannot be read: that might be
// any of those. A service that is right but claims the name or address of one that
// stays is refused too.
func LoadPartial(path string, last *Config) (*Config, []Refused, error) {
	data, err := Read(path)
	if err != nil {
		return nil, nil, err
	}
	return ParsePartial(path, data, last, nil)
}

// ParsePartial reads a configuration from data, as [LoadPartial] does from a file.
// name is what errors call it. able, if not nil, says what the process cannot do that a
// source of a service needs; that is then refused like one that is wrong.
func ParsePartial(name string, data []byte, last *Config, able func(*Discover) error) (*Config, []Refused, error) {
	return Flags(nil).ParsePartial(name, data, last, able)
}

// ParsePartial is the function [ParsePartial], with the flags on top. last has what they
// said of the file before.
func (f Flags) ParsePartial(name string, data []byte, last *Config, able func(*Discover) error) (*Config, []Refused, error) {
	d, err := parseDraft(name, data, maxSize, f)
	if err != nil {
		return nil, nil, cutShort(err)
	}
	if able != nil {
		d.refuseSources(able)
	}
	last = last.ofFile()
	if d.empty && len(last.Services)+len(last.Deny)+len(last.Exclude) > 0 {
		// That is what a file looks like that somebody is about to write.
		return nil, nil, d.error(position{line: 1, column: 1},
			"the file is empty: want services: [] if everything is to go")
	}
	m := &merge{draft: d, last: last, problems: make([][]problem, d.own)}
	d.config.Services, m.flagged = d.config.Services[:d.own], d.config.Services[d.own:]
	if !m.assign() {
		return nil, nil, cutShort(d.join(d.problems))
	}
	m.match()
	m.sources()
	m.clash()
	c, refused := m.result()
	// What is taken was judged together with what is not.
	if err := c.Validate(); err != nil {
		return nil, nil, fmt.Errorf("what could be taken does not go with what stays: %w", err)
	}
	return c, refused, nil
}

// refuseSources adds a problem for each source that the process is not able to have.
func (d *draft) refuseSources(able func(*Discover) error) {
	for i := range d.config.Services {
		s, path := d.config.Services[i].Discover, index("services", i)+".discover"
		if s == nil || d.spoiled(path) {
			continue
		}
		if err := able(s); err != nil {
			d.problems = append(d.problems, problem{path: path, text: err.Error()})
		}
	}
}

// merge makes one configuration of a file and what there was before.
type merge struct {
	*draft
	last *Config
	// problems are those of each service in the file; none means that it is
	// taken. Those of its source are noted in source once the old one is in it.
	problems [][]problem
	source   map[int][]problem
	// flagged are the services that flags said. They are in force whatever the file has.
	flagged []Service
	// kubernetes are the problems of that section.
	kubernetes []problem
	// was is where each service of the file is in last, or -1, and gone those of
	// last that no service of the file is.
	was  []int
	gone []int
}

// assign gives each problem to whom it is of, and reports whether all are of
// somebody.
func (m *merge) assign() bool {
	for _, p := range m.draft.problems {
		i, _, ok := serviceKey(p.path)
		switch {
		case ok && i < len(m.problems):
			m.problems[i] = append(m.problems[i], p)
		case p.path == "kubernetes" || strings.HasPrefix(p.path, "kubernetes."):
			m.kubernetes = append(m.kubernetes, p)
		default:
			return false
		}
	}
	return true
}

// match finds each service's former self: by name, then by address.
func (m *merge) match() {
	names, addrs := make(map[string]int), make(map[netip.AddrPort]int)
	for i, s := range m.last.Services {
		names[s.Name], addrs[s.Addr] = i, i
	}
	m.was = slices.Repeat([]int{-1}, len(m.problems))
	claimed := make(map[int]bool)
	claim := func(i, was int, found bool) {
		if found && m.was[i] < 0 && !claimed[was] {
			m.was[i], claimed[was] = was, true
		}
	}
	for i, s := range m.config.Services {
		was, found := names[s.Name]
		claim(i, was, found)
	}
	for i, s := range m.config.Services {
		was, found := addrs[s.Addr]
		claim(i, was, found)
	}
	for i := range m.last.Services {
		if !claimed[i] {
			m.gone = append(m.gone, i)
		}
	}
}

// sources gives the source that it had to each service that has problems in
// nothing else.
func (m *merge) sources() {
	m.source = make(map[int][]problem)
	for i, problems := range m.problems {
		elsewhere := slices.ContainsFunc(problems, func(p problem) bool { return !isSource(p) })
		if len(problems) == 0 || elsewhere || m.was[i] < 0 {
			continue
		}
		old, s := m.last.Services[m.was[i]], m.config.Services[i]
		if len(old.Endpoints) == 0 && old.Discover == nil {
			continue
		}
		s.Endpoints, s.Discover = old.Endpoints, old.Discover
		var k check
		k.service(index("services", i), &m.config, &s)
		if len(k.found) > 0 {
			continue
		}
		m.config.Services[i] = s
		m.source[i], m.problems[i] = problems, nil
	}
}

// isSource reports whether a problem is with where endpoints come from.
func isSource(p problem) bool {
	_, key, _ := serviceKey(p.path)
	first, _, _ := strings.Cut(key, ".")
	first, _, _ = strings.Cut(first, "[")
	return first == "endpoints" || first == "discover"
}

// stays calls each for every service of last that stays as it was, with the
// service of the file on whose account it does.
func (m *merge) stays(each func(was, i int)) {
	doubtful := -1
	for i := range m.problems {
		switch {
		case len(m.problems[i]) == 0:
		case m.was[i] >= 0:
			each(m.was[i], i)
		case doubtful < 0 && !m.identified(i):
			doubtful = i
		default:
		}
	}
	if doubtful >= 0 {
		for _, was := range m.gone {
			each(was, doubtful)
		}
	}
}

// identified reports whether it can be told which service the file means.
func (m *merge) identified(i int) bool {
	s, path := &m.config.Services[i], index("services", i)
	return s.Name != "" && s.Addr.IsValid() && !m.spoiled(path+".name") && !m.spoiled(path+".address")
}

// clash refuses services that are right but want the name or the address of one
// that stays. What they were stays then too, so that more are in the way.
func (m *merge) clash() {
	// Whom a name and an address are of, in the file.
	names, addrs := make(map[string]int), make(map[netip.AddrPort]int)
	for i, s := range m.config.Services {
		if len(m.problems[i]) == 0 {
			names[s.Name], addrs[s.Addr] = i, i
		}
	}
	type stay struct{ was, i int }
	var waiting []stay
	m.stays(func(was, i int) { waiting = append(waiting, stay{was, i}) })
	for len(waiting) > 0 {
		next := waiting[0]
		waiting = waiting[1:]
		s := &m.last.Services[next.was]
		refuse := func(i int, key string, value any) {
			path, own := index("services", i), &m.config.Services[i]
			delete(addrs, own.Addr)
			delete(names, own.Name)
			if len(m.problems[i]) == 0 && m.was[i] >= 0 {
				waiting = append(waiting, stay{m.was[i], i})
			}
			m.problems[i] = append(m.problems[i], problem{
				path: path + "." + key, see: index("services", next.i),
				text: fmt.Sprintf("%v is still that of a service that stays as it was, since its change is refused", value),
			})
		}
		byAddr, addrTaken := addrs[s.Addr]
		byName, nameTaken := names[s.Name]
		if addrTaken {
			refuse(byAddr, "address", s.Addr)
		}
		if nameTaken {
			refuse(byName, "name", spelling.Show(s.Name))
		}
	}
}

// keep returns a service for another configuration, in which it stays as it is: also what
// it took from the sections, whatever they say there.
func (c *Config) keep(was *Service) Service {
	s := c.Effective(was)
	s.at.earlier = true
	if s.kept == nil {
		s.kept = &kept{service: *was, config: Config{Path: c.Path, at: c.at.earlierOnly("path")}}
		s.kept.service.at.earlier = true
	}
	return s
}

// result returns the configuration, in the order of the file, and what is not in
// it.
func (m *merge) result() (*Config, []Refused) {
	c := m.config
	c.Services = nil
	kept := make(map[int][]Service)
	m.stays(func(was, i int) {
		kept[i] = append(kept[i], m.last.keep(&m.last.Services[was]))
	})
	var refused []Refused
	if len(m.kubernetes) > 0 {
		c.Kubernetes = m.last.Kubernetes
		r := m.refuse("kubernetes", m.kubernetes)
		r.Source = true
		refused = append(refused, r)
	}
	for i, s := range m.config.Services {
		problems := append(m.source[i], m.problems[i]...)
		if len(m.problems[i]) == 0 {
			kept[i] = append(kept[i], s)
		}
		c.Services = append(c.Services, kept[i]...)
		if len(problems) == 0 {
			continue
		}
		r := m.refuse(cmp.Or(s.Name, index("services", i)), problems)
		r.Source = len(m.problems[i]) == 0
		for _, s := range kept[i] {
			r.Kept = append(r.Kept, s.Name)
		}
		refused = append(refused, r)
	}
	c.Services = append(c.Services, m.flagged...)
	return &c, refused
}

func (m *merge) refuse(name string, problems []problem) Refused {
	err := m.join(problems)
	first := Problems(err)[0]
	return Refused{Name: name, Where: fmt.Sprintf("%s:%d:%d", first.File, first.Line, first.Column), Text: err.Error()}
}
