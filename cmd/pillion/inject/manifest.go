package inject

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
)

// Result is what became of one workload of a manifest.
type Result struct {
	// Workload is its kind and name.
	Workload string
	// Changed is false where it was as it should be, or its user wants none.
	Changed bool
}

// templates says where the pods of a kind are. What is of another kind is left
// alone.
var templates = map[string][]string{
	"Pod":                   {},
	"Deployment":            {"spec", "template"},
	"ReplicaSet":            {"spec", "template"},
	"ReplicationController": {"spec", "template"},
	"StatefulSet":           {"spec", "template"},
	"DaemonSet":             {"spec", "template"},
	"Job":                   {"spec", "template"},
	"CronJob":               {"spec", "jobTemplate", "spec", "template"},
}

// groups are the API groups that the kinds above are of.
var groups = map[string]bool{"": true, "apps": true, "batch": true}

// separator begins another document. No scalar of any style can contain it.
var separator = regexp.MustCompile(`^(---|\.\.\.)([ \t\r\n]|$)`)

// Manifest puts Pillion beside the pods of a manifest in YAML or JSON. In YAML,
// what it does not add or replace stays as it is, byte for byte. All workloads
// that are refused are told of in one error, and then there is no text.
func (o Options) Manifest(text []byte) ([]byte, []Result, error) {
	if err := o.Check(); err != nil {
		return nil, nil, err
	}
	if !utf8.Valid(text) || bytes.IndexByte(text, 0) >= 0 {
		// Kubernetes reads UTF-16, too, and would find pods where none is seen here.
		return nil, nil, refuse("it is not in UTF-8")
	}
	if trimmed := bytes.TrimSpace(text); len(trimmed) > 0 && trimmed[0] == '{' && json.Valid(trimmed) {
		return o.manifestJSON(text)
	}
	var out strings.Builder
	var results []Result
	var errs []error
	line := 1
	for _, doc := range split(string(text)) {
		changed, some, err := o.document(doc)
		if err != nil {
			errs = append(errs, fmt.Errorf("document at line %d: %w", line, err))
		}
		out.WriteString(changed)
		results = append(results, some...)
		line += strings.Count(doc, "\n")
	}
	if err := errors.Join(errs...); err != nil {
		return nil, nil, err
	}
	return []byte(out.String()), results, nil
}

// split cuts a stream into documents, each with the separator before it.
func split(text string) []string {
	var docs []string
	begin, at := 0, 0
	for l := range strings.Lines(text) {
		if separator.MatchString(l) && at > begin {
			docs = append(docs, text[begin:at])
			begin = at
		}
		at += len(l)
	}
	return append(docs, text[begin:])
}

// hollow tells whether a document has nothing but comments and directives.
func hollow(doc string) bool {
	for l := range strings.Lines(doc) {
		l = strings.TrimSpace(l)
		if l != "" && l[0] != '#' && l[0] != '%' && l != "---" && l != "..." {
			return false
		}
	}
	return true
}

// document does one of YAML.
func (o Options) document(doc string) (out string, results []Result, err error) {
	// The parser has panicked on what is no YAML.
	defer func() {
		if v := recover(); v != nil {
			out, results, err = doc, nil, refuse("it breaks the parser: %v", v)
		}
	}()
	if hollow(doc) {
		return doc, nil, nil
	}
	if strings.Count(doc, "\r") != strings.Count(doc, "\r\n") {
		return doc, nil, refuse("some lines end in a carriage return alone")
	}
	v, err := decode(doc)
	if err != nil {
		return doc, nil, err
	}
	w := &writer{doc: doc}
	results, err = o.object(v, nil, w.write)
	if err != nil {
		return doc, results, err
	}
	if out = w.text(); out == doc {
		return doc, results, nil
	}
	// v has been edited as the text was.
	got, err := decode(out)
	if err != nil || !same(got, v) {
		return doc, nil, refuse("it is written in a way that cannot be changed line by line (anchors, merged keys, unusual indentation?)")
	}
	return out, results, nil
}

func decode(doc string) (any, error) {
	var v any
	if err := yaml.Unmarshal([]byte(breaks(doc)), &v); err != nil {
		return nil, fmt.Errorf("read YAML: %w", err)
	}
	return v, nil
}

// breaks returns a text with line feeds alone between its lines, which are the same
// lines, and mean the same. The parser counts a line too many where a block scalar
// ends in a carriage return.
func breaks(doc string) string { return strings.ReplaceAll(doc, "\r\n", "\n") }

func (o Options) manifestJSON(text []byte) ([]byte, []Result, error) {
	v, err := decodeJSON(text)
	if err != nil {
		return nil, nil, err
	}
	changed := false
	results, err := o.object(v, nil, func([]string, edit) error { changed = true; return nil })
	if err != nil || !changed {
		return text, results, err
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "    ") // as kubectl does
	if err := e.Encode(v); err != nil {
		return nil, nil, fmt.Errorf("write JSON: %w", err)
	}
	return b.Bytes(), results, nil
}

// decodeJSON keeps numbers as they are written.
func decodeJSON(text []byte) (any, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return nil, fmt.Errorf("read JSON: %w", err)
	}
	return v, nil
}

// object edits the pods of an object, or of all objects of a list, and has every
// edit written. path leads to the object.
func (o Options) object(v any, path []string, write func([]string, edit) error) ([]Result, error) {
	obj := dictOf(v)
	kind, _ := obj["kind"].(string)
	version, _ := obj["apiVersion"].(string)
	if group, _, grouped := strings.Cut(version, "/"); grouped && !groups[group] {
		return nil, nil
	}
	of, list := strings.CutSuffix(kind, "List")
	if _, known := templates[of]; list && (known || of == "") {
		var all []Result
		var errs []error
		for i, item := range seqOf(obj["items"]) {
			if of != "" && dictOf(item)["kind"] == nil {
				// The API's own lists do not repeat it.
				some, err := o.workload(of, dictOf(item), join(path, "items", fmt.Sprint(i)), write)
				all, errs = append(all, some...), append(errs, err)
				continue
			}
			some, err := o.object(item, join(path, "items", fmt.Sprint(i)), write)
			all, errs = append(all, some...), append(errs, err)
		}
		return all, errors.Join(errs...)
	}
	return o.workload(kind, obj, path, write)
}

// workload edits the pod of an object of a kind, if that is one that has pods.
func (o Options) workload(kind string, obj dict, path []string, write func([]string, edit) error) ([]Result, error) {
	below, known := templates[kind]
	if !known {
		return nil, nil
	}
	name, _ := dictOf(obj["metadata"])["name"].(string)
	workload := strings.TrimSuffix(kind+" "+name, " ")
	pod := obj
	for _, key := range below {
		if pod = dictOf(pod[key]); pod == nil {
			return nil, fmt.Errorf("%s: %w", workload, refuse("it has no %s", strings.Join(below, ".")))
		}
	}
	edits, err := o.plan(pod)
	for i := 0; i < len(edits) && err == nil; i++ {
		err = write(join(path, below...), edits[i])
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", workload, err)
	}
	return []Result{{Workload: workload, Changed: len(edits) > 0}}, nil
}

// join makes a path of its own.
func join(path []string, more ...string) []string {
	return append(append([]string(nil), path...), more...)
}
