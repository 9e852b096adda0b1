package config

// positions is where the values of a configuration stand in its file, by key.
type positions struct {
	file string
	keys []keyPosition
}

type keyPosition struct {
	key string
	position
}

// Where returns the place of the value at path, such as services[0].attempts or
// deny[2], in the form pillion.yaml:12:5; empty if it is in no file.
func (c *Config) Where(path string) string { return "" }

// Where returns the place of one of the service's keys, such as attempts; of the
// service itself for an empty key. Empty if it is in no file.
func (s *Service) Where(key string) string { return "" }
