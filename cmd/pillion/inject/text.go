package inject

import (
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
)

// writer does edits to the text of one document. The parser says where nodes
// begin; where they end follows from the indentation, since everything that is
// touched has to be in block style.
type writer struct{ doc string }

// write does an edit of what is at base.
func (w *writer) write(base []string, e edit) error {
	f, err := parser.ParseBytes([]byte(w.doc), 0)
	if err != nil {
		return refuse("the YAML cannot be read: %v", err)
	}
	var root ast.Node
	for _, d := range f.Docs {
		if d.Body != nil {
			root = d.Body
		}
	}
	path := join(base, e.path...)
	at, last := path[:len(path)-1], path[len(path)-1]
	parent, err := find(root, at)
	if err != nil {
		return err
	}
	t := &text{lines: slices.Collect(strings.Lines(w.doc)), eol: "\n"}
	if len(t.lines) > 0 && strings.HasSuffix(t.lines[0], "\r\n") {
		t.eol = "\r\n"
	}
	if n := len(t.lines); n > 0 && !strings.HasSuffix(t.lines[n-1], "\n") {
		t.lines[n-1] += t.eol
	}
	t.offset = offset(root, base)
	switch n := parent.(type) {
	case *ast.SequenceNode:
		err = t.element(n, last, e)
	default:
		err = t.key(entries(n), last, e)
	}
	w.doc = strings.Join(t.lines, "")
	return err
}

// find follows a path. What is in flow style, or stands elsewhere, is refused.
func find(n ast.Node, path []string) (ast.Node, error) {
	for {
		a, ok := n.(*ast.AnchorNode)
		if !ok {
			break
		}
		n = a.Value
	}
	switch v := n.(type) {
	case *ast.MappingNode:
		if v.IsFlowStyle {
			return nil, refuse("line %d: a mapping in flow style {...}: write it in lines", v.GetToken().Position.Line)
		}
	case *ast.SequenceNode:
		if v.IsFlowStyle {
			return nil, refuse("line %d: a list in flow style [...]: write it in lines", v.GetToken().Position.Line)
		}
	case *ast.MappingValueNode:
	case nil:
		return nil, refuse("it is empty")
	default:
		return nil, refuse("line %d: %s where a mapping or a list is wanted: write it out", n.GetToken().Position.Line, n.Type())
	}
	if len(path) == 0 {
		return n, nil
	}
	if s, ok := n.(*ast.SequenceNode); ok {
		i, err := strconv.Atoi(path[0])
		if err != nil || i < 0 || i >= len(s.Values) {
			return nil, refuse("line %d: no element %s", s.GetToken().Position.Line, path[0])
		}
		return find(s.Values[i], path[1:])
	}
	e := entry(entries(n), path[0])
	if e == nil {
		return nil, refuse("line %d: the key %s is not there in words", n.GetToken().Position.Line, path[0])
	}
	return find(e.Value, path[1:])
}

// entries returns those of a mapping, which may have one only.
func entries(n ast.Node) []*ast.MappingValueNode {
	switch v := n.(type) {
	case *ast.MappingNode:
		return v.Values
	case *ast.MappingValueNode:
		return []*ast.MappingValueNode{v}
	}
	return nil
}

func entry(all []*ast.MappingValueNode, key string) *ast.MappingValueNode {
	for _, e := range all {
		if s, ok := e.Key.(*ast.StringNode); ok && s.Value == key {
			return e
		}
	}
	return nil
}

// offset is how far the dashes of a pod's lists stand to the right of the key.
func offset(root ast.Node, pod []string) int {
	n, err := find(root, join(pod, "spec"))
	if err != nil {
		return 0
	}
	c := entry(entries(n), "containers")
	if c == nil {
		return 0
	}
	s, ok := c.Value.(*ast.SequenceNode)
	if !ok {
		return 0
	}
	return max(s.Start.Position.Column-c.Key.GetToken().Position.Column, 0)
}

// text is a document in lines, each with its end.
type text struct {
	lines  []string
	eol    string
	offset int
}

