package inject

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
)

const deployment = `- apiVersion: apps/v1
  kind: Deployment
  metadata:
    name: d%d
  spec:
    template:
      metadata:
        labels:
          app: d
      spec:
        containers:
        - name: app
          image: app
`

// list is one of n Deployments, and all of it one document.
func list(n int) []byte {
	var b bytes.Buffer
	b.WriteString("apiVersion: v1\nkind: List\nitems:\n")
	for i := range n {
		fmt.Fprintf(&b, deployment, i)
	}
	return b.Bytes()
}

// TestListIsLinear wants a list's work to grow as its length does. What is allocated
// counts, not the time: whoever copies or parses the whole document for each element
// allocates the square of it.
func TestListIsLinear(t *testing.T) {
	spent := func(n int) uint64 {
		t.Helper()
		in := list(n)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, results, err := options().Manifest(in)
		runtime.ReadMemStats(&after)
		if err != nil || len(results) != n || !results[n-1].Changed {
			t.Fatalf("%d of %d results: %v", len(results), n, err)
		}
		return after.TotalAlloc - before.TotalAlloc
	}
	spent(1) // what is made once
	few, many := spent(10), spent(80)
	t.Logf("%d bytes for 10 elements, %d for 80", few, many)
	if many > 12*few {
		t.Errorf("8 times the elements take %.1f times the memory", float64(many)/float64(few))
	}
}

// TestListAsAlone wants an element of a list to become what it becomes in a list of its
// own, whatever stands around it.
func TestListAsAlone(t *testing.T) {
	const head = "apiVersion: v1\nkind: List\nitems:\n"
	alone := func(i int) string {
		t.Helper()
		out, _, err := options().Manifest([]byte(head + fmt.Sprintf(deployment, i)))
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimPrefix(string(out), head)
	}
	deeper := func(s string) string {
		return strings.TrimSuffix("  "+strings.ReplaceAll(s, "\n", "\n  "), "  ")
	}
	other := "# a comment\n- kind: ConfigMap\n  data:\n    a: |\n      - kind: Pod\n\n    b: \"x\n  y\"\n\n"
	in := func(i int) string { return fmt.Sprintf(deployment, i) }
	for name, of := range map[string]func(func(int) string) string{
		"one":           func(f func(int) string) string { return head + f(1) },
		"others around": func(f func(int) string) string { return head + other + f(1) + other + f(2) + f(3) + other },
		"keys behind": func(f func(int) string) string {
			return "items:\n" + f(1) + other + f(2) + "# b\nkind: List\nmetadata: {}\n"
		},
		"to the right": func(f func(int) string) string { return head + deeper(f(1)+other+f(2)) + "# end\n" },
		"a list in a list": func(f func(int) string) string {
			return head + f(1) + "- kind: List\n  items:\n" + deeper(f(2)+other+f(3)) + "  metadata: {}\n" + f(4)
		},
		"lines of CRLF": func(f func(int) string) string { return strings.ReplaceAll(head+f(1)+f(2), "\n", "\r\n") },
		"lines of CRLF, others around": func(f func(int) string) string {
			folded := strings.ReplaceAll(other, ": |", ": >-")
			return strings.ReplaceAll(head+other+folded+f(1)+"- kind: List\n  items:\n"+deeper(other+f(2))+other+f(3)+folded, "\n", "\r\n")
		},
	} {
		out, _, err := options().Manifest([]byte(of(in)))
		if want := of(alone); err != nil || string(out) != want {
			t.Errorf("%s: %v\n%s\nwant\n%s", name, err, out, want)
		}
	}
}

// TestListRefused wants the line of the document, not of the element.
func TestListRefused(t *testing.T) {
	text := string(list(2)) + "- kind: Pod\n  metadata: {name: a}\n  spec:\n    containers:\n    - name: a\n"
	_, _, err := options().Manifest([]byte(text))
	if want := "line 31: a mapping in flow style"; !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want %q", err, want)
	}
}

func BenchmarkList(b *testing.B) {
	for _, n := range []int{25, 200} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			in := list(n)
			b.SetBytes(int64(len(in)))
			b.ReportAllocs()
			for b.Loop() {
				if _, _, err := options().Manifest(in); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
