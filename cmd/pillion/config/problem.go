package config

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Problem is one thing that is wrong with a configuration. The errors of [Load],
// [Parse] and [Config.Validate] are made of them.
type Problem struct {
	// File is empty, and Line and Column are 0, where there is no file. They
	// count from 1.
	File   string `json:"file,omitempty"`
	Line   int    `json:"line,omitempty"`
	Column int    `json:"column,omitempty"`
	// Path is that of the value, such as services[0].address, or the flag that said it,
	// or empty.
	Path string `json:"path,omitempty"`
	Text string `json:"text"`
}

// Error implements error.
func (p *Problem) Error() string {
	text := p.Text
	if p.Path != "" {
		text = p.Path + ": " + text
	}
	if p.Line > 0 {
		text = fmt.Sprintf("%s:%d:%d: %s", p.File, p.Line, p.Column, text)
	}
	return text
}

// Problems returns what an error is made of. What is no Problem, such as a file
// that cannot be read, becomes one.
func Problems(err error) []Problem {
	var all []Problem
	for _, err := range split(err) {
		if p, ok := errors.AsType[*Problem](err); ok {
			all = append(all, *p)
		} else {
			all = append(all, Problem{Text: err.Error()})
		}
	}
	return all
}

// problem is one thing that is wrong with a configuration. Its place is a path
// such as services[0].endpoints[1].address, so that it can be told of a
// configuration that came from flags; where there is a file, the file's
// positions are looked up by path.
type problem struct {
	path string
	text string
	// see is the path of what the value clashes with, or empty.
	see string
	// on are the paths of other values that it goes by: what was not understood there
	// may have meant that there is none.
	on []string
	// at is where the problem stands, if not where the value at path does.
	at position
}

// position is a place in a file. Both count from 1; columns count characters.
type position struct{ line, column int }

// maxProblems is how many problems the text of an error tells. Whoever has more has
// one mistake that is repeated, or the wrong file.
const maxProblems = 50

// joined is the error of several problems. Its text is cut short; [Problems] has all.
type joined []error

// Error implements error.
func (j joined) Error() string {
	told := []error(j)
	if n := len(j) - maxProblems; n > 0 {
		told = append(told[:maxProblems:maxProblems], more(n))
	}
	return errors.Join(told...).Error()
}

// Unwrap is for errors.Is and errors.As.
func (j joined) Unwrap() []error { return j }

// err is nil if there is no problem.
func (j joined) err() error {
	if len(j) == 0 {
		return nil
	}
	return j
}

// cutShort returns err with as many problems as its text tells, of which the last says
// how many more there were: a process keeps what it was told of a file.
func cutShort(err error) error {
	j, ok := err.(joined)
	n := len(j) - maxProblems
	if !ok || n <= 0 {
		return err
	}
	kept := slices.Clone(j[:maxProblems])
	if last, ok := errors.AsType[*Problem](kept[maxProblems-1]); ok {
		cut := *last
		cut.Text += fmt.Sprintf(" (%v)", more(n))
		kept[maxProblems-1] = &cut
	}
	return kept
}

// joinPaths makes one error of problems that have no file.
func joinPaths(problems []problem) error {
	var all joined
	for _, p := range problems {
		text := p.text
		if p.see != "" {
			text += " (" + p.see + ")"
		}
		all = append(all, &Problem{Path: p.path, Text: text})
	}
	return all.err()
}

// places knows where in a file the values of a configuration stand.
type places struct {
	file   string
	byPath map[string]position
	// flags has, by path, what flags said in place of the file.
	flags map[string]string
}

// join makes one error of problems, in the order of the file.
func (w *places) join(problems []problem) error {
	slices.SortStableFunc(problems, func(a, b problem) int {
		x, y := w.locate(a), w.locate(b)
		return cmp.Or(cmp.Compare(x.line, y.line), cmp.Compare(x.column, y.column))
	})
	var all joined
	for _, p := range problems {
		all = append(all, w.problem(p))
	}
	return all.err()
}

// problem tells one problem, with its place in the file.
func (w *places) problem(p problem) *Problem {
	at, text := w.locate(p), p.text
	if flag := w.flag(p.see); flag != "" {
		text += " (" + flag + ")"
	} else if p.see != "" {
		text += fmt.Sprintf(" (line %d)", w.find(p.see).line)
	}
	told := &Problem{Path: p.path, Text: text}
	if p.at == (position{}) { // else it is with what the file says there, all the same
		told.Path = cmp.Or(w.flag(p.path), p.path)
	}
	if at != (position{}) {
		told.File, told.Line, told.Column = w.file, at.line, at.column
	}
	return told
}

// error tells one problem of the file, at a position.
func (w *places) error(at position, text string) error {
	return &Problem{File: w.file, Line: at.line, Column: at.column, Text: text}
}

// locate returns where a problem stands; nowhere, if it is with what flags say alone.
func (w *places) locate(p problem) position {
	switch {
	case p.at != (position{}):
		return p.at
	case w.flag(p.path) == "":
		return w.find(p.path)
	default:
	}
	for _, path := range p.on {
		if at, ok := w.byPath[path]; ok && w.flag(path) == "" {
			return at
		}
	}
	return position{}
}

// flag returns the flag that said the value at path, or what that is in; empty: none did.
func (w *places) flag(path string) string {
	for ; path != ""; path = parent(path) {
		if flag := w.flags[path]; flag != "" {
			return flag
		}
	}
	return ""
}

// find returns where the value at path stands, or the nearest value around it:
// a key that is missing has no place of its own.
func (w *places) find(path string) position {
	for {
		if at, ok := w.byPath[path]; ok {
			return at
		}
		if path == "" && w.file == "" {
			return position{}
		}
		if path == "" {
			return position{line: 1, column: 1}
		}
		path = parent(path)
	}
}

// parent returns the path of what holds the value at path; the whole
// configuration is at "".
func parent(path string) string {
	return path[:max(strings.LastIndexAny(path, ".["), 0)]
}

func more(n int) error {
	if n == 1 {
		return errors.New("and 1 more problem")
	}
	return fmt.Errorf("and %d more problems", n)
}