func indent(line string) int { return len(line) - len(strings.TrimLeft(line, " ")) }

// empty tells whether a line is blank or a comment.
func empty(line string) bool {
	s := strings.TrimSpace(line)
	return s == "" || s[0] == '#'
}

// end returns the line after the last of what begins at line i and has its first
// character at column c. Both count from 0. listed tells that it is a key whose
// list's dashes may stand below it.
func (t *text) end(i, c int, listed bool) int {
	last := i
	for n := i + 1; n < len(t.lines); n++ {
		line := t.lines[n]
		if empty(line) {
			continue
		}
		dash := strings.HasPrefix(strings.TrimLeft(line, " "), "-") && !separator.MatchString(line)
		if in := indent(line); in < c || in == c && (!listed || !dash) {
			break
		}
		last = n
	}
	return last + 1
}

// above moves an insertion before line i above the comments that belong to it.
func (t *text) above(i, c int) int {
	for i > 0 && strings.HasPrefix(strings.TrimSpace(t.lines[i-1]), "#") && indent(t.lines[i-1]) == c {
		i--
	}
	return i
}

// splice puts lines in place of those from i on and before j.
func (t *text) splice(i, j int, lines []string) {
	for n := range lines {
		lines[n] += t.eol
	}
	t.lines = slices.Replace(t.lines, i, j, lines...)
}

// element edits a list.
func (t *text) element(s *ast.SequenceNode, index string, e edit) error {
	i, err := strconv.Atoi(index)
	if err != nil || i > len(s.Values) || len(s.Entries) != len(s.Values) {
		return refuse("line %d: no element %s", s.GetToken().Position.Line, index)
	}
	c := s.Start.Position.Column - 1
	line := func(n int) int { return s.Entries[n].Start.Position.Line - 1 }
	switch {
	case e.kind == add && i == len(s.Values):
		at := t.end(line(i-1), c, false)
		t.splice(at, at, t.item(e.value, c))
	case i == len(s.Values):
		return refuse("line %d: no element %s", s.GetToken().Position.Line, index)
	case e.kind == add:
		at := t.above(line(i), c)
		t.splice(at, at, t.item(e.value, c))
	case e.kind == replace:
		t.splice(line(i), t.end(line(i), c, false), t.item(e.value, c))
	default:
		t.splice(line(i), t.end(line(i), c, false), nil)
	}
	return nil
}

// nothing is a key without a value, or with an empty one.
var nothing = regexp.MustCompile(`:[ \t]*(\[[ \t]*\]|\{[ \t]*\}|null|~)?[ \t]*(#[^\r\n]*)?\r?\n$`)

// key edits a mapping. What is added has its place by its name.
func (t *text) key(all []*ast.MappingValueNode, key string, e edit) error {
	if len(all) == 0 {
		return refuse("a mapping that is empty")
	}
	c := all[0].Key.GetToken().Position.Column - 1
	line := func(e *ast.MappingValueNode) int { return e.Key.GetToken().Position.Line - 1 }
	end := func(e *ast.MappingValueNode) int { return t.end(line(e), c, true) }
	lines := t.pair(key, e.value, c)
	if old := entry(all, key); old != nil {
		i := line(old)
		if e.kind == add {
			at := nothing.FindStringIndex(t.lines[i])
			if at == nil || indent(t.lines[i]) != c {
				return refuse("line %d: %s is empty, in a way that cannot be changed", i+1, key)
			}
			t.splice(i, i+1, lines)
			return nil
		}
		if indent(t.lines[i]) != c {
			return refuse("line %d: %s stands beside something else", i+1, key)
		}
		t.splice(i, end(old), lines)
		return nil
	}
	at := end(all[len(all)-1])
	switch next := map[string]string{"initContainers": "containers", "metadata": "spec"}[key]; {
	case next != "":
		if n := entry(all, next); n != nil && indent(t.lines[line(n)]) == c {
			at = t.above(line(n), c)
		}
	case key == "volumes":
		if n := entry(all, "containers"); n != nil {
			at = end(n)
		}
	}
	t.splice(at, at, lines)
	return nil
}
