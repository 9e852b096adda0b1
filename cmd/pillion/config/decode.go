package config

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"time"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/token"

	"github.com/pillion-project/pillion/redirect/flow"
	"github.com/pillion-project/pillion/redirect/upstream/discover/spelling"
)

// decoder turns nodes into values and remembers where each value stands. What
// it cannot turn it adds to found and leaves as it was.
type decoder struct {
	*places
	found []problem
	// bad are the paths that were not understood.
	bad map[string]bool
	// offered, if not nil, is called with every key of every mapping that is
	// read, and whether it was there.
	offered func(path string, said bool)
}

// field is a key that a mapping may have.
type field struct {
	key  string
	read func(path string, n ast.Node)
}

func (d *decoder) config(c *Config, n ast.Node) {
	d.mapping("", n, []field{
		{"services", func(path string, n ast.Node) {
			d.list(path, n, func(path string, n ast.Node) {
				c.Services = append(c.Services, d.service(path, n))
			})
		}},
		{"deny", func(path string, n ast.Node) { c.Deny = d.rules(path, n) }},
		{"exclude", func(path string, n ast.Node) { c.Exclude = d.rules(path, n) }},
		{"default", func(path string, n ast.Node) {
			var name string
			if word(d, path, n, defaults, &name) && name == flow.PathPass.String() {
				c.Default = flow.PathPass
			}
		}},
		{"on_failure", func(path string, n ast.Node) { word(d, path, n, onFailures, &c.OnFailure) }},
		{"connect", func(path string, n ast.Node) { word(d, path, n, connectModes, &c.Connect) }},
		{"no_endpoint", func(path string, n ast.Node) { word(d, path, n, noEndpoints, &c.NoEndpoint) }},
		{"existing", func(path string, n ast.Node) { word(d, path, n, existings, &c.Existing) }},
		{"survive", func(path string, n ast.Node) { word(d, path, n, survives, &c.Survive) }},
		{"relay", func(path string, n ast.Node) { d.relay(&c.Relay, path, n) }},
		{"health", func(path string, n ast.Node) {
			d.mapping(path, n, []field{
				{"failures", d.number(&c.Health.Failures, 0, maxFailures)},
				{"base", d.duration(&c.Health.Base)},
				{"max", d.duration(&c.Health.Max)},
				{"panic", d.number(&c.Health.Panic, 0, 100)},
			}, nil)
		}},
		{"limits", func(path string, n ast.Node) {
			d.mapping(path, n, []field{
				{"slots_per_container", d.number(&c.Limits.SlotsPerContainer, 1, maxSlots)},
				{"connections_per_container", d.number(&c.Limits.ConnectionsPerContainer, 0, maxConnections)},
				{"connections", d.number(&c.Limits.Connections, 1, maxConnections)},
			}, nil)
		}},
		{"path", func(path string, n ast.Node) { word(d, path, n, paths, &c.Path) }},
		{"zone", d.text(&c.Zone)},
		{"kubernetes", func(path string, n ast.Node) { d.kubernetes(&c.Kubernetes, path, n) }},
		{"flow_log", d.text(&c.FlowLog)},
		{"metrics", d.addrPort(&c.Metrics)},
		{"probes", d.addrPort(&c.Probes)},
	}, nil)
}

func (d *decoder) relay(r *Relay, path string, n ast.Node) {
	d.mapping(path, n, []field{
		{"workers", d.number(&r.Workers, 0, maxWorkers)},
		{"dial_timeout", d.duration(&r.DialTimeout)},
		{"dial_budget", d.duration(&r.DialBudget)},
		{"attempts", d.number(&r.Attempts, 1, maxAttempts)},
		{"idle_timeout", d.duration(&r.IdleTimeout)},
		{"max_lifetime", d.duration(&r.MaxLifetime)},
	}, nil)
}

func (d *decoder) rules(path string, n ast.Node) []Rule {
	var rules []Rule
	d.list(path, n, func(path string, n ast.Node) {
		var r Rule
		if d.scalar(path, n, "CIDR[:PORT] or ADDR[:PORT]") {
			var err error
			if r, err = ParseRule(raw(n)); err != nil {
				d.fail(path, n, "%v", err)
			}
		}
		rules = append(rules, r)
	})
	return rules
}

