package webhook

import (
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
	// smallMax is as much of a body as is read of many at a time. What is longer, which
	// hardly any pod is, takes ten times as much memory to look at, and anybody in the
	// cluster may send it: one at a time.
	smallMax = 128 << 10
	// busyMax is how many are looked at at a time.
	busyMax = 8
	// patience is how long one that is long may wait: as long as an API server does.
	patience = 5 * time.Second
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

// server answers in bounded memory.
type server struct {
	Options
	patience time.Duration
	long     chan struct{} // has the one that reads a body longer than smallMax
	busy     chan struct{} // has those that are looked at; nobody waits for a client with it
}

func newServer(o Options) *server {
	return &server{Options: o, patience: patience, long: make(chan struct{}, 1), busy: make(chan struct{}, busyMax)}
}

// Handler answers reviews at [Path], and probes at /ready and /live.
func Handler(o Options) http.Handler { return newServer(o).handler() }

func (s *server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+Path, s.serve)
	well := func(http.ResponseWriter, *http.Request) {}
	mux.HandleFunc("GET /ready", well)
	mux.HandleFunc("GET /live", well)
	return mux
}

// errBusy means that another long body is being read.
var errBusy = errors.New("another review as long as this one is being looked at")

// read returns the body, which done is called after.
func (s *server) read(w http.ResponseWriter, r *http.Request) (body []byte, done func(), err error) {
	all := http.MaxBytesReader(w, r.Body, bodyMax)
	done = func() {}
	body, err = io.ReadAll(io.LimitReader(all, smallMax+1))
	if err != nil || len(body) <= smallMax {
		return body, done, err
	}
	wait := time.NewTimer(s.patience)
	defer wait.Stop()
	select {
	case s.long <- struct{}{}:
		done = func() { <-s.long }
	case <-wait.C:
		return nil, done, errBusy
	}
	rest, err := io.ReadAll(all)
	return append(body, rest...), done, err
}

// serve answers one request. What is no review is the caller's error; everything
// else has an answer in a review.
func (s *server) serve(w http.ResponseWriter, r *http.Request) {
	body, done, err := s.read(w, r)
	defer done()
	if err != nil {
		code := http.StatusBadRequest
		var long *http.MaxBytesError
		switch {
		case errors.Is(err, errBusy):
			code = http.StatusServiceUnavailable
		case errors.As(err, &long):
			code = http.StatusRequestEntityTooLarge
		}
		http.Error(w, err.Error(), code)
		return
	}
	out, code, err := s.review(body)
	if err != nil {
		http.Error(w, err.Error(), code)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if _, err := w.Write(out); err != nil {
		s.Log.Warn("the answer to a review was not taken", "error", err)
	}
}

// review answers what is in a body, or says with which status it is refused.
func (s *server) review(body []byte) (answer []byte, code int, err error) {
	s.busy <- struct{}{}
	defer func() { <-s.busy }()
	var in review
	if err := json.Unmarshal(body, &in); err != nil {
		return nil, http.StatusBadRequest, fmt.Errorf("read the review: %w", err)
	}
	if in.APIVersion != reviewVersion || in.Kind != reviewKind || in.Request == nil {
		return nil, http.StatusBadRequest, fmt.Errorf("want a request in an %s of %s, got %s of %s", reviewKind, reviewVersion, in.Kind, in.APIVersion)
	}
	answer, err = json.Marshal(review{APIVersion: reviewVersion, Kind: reviewKind, Response: s.answer(in.Request)})
	return answer, http.StatusInternalServerError, err
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
