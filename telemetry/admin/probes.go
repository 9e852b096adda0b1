package admin

import "net/http"

// Probes answers GET /ready and /live as [API.Ready] and [API.Live] do, and tells
// nothing else: it may listen where anybody can ask.
func Probes(api API) http.Handler {
	mux := http.NewServeMux()
	for path, ask := range map[string]func() error{"GET /ready": api.Ready, "GET /live": api.Live} {
		if ask == nil {
			continue
		}
		mux.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) {
			if err := ask(); err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
			_, _ = w.Write([]byte("ok\n"))
		})
	}
	return mux
}
