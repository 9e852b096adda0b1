package file

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"unicode"
	"unicode/utf8"
)

// position is a place in a file. Both count from 1; columns count characters.
type position struct{ line, column int }

// maxProblems is how many problems one error tells.
const maxProblems = 50

// problems gathers what is wrong with a file.
type problems struct {
	file  string
	found []problem
	more  int // that were found and not kept
}

type problem struct {
	at   position
	text string
}

func (p *problems) add(at position, format string, args ...any) {
	// Those of a list come in order, so what is kept are about the first.
	if len(p.found) == 2*maxProblems {
		p.more++
		return
	}
	p.found = append(p.found, problem{at, fmt.Sprintf(format, args...)})
}

func (p *problems) none() bool { return len(p.found) == 0 }

// join makes one error of all, in the order of the file.
func (p *problems) join() error {
	slices.SortStableFunc(p.found, func(a, b problem) int {
		return cmp.Or(cmp.Compare(a.at.line, b.at.line), cmp.Compare(a.at.column, b.at.column))
	})
	var errs []error
	for i, f := range p.found {
		if i == maxProblems {
			errs = append(errs, fmt.Errorf("and %d more", len(p.found)-i+p.more))
			break
		}
		errs = append(errs, fmt.Errorf("%s:%d:%d: %s", p.file, f.at.line, f.at.column, f.text))
	}
	return errors.Join(errs...)
}

// checkText refuses what is not text: a binary file, UTF-16, a stray control
// character.
func (p *problems) checkText(data []byte) {
	at := position{1, 1}
	for i := 0; i < len(data); {
		r, size := utf8.DecodeRune(data[i:])
		switch {
		case r == utf8.RuneError && size == 1:
			p.add(at, "not UTF-8: want a text file")
			return
		case r == '\n':
			at = position{at.line + 1, 0}
		case unicode.IsControl(r) && r != '\t' && r != '\r':
			p.add(at, "control character %U: want a text file", r)
			return
		default:
		}
		at.column++
		i += size
	}
}