// mapping hands the value of every key in n to its field, and notes in said, if
// that is not nil, which were there. A section without content is one in which
// everything is commented out.
func (d *decoder) mapping(path string, n ast.Node, fields []field, said map[string]bool) {
	if isNull(n) {
		return
	}
	m, ok := n.(ast.MapNode)
	if !ok {
		want := "a mapping with the keys " + spelling.OneOf(keys(fields))
		if len(fields) == 0 {
			want = "{}, since it has no keys"
		}
		d.fail(path, n, "this is %s: want %s", kind(n), want)
		return
	}
	lines := make(map[string]int)
	for entries := m.MapRange(); entries.Next(); {
		key := entries.Key()
		at, name := tokenPosition(key.GetToken()), key.GetToken().Value
		if first, twice := lines[name]; twice {
			d.failAt(join(path, name), at, "given twice, first on line %d", first)
			continue
		}
		lines[name] = at.line
		f := find(fields, name)
		if f == nil {
			hint := spelling.Meant(name, keys(fields))
			if len(fields) == 0 {
				hint = "want {}"
			}
			d.failAt(join(path, name), at, "unknown key, %s", hint)
			continue
		}
		if said != nil {
			said[name] = true
		}
		d.mark(join(path, name), entries.Value(), at)
		f.read(join(path, name), entries.Value())
	}
	if d.offered != nil {
		for _, f := range fields {
			d.offered(join(path, f.key), lines[f.key] > 0)
		}
	}
}

// list hands every item of n to read. Like a section it may be empty.
func (d *decoder) list(path string, n ast.Node, read func(path string, n ast.Node)) {
	if isNull(n) {
		return
	}
	s, ok := n.(*ast.SequenceNode)
	if !ok {
		d.fail(path, n, "this is %s: want a list", kind(n))
		return
	}
	for i, item := range s.Values {
		at := nodePosition(item)
		if i < len(s.Entries) && isNull(item) {
			at = tokenPosition(s.Entries[i].Start)
		}
		d.byPath[index(path, i)] = at
		read(index(path, i), item)
	}
}

// mark remembers where the value at path stands: a scalar where it is, anything
// else where its key is.
func (d *decoder) mark(path string, n ast.Node, key position) {
	if _, ok := n.(ast.ScalarNode); ok && !isNull(n) {
		key = nodePosition(n)
	}
	d.byPath[path] = key
}

// fail says what is wrong with the value at path, which n is.
func (d *decoder) fail(path string, n ast.Node, format string, args ...any) {
	if path == "" {
		d.byPath[path] = nodePosition(n)
	}
	d.failAt(path, d.byPath[path], format, args...)
	d.bad[path] = true
}

func (d *decoder) failAt(path string, at position, format string, args ...any) {
	d.found = append(d.found, problem{path: path, at: at, text: fmt.Sprintf(format, args...)})
}

// spoiled reports whether the value at path, or one that it is in, was not
// understood.
func (d *decoder) spoiled(path string) bool {
	for !d.bad[path] {
		if path == "" {
			return false
		}
		path = parent(path)
	}
	return true
}

// scalar reports whether n is one value, and says what was wanted if not.
func (d *decoder) scalar(path string, n ast.Node, want string) bool {
	switch {
	case isNull(n):
		d.fail(path, n, "empty: want %s, or leave it out", want)
	case kind(n) == "a list" && len(n.(*ast.SequenceNode).Values) == 1:
		d.fail(path, n, `this is a list: want %s (in quotes if it begins with [)`, want)
	case !isScalar(n):
		d.fail(path, n, "this is %s: want %s", kind(n), want)
	default:
		return true
	}
	return false
}

// word reads one of the words known, and reports whether it did.
func word[T ~string](d *decoder, path string, n ast.Node, known []T, into *T) bool {
	if !d.scalar(path, n, spelling.OneOf(known)) {
		return false
	}
	for _, k := range known {
		if string(k) == raw(n) {
			*into = k
			return true
		}
	}
	d.fail(path, n, "%s: %s", spelling.Show(raw(n)), spelling.Meant(raw(n), known))
	return false
}

// named reads one of the values known by its name.
func named[T fmt.Stringer](d *decoder, path string, n ast.Node, known []T, into *T) {
	names := make([]string, len(known))
	for i, k := range known {
		names[i] = k.String()
	}
	var name string
	if word(d, path, n, names, &name) {
		*into = known[slices.Index(names, name)]
	}
}

