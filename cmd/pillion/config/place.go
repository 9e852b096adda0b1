package config

import (
	"cmp"
	"fmt"
	"iter"
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
	flag string // the flag that said it, in place of a position
}

// Where returns the place of the value at path, such as services[0].attempts or
// deny[2], in the form pillion.yaml:12:5, or the flag that said it; empty if
// nobody did.
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

// Where returns the place of one of the service's keys, such as attempts, as
// [Config.Where] does; of the service itself for an empty key.
func (s *Service) Where(key string) string { return s.at.where(key) }

// Said notes that the value at path comes from a flag, such as --deny.
func (c *Config) Said(path, flag string) {
	p, key := &c.at, path
	if i, inner, ok := serviceKey(path); ok && i < len(c.Services) {
		p, key = &c.Services[i].at, inner
	}
	// A copy: the configuration may be one of another's.
	p.keys = append(slices.Clone(p.keys), keyPosition{key: key, flag: flag})
	p.sort()
}

// ofFile returns the configuration without the services and rules that flags said.
func (c *Config) ofFile() *Config {
	file := *c
	file.Services = slices.DeleteFunc(slices.Clone(c.Services), func(s Service) bool { return s.at.flag("") != "" })
	file.Deny, file.Exclude = c.rulesOfFile("deny", c.Deny), c.rulesOfFile("exclude", c.Exclude)
	return &file
}

func (c *Config) rulesOfFile(key string, rules []Rule) []Rule {
	var all []Rule
	for i, r := range rules {
		if c.at.flag(index(key, i)) == "" {
			all = append(all, r)
		}
	}
	return all
}

// flags returns which flag said what, by path.
func (c *Config) flags() map[string]string {
	all := make(map[string]string)
	for _, k := range c.at.keys {
		if k.flag != "" {
			all[k.key] = k.flag
		}
	}
	for i := range c.Services {
		if s := &c.Services[i]; s.at.flag("") != "" {
			all[index("services", i)] = s.at.flag("") + " " + s.Name
		}
	}
	return all
}

// flagsFirst ranges over the services, and those of the file come last: of two that
// cannot both be there, it is the file's that is wrong.
func (c *Config) flagsFirst() iter.Seq2[int, *Service] {
	return func(yield func(int, *Service) bool) {
		for _, flagged := range []bool{true, false} {
			for i := range c.Services {
				s := &c.Services[i]
				if (s.at.flag("") != "") == flagged && !yield(i, s) {
					return
				}
			}
		}
	}
}

// flag returns the flag that said the value of a key; empty: none did.
func (p *positions) flag(key string) string {
	at, _ := p.find(key)
	return at.flag
}

func (p *positions) where(key string) string {
	at, ok := p.find(key)
	switch {
	case !ok:
		return ""
	case at.flag != "":
		return at.flag
	default:
	}
	text := fmt.Sprintf("%s:%d:%d", p.file, at.line, at.column)
	if p.earlier {
		text += " (as it was)"
	}
	return text
}

func (p *positions) find(key string) (keyPosition, bool) {
	i, ok := slices.BinarySearchFunc(p.keys, key, func(k keyPosition, key string) int { return strings.Compare(k.key, key) })
	if !ok {
		return keyPosition{}, false
	}
	return p.keys[i], true
}

// earlierOnly are the places of some keys, as places of what was.
func (p *positions) earlierOnly(keys ...string) positions {
	only := positions{file: p.file, earlier: true}
	for _, key := range keys {
		if at, ok := p.find(key); ok {
			only.keys = append(only.keys, at)
		}
	}
	return only
}

func (p *positions) add(key string, at position) {
	p.keys = append(p.keys, keyPosition{key: key, position: at})
}

func (p *positions) sort() {
	slices.SortFunc(p.keys, func(a, b keyPosition) int {
		// A flag goes before what the file says.
		return cmp.Or(strings.Compare(a.key, b.key), strings.Compare(b.flag, a.flag))
	})
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
