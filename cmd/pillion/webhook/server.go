package webhook

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/pillion-project/pillion/cmd/pillion/inject"
)

const (
	// Path is where reviews are asked for.
	Path = "/mutate"

	reviewVersion = "admission.k8s.io/v1"
	reviewKind    = "AdmissionReview"
	// bodyMax is more than an object in etcd may have, twice: the old one comes
	// too.
	bodyMax = 7 << 20
	// endMax is how long requests may go on when the server ends.
	endMax = 10 * time.Second
)

// Options say how a server answers.
type Options struct {
	Inject inject.Options
	// Admit lets a pod in, with a warning and without Pillion, that Pillion cannot
	// be put beside. Otherwise it is denied.
	Admit bool
	Log   *slog.Logger
}

// The parts of an AdmissionReview that are used here.
type (
	review struct {
		APIVersion string    `json:"apiVersion"`
		Kind       string    `json:"kind"`
		Request    *request  `json:"request,omitempty"`
		Response   *response `json:"response,omitempty"`
	}
	request struct {
		UID       string `json:"uid"`
		Operation string `json:"operation"`
		Kind      struct {
			Kind string `json:"kind"`
		} `json:"kind"`
		Namespace string          `json:"namespace"`
		Name      string          `json:"name"`
		Object    json.RawMessage `json:"object"`
	}
	response struct {
		UID       string   `json:"uid"`
		Allowed   bool     `json:"allowed"`
		PatchType string   `json:"patchType,omitempty"`
		Patch     []byte   `json:"patch,omitempty"`
		Status    *status  `json:"status,omitempty"`
		Warnings  []string `json:"warnings,omitempty"`
	}
	status struct {
		Message string `json:"message"`
		Code    int    `json:"code"`
	}
)

// Handler answers reviews at [Path], and probes at /ready and /live.
func Handler(o Options) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+Path, o.serve)
	well := func(http.ResponseWriter, *http.Request) {}
	mux.HandleFunc("GET /ready", well)
	mux.HandleFunc("GET /live", well)
	return mux
}

// serve answers one request. What is no review is the caller's error; everything
// else has an answer in a review.
func (o Options) serve(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, bodyMax))
	if err != nil {
		http.Error(w, err.Error(), http.StatusRequestEntityTooLarge)
		return
	}
	var in review
	if err := json.Unmarshal(body, &in); err != nil {
		http.Error(w, fmt.Sprintf("read the review: %v", err), http.StatusBadRequest)
		return
	}
	if in.APIVersion != reviewVersion || in.Kind != reviewKind || in.Request == nil {
		http.Error(w, fmt.Sprintf("want a request in an %s of %s, got %s of %s", reviewKind, reviewVersion, in.Kind, in.APIVersion), http.StatusBadRequest)
		return
	}
	var out bytes.Buffer
	if err := json.NewEncoder(&out).Encode(review{APIVersion: reviewVersion, Kind: reviewKind, Response: o.answer(in.Request)}); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if _, err := w.Write(out.Bytes()); err != nil {
		o.Log.Warn("the answer to a review was not taken", "error", err)
	}
}

// answer decides on one object.
func (o Options) answer(r *request) *response {
	a := &response{UID: r.UID, Allowed: true}
	if r.Operation != "CREATE" && r.Operation != "UPDATE" || len(r.Object) == 0 {
		return a
	}
	log := o.Log.With("kind", r.Kind.Kind, "namespace", r.Namespace, "name", r.Name)
	patch, err := o.Inject.Patch(r.Object)
	switch {
	case errors.Is(err, inject.ErrRefused) && o.Admit:
		log.Warn("admitted without Pillion", "error", err)
		a.Warnings = []string{"admitted without Pillion: " + err.Error()}
	case err != nil:
		log.Warn("denied", "error", err)
		a.Allowed = false
		a.Status = &status{Message: "pillion: " + err.Error(), Code: http.StatusForbidden}
	case patch != nil:
		log.Info("injected")
		a.PatchType, a.Patch = "JSONPatch", patch
	}
	return a
}

// Serve serves ln with TLS until ctx is done, and then the requests that are
// there. It closes ln.
func Serve(ctx context.Context, ln net.Listener, o Options, c *Certificate) error {
	s := &http.Server{
		Handler:           Handler(o),
		TLSConfig:         &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: c.Get},
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		ErrorLog:          slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug),
	}
	ended := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		patience, done := context.WithTimeout(context.Background(), endMax)
		defer done()
		ended <- s.Shutdown(patience)
	})
	err := s.ServeTLS(ln, "", "")
	if stop() {
		return fmt.Errorf("serve reviews: %w", errors.Join(err, s.Close()))
	}
	if err := <-ended; err != nil {
		return fmt.Errorf("end the webhook: %w", errors.Join(err, s.Close()))
	}
	return nil
}
