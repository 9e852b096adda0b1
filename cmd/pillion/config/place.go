package config

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// positions is where the values of a configuration, or of one of its services,
// stand in the file. It is kept for as long as the configuration is, so it has no
// endpoints but those that are asked for.
type positions struct {
	file string
	// earlier is true if that is no longer what the file says.
	earlier bool
	keys    []keyPosition // sorted by key
}

type keyPosition struct {
	key string
	position
}

// Where returns the place of the value at path, such as services[0].attempts or
// deny[2], in the form pillion.yaml:12:5; empty if it is in no file.
func (c *Config) Where(path string) string {
	i, key, ok := serviceKey(path)
	switch {
	case !ok:
		return c.at.where(path)
	case i < len(c.Services):
		return c.Services[i].Where(key)
	default:
		return ""
	}
}

// Where returns the place of one of the service's keys, such as attempts; of the
// service itself for an empty key. It is empty if that is in no file.
func (s *Service) Where(key string) string { return s.at.where(key) }

func (p *positions) where(key string) string {
	at, ok := p.find(key)
	if !ok {
		return ""
	}
	text := fmt.Sprintf("%s:%d:%d", p.file, at.line, at.column)
	if p.earlier {
		text += " (as it was)"
	}
	return text
}

func (p *positions) find(key string) (position, bool) {
	i, ok := slices.BinarySearchFunc(p.keys, key, func(k keyPosition, key string) int { return strings.Compare(k.key, key) })
	if !ok {
		return position{}, false
	}
	return p.keys[i].position, true
}

func (p *positions) add(key string, at position) { p.keys = append(p.keys, keyPosition{key, at}) }

func (p *positions) sort() {
	slices.SortFunc(p.keys, func(a, b keyPosition) int { return strings.Compare(a.key, b.key) })
}

// serviceKey parts services[3].attempts into 3 and attempts.
func serviceKey(path string) (i int, key string, ok bool) {
	rest, ok := strings.CutPrefix(path, "services[")
	if !ok {
		return 0, "", false
	}
	number, key, ok := strings.Cut(rest, "]")
	i, err := strconv.Atoi(number)
	if !ok || err != nil || i < 0 {
		return 0, "", false
	}
	return i, strings.TrimPrefix(key, "."), true
}

// remember puts into the configuration where its values stand.
func (w *places) remember(c *Config) {
	c.at = positions{file: w.file}
	// The keys are few and shared: without this each would hold on to its path.
	shared := make(map[string]string)
	for path, at := range w.byPath {
		i, key, ok := serviceKey(path)
		switch {
		case !ok:
			c.at.add(path, at)
		case i < len(c.Services) && !strings.HasPrefix(key, "endpoints["):
			if shared[key] == "" {
				shared[key] = strings.Clone(key)
			}
			c.Services[i].at.add(shared[key], at)
		default:
		}
	}
	c.at.sort()
	for i := range c.Services {
		s := &c.Services[i]
		s.at.file = w.file
		for _, n := range s.needs() {
			if strings.HasPrefix(n.Option, "endpoints[") {
				s.at.add(n.Option, w.find(index("services", i)+"."+n.Option))
			}
		}
		s.at.sort()
	}
}
