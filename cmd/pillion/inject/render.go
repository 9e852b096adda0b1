package inject

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// order is that of keys, as people write them. Others come behind.
var order = []string{
	"name", "image", "restartPolicy", "args", "env", "valueFrom", "startupProbe", "livenessProbe",
	"exec", "periodSeconds", "timeoutSeconds", "failureThreshold", "terminationGracePeriodSeconds", "securityContext",
	"runAsUser", "runAsGroup", "runAsNonRoot", "privileged", "allowPrivilegeEscalation",
	"readOnlyRootFilesystem", "capabilities", "drop", "add", "seccompProfile", "resources", "volumeMounts",
	"mountPath", "path", "type",
}

func keys(d dict) []string {
	place := func(k string) int {
		if i := slices.Index(order, k); i >= 0 {
			return i
		}
		return len(order)
	}
	all := slices.Sorted(maps.Keys(d))
	slices.SortStableFunc(all, func(a, b string) int { return place(a) - place(b) })
	return all
}

// item writes an element of a list whose dashes are at column c.
func (t *text) item(v any, c int) []string {
	d, ok := v.(dict)
	if !ok {
		return []string{strings.Repeat(" ", c) + "- " + scalar(v)}
	}
	lines := t.pairs(d, c+2)
	lines[0] = strings.Repeat(" ", c) + "- " + lines[0][c+2:]
	return lines
}

func (t *text) pairs(d dict, c int) []string {
	var lines []string
	for _, k := range keys(d) {
		lines = append(lines, t.pair(k, d[k], c)...)
	}
	return lines
}

// pair writes a key at column c, and its value.
func (t *text) pair(key string, v any, c int) []string {
	head := strings.Repeat(" ", c) + scalar(key) + ":"
	switch w := v.(type) {
	case dict:
		if len(w) > 0 {
			return append([]string{head}, t.pairs(w, c+2)...)
		}
	case seq:
		if words, ok := flow(w); ok {
			return []string{head + " " + words}
		}
		lines := []string{head}
		for _, e := range w {
			lines = append(lines, t.item(e, c+t.offset)...)
		}
		return lines
	}
	return []string{head + " " + scalar(v)}
}

// flow writes a list of scalars in one line.
func flow(s seq) (string, bool) {
	var words []string
	for _, e := range s {
		switch e.(type) {
		case dict, seq:
			return "", false
		}
		words = append(words, scalar(e))
	}
	return "[" + strings.Join(words, ", ") + "]", true
}

var (
	plainText = regexp.MustCompile(`^((--)?[A-Za-z/][-A-Za-z0-9_./]*(:[-A-Za-z0-9_./]+)*(@sha256:[0-9a-f]{64})?|[0-9]+(m|Mi|s))$`)
	notText   = regexp.MustCompile(`^(?i:y|n|yes|no|on|off|true|false|null|nan|inf)$`)
)

// scalar writes a value that cannot be taken for one of another type.
func scalar(v any) string {
	s, ok := v.(string)
	switch {
	case !ok && v == nil:
		return "null"
	case !ok:
		if d, ok := v.(dict); ok && len(d) == 0 {
			return "{}"
		}
		return fmt.Sprint(v)
	case plainText.MatchString(s) && !notText.MatchString(s):
		return s
	default:
		return strconv.Quote(s)
	}
}