func (d *decoder) text(into *string) func(string, ast.Node) {
	return func(path string, n ast.Node) {
		if !d.scalar(path, n, "text") {
			return
		}
		switch n.(type) {
		case *ast.StringNode, *ast.LiteralNode:
			*into = raw(n)
		default:
			d.fail(path, n, "this is %s: want text, in quotes %q", kind(n), raw(n))
		}
	}
}

func (d *decoder) boolean(into *bool) func(string, ast.Node) {
	return func(path string, n ast.Node) {
		if !d.scalar(path, n, "true or false") {
			return
		}
		b, ok := n.(*ast.BoolNode)
		if !ok {
			d.fail(path, n, "%s: want true or false", spelling.Show(raw(n)))
			return
		}
		*into = b.Value
	}
}

func (d *decoder) addrPort(into *netip.AddrPort) func(string, ast.Node) {
	return func(path string, n ast.Node) {
		if !d.scalar(path, n, "ADDR:PORT") {
			return
		}
		a, err := parseAddrPort(raw(n))
		if err != nil {
			d.fail(path, n, "%v", err)
			return
		}
		*into = a
	}
}

func (d *decoder) number(into *int, low, high int) func(string, ast.Node) {
	return func(path string, n ast.Node) {
		want := fmt.Sprintf("a number from %d to %d", low, high)
		if !d.scalar(path, n, want) {
			return
		}
		v, ok := parseNumber(raw(n), low, high)
		switch quoted := n.GetToken().Type; {
		case !ok:
			d.fail(path, n, "%s: want %s", spelling.Show(raw(n)), want)
		case quoted == token.SingleQuoteType || quoted == token.DoubleQuoteType:
			d.fail(path, n, "this is text: want %s, without quotes", want)
		default:
			*into = v
		}
	}
}

// maxDuration keeps what is added to a time from going round to the past.
const maxDuration = 365 * 24 * time.Hour

// bareNumber is a duration whose unit was forgotten.
var bareNumber = regexp.MustCompile(`^\d+$`)

func (d *decoder) duration(into *time.Duration) func(string, ast.Node) {
	return func(path string, n ast.Node) {
		if !d.scalar(path, n, "a duration such as 5s") {
			return
		}
		s := raw(n)
		v, err := time.ParseDuration(s)
		switch {
		case err != nil && bareNumber.MatchString(s):
			d.fail(path, n, "%s has no unit: want a duration such as %ss", spelling.Show(s), s)
		case err != nil:
			d.fail(path, n, "%s is no duration: want one such as 500ms, 5s or 1h30m", spelling.Show(s))
		case v < 0:
			d.fail(path, n, "%s is negative", s)
		case v > maxDuration:
			d.fail(path, n, "%s is more than a year: want less", s)
		default:
			*into = v
		}
	}
}

// raw returns the text of a scalar as the user wrote it, without quotes.
// Whether YAML takes 1.2 for a number is of no interest where an address is
// wanted.
func raw(n ast.Node) string {
	switch n := n.(type) {
	case *ast.StringNode:
		return n.Value
	case *ast.LiteralNode:
		return n.Value.Value
	default:
		if isScalar(n) {
			return n.GetToken().Value
		}
		return ""
	}
}

func isNull(n ast.Node) bool {
	_, ok := n.(*ast.NullNode)
	return ok || n == nil
}

func isScalar(n ast.Node) bool {
	_, ok := n.(ast.ScalarNode)
	return ok && !isNull(n)
}

// kind names what n is.
func kind(n ast.Node) string {
	switch n.(type) {
	case nil, *ast.NullNode:
		return "empty"
	case *ast.StringNode, *ast.LiteralNode:
		return "text"
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return "a number"
	case *ast.BoolNode:
		return "true or false"
	case *ast.SequenceNode:
		return "a list"
	case ast.MapNode:
		return "a mapping"
	default:
		return "something else"
	}
}

func find(fields []field, key string) *field {
	for i := range fields {
		if fields[i].key == key {
			return &fields[i]
		}
	}
	return nil
}

func keys(fields []field) []string {
	all := make([]string, len(fields))
	for i, f := range fields {
		all[i] = f.key
	}
	return all
}

// plainKey is a key that can stand in a path as it is.
var plainKey = regexp.MustCompile(`^[\w-]{1,64}$`)

// join adds a key to a path.
func join(path, key string) string {
	if !plainKey.MatchString(key) {
		key = spelling.Show(key)
	}
	if path == "" {
		return key
	}
	return path + "." + key
}
