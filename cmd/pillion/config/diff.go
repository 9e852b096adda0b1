package config

// Changes is what differs between two configurations, and what a reload from the
// one to the other does.
type Changes struct {
	Services []ServiceChange `json:"services,omitempty"`
	// Settings are outside the services.
	Settings []Change `json:"settings,omitempty"`
}

// Change is one value that differs. Old or New is empty where it is not set.
type Change struct {
	Key string `json:"key"`
	Old string `json:"old,omitempty"`
	New string `json:"new,omitempty"`
	// Restart means that a reload does not change it.
	Restart bool `json:"restart,omitempty"`
}

// ServiceChange is a service that differs.
type ServiceChange struct {
	Name string `json:"name"`
	Kind string `json:"kind"` // added, removed or changed
	// Fields are those that differ, with what applies from outside the service.
	Fields []Change `json:"fields,omitempty"`
	// EndpointsAdded, EndpointsRemoved are static ones, by address.
	EndpointsAdded   []string `json:"endpoints_added,omitempty"`
	EndpointsRemoved []string `json:"endpoints_removed,omitempty"`
	// Connections says what becomes of those to the endpoints removed: keep,
	// "close after 30s" or reset. Empty if none was removed.
	Connections string `json:"connections,omitempty"`
}

// Diff tells what differs from old to c.
func (c *Config) Diff(old *Config) Changes { return Changes{} }

// NeedsRestart reports whether a setting is read at the start only, by its path,
// such as relay.workers.
func NeedsRestart(key string) bool { return false }
