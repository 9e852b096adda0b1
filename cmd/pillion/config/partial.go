package config

import "errors"

// Refused is a part of a configuration that was not taken.
type Refused struct {
	// Name is the service's, as far as it could be read; the section's if it is
	// no service.
	Name string
	// Source is true if only the service's source of endpoints was refused.
	Source bool
	// Where is the first problem's place: pillion.yaml:12:5.
	Where string
	// Text is all its problems, one a line, each with its place.
	Text string
	// Kept says what stays: the name of the service whose last good state is in
	// the configuration, or empty if there is nothing to keep.
	Kept string
}

// LoadPartial reads the configuration in the file at path for a process that has
// one, last. Each service and source is taken or refused by itself, and one that
// is refused is in the configuration as it was in last. An error, as of [Load],
// means that nothing was taken: it is not YAML, or there are problems outside
// the services.
func LoadPartial(path string, last *Config) (*Config, []Refused, error) {
	return nil, nil, errors.New("not built yet")
}
