package spelling

import (
	"strings"

	"github.com/goccy/go-yaml/token"
)

// MendColons puts together what the lexer took apart: in a list that is in
// braces it takes 192.0.2.1:80 for a mapping of one key, although a colon ends a
// word only before a space. (goccy/go-yaml issue 832.)
func MendColons(tokens token.Tokens) token.Tokens {
	var mended token.Tokens
	var open []token.Type // brackets
	for i := 0; i < len(tokens); i++ {
		t := tokens[i]
		switch t.Type {
		case token.SequenceStartType, token.MappingStartType:
			open = append(open, t.Type)
		case token.SequenceEndType, token.MappingEndType:
			open = open[:max(len(open)-1, 0)]
		case token.MappingValueType:
			inList := len(open) > 0 && open[len(open)-1] == token.SequenceStartType
			if !inList || i+1 == len(tokens) || !isWord(tokens[i+1]) || startsWithSpace(tokens[i+1].Origin) {
				break
			}
			rest := tokens[i+1]
			i++
			t = token.String(":"+rest.Value, ":"+rest.Origin, t.Position)
			// Nothing is before the colon of ::1.
			if n := len(mended); n > 0 && isWord(mended[n-1]) {
				first := mended[n-1]
				mended = mended[:n-1]
				t = token.String(first.Value+t.Value, first.Origin+t.Origin, first.Position)
			}
		default:
		}
		mended.Add(t)
	}
	return mended
}

// isWord reports whether t is a scalar without quotes.
func isWord(t *token.Token) bool {
	switch t.Type {
	case token.StringType, token.IntegerType, token.FloatType, token.BoolType, token.NullType,
		token.BinaryIntegerType, token.OctetIntegerType, token.HexIntegerType, token.InfinityType, token.NanType:
		return true
	default:
		return false
	}
}

func startsWithSpace(s string) bool { return s == "" || strings.ContainsRune(" \t\r\n", rune(s[0])) }
