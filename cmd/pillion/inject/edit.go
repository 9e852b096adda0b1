package inject

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// kind is what an edit does.
type kind int

const (
	add     kind = iota // a key, or before an element, or after the last
	replace             // what is there
	remove              // what is there
)

// edit changes a pod. Its path is of keys, and indexes of lists at the time when
// the edits before it are done.
type edit struct {
	kind  kind
	path  []string
	value any
}

// ErrRefused means that a pod is one that Pillion cannot be put beside, or not
// without being told to.
var ErrRefused = errors.New("refused")

func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrRefused, fmt.Sprintf(format, args...))
}

// plan returns the edits of a pod, of which pod is the object with metadata and
// spec: none if it is as it should be already, or if its user wants none, or if it only
// shows a kubelet's own.
func (o Options) plan(pod dict) ([]edit, error) {
	spec, ok := pod["spec"].(dict)
	if !ok {
		return nil, refuse("it has no spec")
	}
	annotations := dictOf(dictOf(pod["metadata"])["annotations"])
	if v, _ := annotations[Inject].(string); v == "false" || v == "disabled" {
		return nil, nil
	}
	if _, ok := annotations[mirrored]; ok {
		return nil, nil
	}
	if annotations[Inject] == false {
		return nil, refuse("the annotation %s has a value that is not text: write \"false\", in quotes", Inject)
	}
	_, ours := annotations[Injected]
	if err := o.suits(spec, ours); err != nil {
		return nil, err
	}
	p := planner{pod: pod, spare: annotations[Injected] == o.Version}
	first, beside := o.containers(spec["restartPolicy"] == "Never" || spec["restartPolicy"] == "OnFailure")
	inits, containers := seq{first}, seq(nil)
	if o.Form == Sidecar {
		inits = append(inits, beside)
	} else {
		containers = seq{beside}
	}
	app := firstOther(spec["containers"])
	p.first("initContainers", inits)
	p.first("containers", containers)
	p.last("volumes", o.volumes())
	p.annotate(Injected, o.Version)
	if _, set := annotations[defaultContainer]; o.Form == Container && !set {
		p.annotate(defaultContainer, app)
	}
	return p.edits, nil
}

// suits returns why a pod cannot have Pillion beside it.
func (o Options) suits(spec dict, ours bool) error {
	selector := dictOf(spec["nodeSelector"])
	switch {
	case len(seqOf(spec["containers"])) == 0:
		return refuse("it has no containers")
	case dictOf(spec["os"])["name"] == "windows", selector["kubernetes.io/os"] == "windows", selector["beta.kubernetes.io/os"] == "windows":
		return refuse("it is a pod for Windows")
	case says(spec["hostUsers"], false):
		return refuse("hostUsers: false gives it a user namespace of its own, in which nobody may load BPF programs")
	case says(spec["hostNetwork"], true) && !o.HostNetwork:
		return refuse("it is on the node's network (hostNetwork), whose addresses it shares with others; say that this is meant (--allow-host-network)")
	case ours:
		return nil
	}
	for key, names := range map[string][]string{
		"initContainers": {initName, sidecarName}, "containers": {initName, sidecarName},
		"volumes": {bpfVolume, runVolume, configVolume, cgroupVolume},
	} {
		for _, e := range seqOf(spec[key]) {
			if name, _ := dictOf(e)["name"].(string); slices.Contains(names, name) {
				return refuse("%s has a %s which is not there by injection (no annotation %s)", key, name, Injected)
			}
		}
	}
	return nil
}

// says tells whether v is this truth value for Kubernetes, which reads YAML 1.1: the
// parser here leaves its other words as they are.
func says(v any, truth bool) bool {
	if s, ok := v.(string); ok {
		words := []string{"n", "no", "off"}
		if truth {
			words = []string{"y", "yes", "on"}
		}
		return slices.Contains(words, strings.ToLower(s))
	}
	return v == truth
}

// planner makes edits, and does them.
type planner struct {
	pod   dict
	edits []edit
	// spare tells that what is there was put there by this version: what others
	// have added to it since stays. An API server calls a webhook again when
	// others changed the pod, and gives containers a token and limits itself.
	spare bool
}

func (p *planner) do(e edit) {
	// A copy: later edits must not change what this one is.
	if _, err := apply(p.pod, edit{e.kind, e.path, plain(e.value)}); err != nil {
		panic(fmt.Sprintf("inject: an edit of our own: %v", err))
	}
	p.edits = append(p.edits, e)
}

// isOurs tells by the name.
func isOurs(e any) bool {
	name, _ := dictOf(e)["name"].(string)
	return slices.Contains([]string{initName, sidecarName, bpfVolume, runVolume, configVolume, cgroupVolume}, name)
}

// firstOther returns the name of the first that is not ours.
func firstOther(list any) string {
	for _, e := range seqOf(list) {
		if name, _ := dictOf(e)["name"].(string); !isOurs(e) {
			return name
		}
	}
	return ""
}

// first makes want the beginning of a list, instead of what is ours in it.
func (p *planner) first(key string, want seq) {
	have := seqOf(dictOf(p.pod["spec"])[key])
	begins := len(have) >= len(want)
	for i := range want {
		begins = begins && dictOf(have[i])["name"] == dictOf(want[i])["name"]
	}
	if begins {
		p.trim(key, len(want))
		p.renew(key, 0, want)
		return
	}
	want = p.spared(have, want)
	p.trim(key, 0)
	p.insert(key, 0, want)
}

