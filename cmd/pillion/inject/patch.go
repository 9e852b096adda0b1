package inject

import (
	"encoding/json"
	"fmt"
	"strings"
)

// operation is one of RFC 6902.
type operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

// Patch returns the JSON patch that puts Pillion beside the pods of an object in
// JSON: nil, if nothing has to be done.
func (o Options) Patch(object []byte) ([]byte, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	v, err := decodeJSON(object)
	if err != nil {
		return nil, err
	}
	var all []operation
	_, err = o.object(v, nil, func(base []string, e edit) error {
		op := operation{Op: map[kind]string{add: "add", replace: "replace", remove: "remove"}[e.kind], Value: e.value}
		for _, p := range join(base, e.path...) {
			op.Path += "/" + pointer.Replace(p)
		}
		all = append(all, op)
		return nil
	})
	if err != nil || len(all) == 0 {
		return nil, err
	}
	b, err := json.Marshal(all)
	if err != nil {
		return nil, fmt.Errorf("write the patch: %w", err)
	}
	return b, nil
}

// pointer writes a key as RFC 6901 wants it.
var pointer = strings.NewReplacer("~", "~0", "/", "~1")
