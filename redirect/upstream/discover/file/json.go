package file

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"unicode/utf8"
)

// readJSON reads one value, or returns nil if there is none.
func readJSON(p *problems, data []byte) *node {
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	p.checkText(data)
	if !p.none() || len(bytes.TrimSpace(data)) == 0 {
		return nil
	}
	r := &jsonReader{p: p, data: data, at: position{1, 1}}
	var whole json.RawMessage
	if err := json.Unmarshal(data, &whole); err != nil {
		at := len(data)
		if e, ok := errors.AsType[*json.SyntaxError](err); ok {
			at = int(e.Offset)
			// Else the offset is after the character that is wrong.
			if !strings.HasPrefix(e.Error(), "unexpected end") {
				at = max(at-1, 0)
			}
		}
		p.add(r.place(at), "not JSON: %v", err)
		return nil
	}
	r.decoder = json.NewDecoder(bytes.NewReader(data))
	r.decoder.UseNumber()
	return r.value(0)
}

// jsonReader walks over what is known to be JSON.
type jsonReader struct {
	p       *problems
	data    []byte
	decoder *json.Decoder
	// offset is at, in bytes.
	offset int
	at     position
	values int // read so far
}

// next returns the next token, or nil, and where it begins.
func (r *jsonReader) next() (json.Token, position) {
	begin := int(r.decoder.InputOffset())
	for begin < len(r.data) && bytes.IndexByte([]byte(" \t\r\n,:"), r.data[begin]) >= 0 {
		begin++
	}
	at := r.place(begin)
	t, err := r.decoder.Token()
	if err != nil {
		r.p.add(at, "not JSON: %v", err)
		return nil, at
	}
	return t, at
}

func (r *jsonReader) value(depth int) *node {
	t, at := r.next()
	n := &node{at: at}
	if r.values++; r.values > maxValues {
		r.p.add(at, "more than %d values: these are no endpoints", maxValues)
		return n
	}
	switch t := t.(type) {
	case string:
		n.kind, n.text = isText, t
	case json.Number:
		n.kind, n.text = isNumber, t.String()
	case bool:
		n.kind = isBool
	case json.Delim:
		if depth == maxDepth {
			r.p.add(at, "more than %d levels deep: these are no endpoints", maxDepth)
			return n
		}
		n.kind = isList
		if t == '{' {
			n.kind = isMapping
		}
		for r.decoder.More() && r.p.none() {
			if t == '[' {
				n.items = append(n.items, r.value(depth+1))
				continue
			}
			key, at := r.next()
			name, _ := key.(string)
			n.members = append(n.members, member{key: name, at: at, value: r.value(depth + 1)})
		}
		if r.p.none() {
			r.next() // the bracket that ends it
		}
	default:
	}
	return n
}

// place returns where the byte at offset is; offsets only grow.
func (r *jsonReader) place(offset int) position {
	for r.offset < offset && r.offset < len(r.data) {
		c, size := utf8.DecodeRune(r.data[r.offset:])
		r.offset += size
		r.at.column++
		if c == '\n' {
			r.at = position{r.at.line + 1, 1}
		}
	}
	return r.at
}
