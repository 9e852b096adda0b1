package metrics

import (
	"bufio"
	"compress/gzip"
	"io"
	"net/http"
	"strings"

	"github.com/prometheus/common/expfmt"
)

// Handler serves the metrics, as text. A metric that cannot be read does not take
// the others with it.
func (m *Metrics) Handler() http.Handler { return http.HandlerFunc(m.serve) }

func (m *Metrics) serve(w http.ResponseWriter, r *http.Request) {
	// An error comes with what could be read.
	families, err := m.registry.Gather()
	if err != nil && len(families) == 0 {
		http.Error(w, "read the metrics: "+err.Error(), http.StatusInternalServerError)
		return
	}
	if m.before != nil {
		m.before()
	}
	w.Header().Set("Content-Type", string(expfmt.NewFormat(expfmt.TypeTextPlain)))
	w.Header().Set("Vary", "Accept-Encoding")
	var to io.Writer = w
	if acceptsGzip(r.Header.Get("Accept-Encoding")) {
		w.Header().Set("Content-Encoding", "gzip")
		// Its errors are those of the connection: whoever asked is gone.
		z, _ := gzip.NewWriterLevel(w, gzip.BestSpeed)
		defer z.Close()
		to = z
	}
	out := bufio.NewWriterSize(to, 16<<10)
	defer out.Flush()
	for _, f := range m.addBase(families) {
		if _, err := expfmt.MetricFamilyToText(out, f); err != nil {
			return
		}
	}
	if m.endpoints != nil {
		_ = (&endpoints{source: m.endpoints}).write(out)
	}
}

// acceptsGzip reads the header Accept-Encoding.
func acceptsGzip(header string) bool {
	for part := range strings.SplitSeq(header, ",") {
		name, quality, _ := strings.Cut(strings.TrimSpace(part), ";")
		if name == "gzip" || name == "*" {
			return strings.ReplaceAll(quality, " ", "") != "q=0"
		}
	}
	return false
}
