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
//
// The edits come in the order of the document. Of a list's, only the element that is
// being edited is parsed again, so that the work grows as the document does.
type writer struct {
	doc string
	// lines are those of doc, from the first edit on, and root its node if it is a list.
	lines []string
	eol   string
	root  ast.Node
	// done is the text of lines before the one at next. The element at the path
	// object, or all there is, goes from there to the line at until: now is its text.
	done        strings.Builder
	next, until int
	object      []string
	now         string
}

// text returns the document with the edits.
func (w *writer) text() string {
	if w.lines == nil {
		return w.doc
	}
	return w.done.String() + w.now + strings.Join(w.lines[w.until:], "")
}

// write does an edit of what is at base.
func (w *writer) write(base []string, e edit) error {
	n := 0
	for n+1 < len(base) && base[n] == "items" {
		n += 2
	}
	if err := w.enter(base[:n]); err != nil {
		return err
	}
	root, err := parse(w.now)
	if err != nil {
		return err
	}
	if n > 0 {
		base = join([]string{"0"}, base[n:]...)
	}
	path := join(base, e.path...)
	at, last := path[:len(path)-1], path[len(path)-1]
	t := &text{lines: slices.Collect(strings.Lines(w.now)), eol: w.eol, before: w.next}
	parent, err := t.find(root, at)
	if err != nil {
		return err
	}
	t.offset = t.dashes(root, base)
	switch n := parent.(type) {
	case *ast.SequenceNode:
		err = t.element(n, last, e)
	default:
		err = t.key(entries(n), last, e)
	}
	w.now = strings.Join(t.lines, "")
	return err
}

// enter makes the element at a path the one that is edited, or the whole document if
// the path is empty.
func (w *writer) enter(object []string) error {
	switch {
	case w.lines == nil:
		if err := w.begin(len(object) > 0); err != nil {
			return err
		}
	case slices.Equal(object, w.object):
		return nil
	}
	from, until, err := w.span(object)
	if err != nil {
		return err
	}
	w.done.WriteString(w.now)
	for _, line := range w.lines[w.until:from] {
		w.done.WriteString(line)
	}
	w.next, w.until, w.object = from, until, object
	w.now = strings.Join(w.lines[from:until], "")
	return nil
}

func (w *writer) begin(list bool) (err error) {
	if list {
		if w.root, err = parse(w.doc); err != nil {
			return err
		}
	}
	w.lines, w.eol = slices.Collect(strings.Lines(w.doc)), "\n"
	if len(w.lines) > 0 && strings.HasSuffix(w.lines[0], "\r\n") {
		w.eol = "\r\n"
	}
	if n := len(w.lines); n > 0 && !strings.HasSuffix(w.lines[n-1], "\n") {
		w.lines[n-1] += w.eol
	}
	return nil
}

// span returns the line at which the element at a path begins, and the one at which
// what stands behind it does.
func (w *writer) span(object []string) (from, until int, err error) {
	t, n := &text{}, w.root
	from, until = 0, len(w.lines)
	for ; len(object) > 0; object = object[2:] {
		if n, err = t.find(n, nil); err != nil {
			return 0, 0, err
		}
		all := entries(n)
		if at := slices.Index(all, entry(all, object[0])); at >= 0 && at+1 < len(all) {
			until = all[at+1].Key.GetToken().Position.Line - 1
		}
		if n, err = t.find(n, object[:1]); err != nil {
			return 0, 0, err
		}
		s, ok := n.(*ast.SequenceNode)
		i, numErr := strconv.Atoi(object[1])
		if !ok || numErr != nil || i >= len(s.Values) || len(s.Entries) != len(s.Values) {
			return 0, 0, refuse("line %d: no element %s", t.line(n), object[1])
		}
		from = s.Entries[i].Start.Position.Line - 1
		if i+1 < len(s.Entries) {
			until = s.Entries[i+1].Start.Position.Line - 1
		}
		n = s.Values[i]
	}
	if from < w.until || until <= from || until > len(w.lines) {
		return 0, 0, refuse("line %d: an element where none is seen", from+1)
	}
	return from, until, nil
}

// parse returns the node of the last document in a text that has one.
func parse(doc string) (ast.Node, error) {
	f, err := parser.ParseBytes([]byte(breaks(doc)), 0)
	if err != nil {
		return nil, refuse("the YAML cannot be read: %v", err)
	}
	var root ast.Node
	for _, d := range f.Docs {
		if d.Body != nil {
			root = d.Body
		}
	}
	return root, nil
}

// find follows a path. What is in flow style, or stands elsewhere, is refused.
func (t *text) find(n ast.Node, path []string) (ast.Node, error) {
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
			return nil, refuse("line %d: a mapping in flow style {...}: write it in lines", t.line(v))
		}
	case *ast.SequenceNode:
		if v.IsFlowStyle {
			return nil, refuse("line %d: a list in flow style [...]: write it in lines", t.line(v))
		}
	case *ast.MappingValueNode:
	case nil:
		return nil, refuse("it is empty")
	default:
		return nil, refuse("line %d: %s where a mapping or a list is wanted: write it out", t.line(n), n.Type())
	}
	if len(path) == 0 {
		return n, nil
	}
	if s, ok := n.(*ast.SequenceNode); ok {
		i, err := strconv.Atoi(path[0])
		if err != nil || i < 0 || i >= len(s.Values) {
			return nil, refuse("line %d: no element %s", t.line(s), path[0])
		}
		return t.find(s.Values[i], path[1:])
	}
	e := entry(entries(n), path[0])
	if e == nil {
		return nil, refuse("line %d: the key %s is not there in words", t.line(n), path[0])
	}
	return t.find(e.Value, path[1:])
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

// dashes tells how far those of a pod's lists stand to the right of the key.
func (t *text) dashes(root ast.Node, pod []string) int {
	n, err := t.find(root, join(pod, "spec"))
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

// text is a document or an element of one in lines, each with its end.
type text struct {
	lines []string
	eol   string
	// before is how many lines of the document stand before it.
	before int
	offset int
}

// line returns that of a node in the document, from 1 on.
func (t *text) line(n ast.Node) int { return t.before + n.GetToken().Position.Line }

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
		return refuse("line %d: no element %s", t.line(s), index)
	}
	c := s.Start.Position.Column - 1
	line := func(n int) int { return s.Entries[n].Start.Position.Line - 1 }
	switch {
	case e.kind == add && i == len(s.Values):
		at := t.end(line(i-1), c, false)
		t.splice(at, at, t.item(e.value, c))
	case i == len(s.Values):
		return refuse("line %d: no element %s", t.line(s), index)
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
				return refuse("line %d: %s is empty, in a way that cannot be changed", t.before+i+1, key)
			}
			t.splice(i, i+1, lines)
			return nil
		}
		if indent(t.lines[i]) != c {
			return refuse("line %d: %s stands beside something else", t.before+i+1, key)
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