// last makes want the elements of a list that are ours: where they are if they
// stand together, or else at its end.
func (p *planner) last(key string, want seq) {
	have := seqOf(dictOf(p.pod["spec"])[key])
	at := slices.IndexFunc(have, isOurs)
	together := at >= 0 && at+len(want) <= len(have)
	for i := range want {
		together = together && dictOf(have[at+i])["name"] == dictOf(want[i])["name"]
	}
	if together && !slices.ContainsFunc(have[at+len(want):], isOurs) {
		p.renew(key, at, want)
		return
	}
	want = p.spared(have, want)
	p.trim(key, 0)
	p.insert(key, len(seqOf(dictOf(p.pod["spec"])[key])), want)
}

// trim removes what is ours from an index on.
func (p *planner) trim(key string, from int) {
	have := seqOf(dictOf(p.pod["spec"])[key])
	for i := len(have) - 1; i >= from; i-- {
		if isOurs(have[i]) {
			p.do(edit{remove, []string{"spec", key, strconv.Itoa(i)}, nil})
		}
	}
}

func (p *planner) renew(key string, from int, want seq) {
	for i, w := range want {
		have := seqOf(dictOf(p.pod["spec"])[key])[from+i]
		if !same(have, w) && !(p.spare && covers(plain(have), plain(w))) {
			p.do(edit{replace, []string{"spec", key, strconv.Itoa(from + i)}, w})
		}
	}
}

// spared returns what is to be put elsewhere: with what others have added to it, which
// an API server that has called every webhook again does not do once more.
func (p *planner) spared(have, want seq) seq {
	if !p.spare {
		return want
	}
	want = slices.Clone(want)
	for i, w := range want {
		same := func(h any) bool { return dictOf(h)["name"] == dictOf(w)["name"] && covers(plain(h), plain(w)) }
		if at := slices.IndexFunc(have, same); at >= 0 {
			want[i] = have[at]
		}
	}
	return want
}

func (p *planner) insert(key string, from int, want seq) {
	if len(want) == 0 {
		return
	}
	if len(seqOf(dictOf(p.pod["spec"])[key])) == 0 {
		p.do(edit{add, []string{"spec", key}, want})
		return
	}
	for i, w := range want {
		p.do(edit{add, []string{"spec", key, strconv.Itoa(from + i)}, w})
	}
}

func (p *planner) annotate(key, value string) {
	meta := dictOf(p.pod["metadata"])
	have := dictOf(meta["annotations"])
	switch old, ok := have[key]; {
	case ok && old == value:
	case ok:
		p.do(edit{replace, []string{"metadata", "annotations", key}, value})
	case len(have) > 0:
		p.do(edit{add, []string{"metadata", "annotations", key}, value})
	case len(meta) > 0:
		p.do(edit{add, []string{"metadata", "annotations"}, dict{key: value}})
	default:
		p.do(edit{add, []string{"metadata"}, dict{"annotations": dict{key: value}}})
	}
}

// apply does an edit to what YAML or JSON decoded, in place where it can, and
// returns the result.
func apply(v any, e edit) (any, error) {
	if len(e.path) == 0 {
		return e.value, nil
	}
	key, rest := e.path[0], e
	rest.path = e.path[1:]
	switch w := v.(type) {
	case dict:
		if len(rest.path) == 0 && e.kind == remove {
			delete(w, key)
			return w, nil
		}
		below, err := apply(w[key], rest)
		w[key] = below
		return w, err
	case seq:
		i, err := strconv.Atoi(key)
		if err != nil || i < 0 || i > len(w) || i == len(w) && (e.kind != add || len(rest.path) > 0) {
			return v, fmt.Errorf("no element %s in a list of %d", key, len(w))
		}
		switch {
		case len(rest.path) == 0 && e.kind == add:
			return slices.Insert(slices.Clone(w), i, e.value), nil
		case len(rest.path) == 0 && e.kind == remove:
			return slices.Delete(slices.Clone(w), i, i+1), nil
		}
		w[i], err = apply(w[i], rest)
		return w, err
	}
	return v, fmt.Errorf("nothing has the key %s", strings.Join(e.path, "."))
}

// same compares what was decoded: numbers by their value, whatever their type.
func same(a, b any) bool { return reflect.DeepEqual(plain(a), plain(b)) }

// covers tells whether have is all of want, and maybe more: further keys, and
// further elements of lists of mappings. Both are plain.
func covers(have, want any) bool {
	switch w := want.(type) {
	case dict:
		h := dictOf(have)
		for k := range w {
			if _, ok := h[k]; !ok || !covers(h[k], w[k]) {
				return false
			}
		}
		return h != nil
	case seq:
		if len(w) == 0 || dictOf(w[0]) == nil {
			return reflect.DeepEqual(have, want)
		}
		for _, e := range w {
			if !slices.ContainsFunc(seqOf(have), func(h any) bool { return covers(h, e) }) {
				return false
			}
		}
		return true
	}
	return reflect.DeepEqual(have, want)
}

// plain returns a copy in which every whole number is an int64.
func plain(v any) any {
	switch w := v.(type) {
	case dict:
		c := make(dict, len(w))
		for k, e := range w {
			c[k] = plain(e)
		}
		return c
	case seq:
		c := make(seq, len(w))
		for i, e := range w {
			c[i] = plain(e)
		}
		return c
	case int:
		return int64(w)
	case uint64:
		if w <= 1<<62 {
			return int64(w)
		}
	case json.Number:
		if n, err := w.Int64(); err == nil {
			return n
		}
	case float64:
		if n := int64(w); float64(n) == w {
			return n
		}
	}
	return v
}

func dictOf(v any) dict { d, _ := v.(dict); return d }
func seqOf(v any) seq   { s, _ := v.(seq); return s }
