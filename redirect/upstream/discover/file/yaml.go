package file

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
	"github.com/pillion-project/pillion/redirect/upstream/discover/spelling"
)

// maxKeys is how many keys a mapping may have: the parser needs time by their
// square.
const maxKeys = 256

// refused is the part of YAML that is not taken, as in the configuration.
var refused = map[token.Type]string{
	token.AnchorType:     "anchors are not taken: write the value out where it is meant",
	token.AliasType:      "aliases are not taken: write the value out (and quote a text that begins with *)",
	token.MergeKeyType:   "merge keys are not taken: write the keys out",
	token.TagType:        "tags are not taken: write the value alone (and quote a text that begins with !)",
	token.MappingKeyType: "a key after ? is not taken: write KEY: VALUE",
	token.DirectiveType:  "directives are not taken: leave the line out",
}

// bareBrackets finds an IPv6 address and port without quotes, which YAML takes
// for a list.
var bareBrackets = regexp.MustCompile(`(^|[^"'\w])\[[0-9a-fA-F:./%]*:[0-9a-fA-F:./%]*\]:?\d`)

// readYAML reads the one document in data, or returns nil if there is none.
func readYAML(p *problems, data []byte) *node {
	if len(data) > maxYAML {
		p.add(position{1, 1}, "more than %d bytes of YAML: want JSON for so many endpoints", maxYAML)
		return nil
	}
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	// YAML ends lines in three ways; the positions are to mean the same in all.
	data = bytes.ReplaceAll(data, []byte("\r\n"), []byte("\n"))
	data = bytes.ReplaceAll(data, []byte("\r"), []byte("\n"))
	p.checkText(data)
	if !p.none() {
		return nil
	}
	tokens := spelling.MendColons(lexer.Tokenize(string(data)))
	checkTokens(p, tokens)
	if !p.none() {
		return nil
	}
	file, err := parse(tokens)
	if err != nil {
		at, text := position{1, 1}, err.Error()
		if e, ok := errors.AsType[yaml.Error](err); ok {
			at, text = tokenPosition(e.GetToken()), e.GetMessage()
		}
		lines := bytes.Split(data, []byte("\n"))
		if at.line <= len(lines) && bareBrackets.Match(lines[at.line-1]) {
			text += ` (quote an IPv6 address that is in brackets: "[::1]:80")`
		}
		p.add(at, "not YAML: %s", text)
		return nil
	}
	var root *node
	for _, doc := range file.Docs {
		switch {
		case doc.Body == nil:
		case root != nil:
			p.add(tokenPosition(doc.Body.GetToken()), "a second document: want one only, without --- in between")
			return nil
		default:
			root = convert(doc.Body)
		}
	}
	return root
}

// parse calls the parser. A panic in it is an error: a typo in a file must not end
// a process that carries connections.
func parse(tokens token.Tokens) (file *ast.File, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("the parser gave up: %v", v)
		}
	}()
	return parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
}

// checkTokens refuses the parts of YAML that are not taken, and what is too deep
// or too wide for the parser, which needs memory by the square of the depth.
func checkTokens(p *problems, tokens token.Tokens) {
	type block struct{ column, keys int }
	var blocks []block
	flow := 0
	if len(tokens) > maxValues {
		p.add(position{1, 1}, "more than %d words: want JSON for so many endpoints", maxValues)
		return
	}
	for _, t := range tokens {
		if text, ok := refused[t.Type]; ok && len(p.found) < maxProblems {
			p.add(tokenPosition(t), "%s", text)
		}
		column := 0
		switch t.Type {
		case token.SequenceStartType, token.MappingStartType:
			flow++
		case token.SequenceEndType, token.MappingEndType:
			flow = max(flow-1, 0)
		case token.SequenceEntryType:
			column = t.Position.Column
		case token.MappingValueType:
			if flow == 0 && t.Prev != nil {
				column = t.Prev.Position.Column
			}
		default:
		}
		if column > 0 {
			for len(blocks) > 0 && blocks[len(blocks)-1].column > column {
				blocks = blocks[:len(blocks)-1]
			}
			if len(blocks) == 0 || blocks[len(blocks)-1].column < column {
				blocks = append(blocks, block{column: column})
			}
		}
		if column > 0 && t.Type == token.MappingValueType {
			blocks[len(blocks)-1].keys++
		}
		if t.Type == token.SequenceEntryType {
			// The mappings of a list's items stand in the same column.
			blocks[len(blocks)-1].keys = 0
		}
		switch {
		case len(blocks)+flow > maxDepth:
			p.add(tokenPosition(t), "more than %d levels deep: these are no endpoints", maxDepth)
			return
		case len(blocks) > 0 && blocks[len(blocks)-1].keys > maxKeys:
			p.add(tokenPosition(t), "more than %d keys in one mapping: these are no endpoints", maxKeys)
			return
		default:
		}
	}
}

func tokenPosition(t *token.Token) position {
	if t == nil || t.Position == nil {
		return position{1, 1}
	}
	return position{max(t.Position.Line, 1), max(t.Position.Column, 1)}
}

// convert makes a node of the parser's.
func convert(from ast.Node) *node {
	if from == nil {
		return &node{}
	}
	n := &node{at: tokenPosition(from.GetToken())}
	switch f := from.(type) {
	case *ast.SequenceNode:
		n.kind = isList
		for i, item := range f.Values {
			v := convert(item)
			if v.kind == isNull && i < len(f.Entries) {
				v.at = tokenPosition(f.Entries[i].Start)
			}
			n.items = append(n.items, v)
		}
	case ast.MapNode:
		n.kind = isMapping
		for entries := f.MapRange(); entries.Next(); {
			key := entries.Key().GetToken()
			m := member{key: key.Value, at: tokenPosition(key), value: convert(entries.Value())}
			if m.value.kind == isNull {
				m.value.at = m.at
			}
			n.members = append(n.members, m)
		}
		if len(n.members) > 0 {
			n.at = n.members[0].at
		}
	case *ast.StringNode:
		n.kind, n.text = isText, f.Value
	case *ast.LiteralNode:
		n.kind, n.text = isText, f.Value.Value
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		n.kind, n.text = isNumber, from.GetToken().Value
	case *ast.BoolNode:
		n.kind, n.text = isBool, from.GetToken().Value
	default:
		n.kind = isNull
	}
	return n
}
