package config

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"unicode"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
	"github.com/pillion-project/pillion/redirect/upstream/discover/spelling"
)

// The parser needs memory by the square of the depth and time by the square of
// the keys of one mapping. No configuration comes near these.
const (
	maxDepth = 16
	maxKeys  = 256
)

// refused is the part of YAML that a configuration does not have. It is all
// about saying one thing in another place, where a reader does not look.
var refused = map[token.Type]string{
	token.AnchorType:     "anchors are not taken: write the value out where it is meant",
	token.AliasType:      "aliases are not taken: write the value out (and quote a text that begins with *)",
	token.MergeKeyType:   "merge keys are not taken: write the keys out",
	token.TagType:        "tags are not taken: write the value alone (and quote a text that begins with !)",
	token.MappingKeyType: "a key after ? is not taken: write KEY: VALUE",
	token.DirectiveType:  "directives are not taken: leave the line out",
}

// parseYAML returns the one document in data, of at most so many bytes, or nil if
// there is none.
func parseYAML(w *places, data []byte, most int) (ast.Node, error) {
	if len(data) > most {
		return nil, w.error(position{1, 1}, fmt.Sprintf("more than %d bytes: this is no configuration", most))
	}
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	// YAML ends lines in three ways; the positions are to mean the same in all.
	data = bytes.ReplaceAll(data, []byte("\r\n"), []byte("\n"))
	data = bytes.ReplaceAll(data, []byte("\r"), []byte("\n"))
	if err := checkText(w, data); err != nil {
		return nil, err
	}
	tokens := spelling.MendColons(lexer.Tokenize(string(data)))
	if err := checkTokens(w, tokens); err != nil {
		return nil, err
	}
	file, err := parse(tokens)
	if err != nil {
		return nil, syntaxError(w, data, err)
	}
	var body ast.Node
	for _, doc := range file.Docs {
		switch {
		case doc.Body == nil:
		case body != nil:
			return nil, w.error(nodePosition(doc.Body), "a second document: want one only, without --- in between")
		default:
			body = doc.Body
		}
	}
	return body, nil
}

// parse calls the parser. A panic in it is an error: it is not ours, and a typo
// in a file must not end a process that carries connections.
func parse(tokens token.Tokens) (file *ast.File, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("the parser gave up: %v", v)
		}
	}()
	// Duplicate keys are found later, with the other problems.
	return parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
}

// checkText refuses what is not text: a binary file, UTF-16, a stray control
// character. The parser takes all of it for parts of words.
func checkText(w *places, data []byte) error {
	at := position{1, 1}
	for i := 0; i < len(data); {
		r, size := utf8.DecodeRune(data[i:])
		switch {
		case r == utf8.RuneError && size == 1:
			return w.error(at, "not UTF-8: want a text file")
		case r == '\n':
			at = position{at.line + 1, 0}
		case unicode.IsControl(r) && r != '\t':
			return w.error(at, fmt.Sprintf("control character %U: want a text file", r))
		default:
		}
		at.column++
		i += size
	}
	return nil
}

// checkTokens refuses the parts of YAML that are not taken and what is too deep
// or too wide for the parser.
func checkTokens(w *places, tokens token.Tokens) error {
	var all joined
	var n nesting
	for _, t := range tokens {
		if text, ok := refused[t.Type]; ok {
			all = append(all, w.error(tokenPosition(t), text))
		}
		if text := n.next(t); text != "" {
			all = append(all, w.error(tokenPosition(t), text))
			break
		}
	}
	return all.err()
}

// nesting follows how deep a token is. In block style a key or a dash that is
// further to the right than the one before is one level deeper; in flow style
// brackets tell.
type nesting struct {
	blocks []block
	flow   int
}

// block is an open level of block style.
type block struct{ column, keys int }

// next takes the next token, and returns what is wrong with its level or "".
func (n *nesting) next(t *token.Token) string {
	switch t.Type {
	case token.SequenceStartType, token.MappingStartType:
		n.flow++
	case token.SequenceEndType, token.MappingEndType:
		n.flow = max(n.flow-1, 0)
	case token.SequenceEntryType:
		n.enter(t.Position.Column)
	case token.MappingValueType:
		if n.flow > 0 || t.Prev == nil {
			return ""
		}
		b := n.enter(t.Prev.Position.Column)
		b.keys++
		if b.keys > maxKeys {
			return fmt.Sprintf("more than %d keys in one mapping: this is no configuration", maxKeys)
		}
	default:
	}
	if len(n.blocks)+n.flow > maxDepth {
		return fmt.Sprintf("more than %d levels deep: this is no configuration", maxDepth)
	}
	return ""
}

// enter makes column the innermost level.
func (n *nesting) enter(column int) *block {
	for len(n.blocks) > 0 && n.blocks[len(n.blocks)-1].column > column {
		n.blocks = n.blocks[:len(n.blocks)-1]
	}
	if len(n.blocks) == 0 || n.blocks[len(n.blocks)-1].column < column {
		n.blocks = append(n.blocks, block{column: column})
	}
	return &n.blocks[len(n.blocks)-1]
}

// bareBrackets finds an IPv6 address and port without quotes, which YAML takes
// for a list.
var bareBrackets = regexp.MustCompile(`(^|[^"'\w])\[[0-9a-fA-F:./%]*:[0-9a-fA-F:./%]*\]:?\d`)

// syntaxError tells what the parser did not like, in our form.
func syntaxError(w *places, data []byte, err error) error {
	at, text := position{1, 1}, err.Error()
	if e, ok := errors.AsType[yaml.Error](err); ok {
		at, text = tokenPosition(e.GetToken()), e.GetMessage()
	}
	text = "not YAML: " + text
	lines := bytes.Split(data, []byte("\n"))
	if at.line <= len(lines) && bareBrackets.Match(lines[at.line-1]) {
		text += ` (quote an IPv6 address that is in brackets: "[::1]:80")`
	}
	return w.error(at, text)
}

func tokenPosition(t *token.Token) position {
	if t == nil || t.Position == nil {
		return position{1, 1}
	}
	return position{max(t.Position.Line, 1), max(t.Position.Column, 1)}
}

// nodePosition returns where n begins, to the eye: a mapping begins with its
// first key and not with that key's colon.
func nodePosition(n ast.Node) position {
	switch n := n.(type) {
	case *ast.MappingNode:
		if !n.IsFlowStyle && len(n.Values) > 0 {
			return tokenPosition(n.Values[0].Key.GetToken())
		}
	case *ast.MappingValueNode:
		return tokenPosition(n.Key.GetToken())
	default:
	}
	return tokenPosition(n.GetToken())
}
