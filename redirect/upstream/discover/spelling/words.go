package spelling

import (
	"fmt"
	"strings"
)

// Meant returns what a word that is not known was probably meant to be, as the
// end of a sentence.
func Meant[T ~string](word string, known []T) string {
	best, distance := "", len(word)/3+2
	for _, t := range known {
		k := string(t)
		// A name in camel case or with dashes is the same name.
		if fold(k) == fold(word) {
			best = k
			break
		}
		if d := edits(word, k); d < distance && d < len(k) {
			best, distance = k, d
		}
	}
	if best != "" {
		return fmt.Sprintf("did you mean %s?", best)
	}
	return "want " + OneOf(known)
}

// OneOf lists words as a choice.
func OneOf[T ~string](known []T) string {
	words := make([]string, len(known))
	for i, k := range known {
		words[i] = string(k)
	}
	if n := len(words); n > 1 {
		return strings.Join(words[:n-1], ", ") + " or " + words[n-1]
	}
	return strings.Join(words, "")
}

func fold(s string) string {
	return strings.ToLower(strings.NewReplacer("_", "", "-", "", " ", "").Replace(s))
}

// edits returns how many bytes must be added, removed, changed or swapped with
// their neighbour to make b of a.
func edits(a, b string) int {
	// What is much longer than any key is none of them, and would cost its
	// length times the key's.
	if len(a) > len(b)+8 {
		return len(a)
	}
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := range len(a) {
		row[0] = i + 1
		for j := range len(b) {
			change := last[j]
			if a[i] != b[j] {
				change++
			}
			row[j+1] = min(change, last[j+1]+1, row[j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
		before, last, row = last, row, before
	}
	return last[len(b)]
}

// Show quotes a value for an error, shortened to what fits into a line.
func Show(s string) string {
	const most = 80
	if r := []rune(s); len(r) > most {
		return fmt.Sprintf("%q...", string(r[:most]))
	}
	return fmt.Sprintf("%q", s)
}
