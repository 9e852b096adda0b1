package file

// kind is what a node is.
type kind uint8

// The kinds.
const (
	isNull kind = iota
	isText
	isNumber
	isBool
	isList
	isMapping
)

var kinds = [...]string{"empty", "text", "a number", "true or false", "a list", "a mapping"}

func (k kind) String() string { return kinds[k] }

// node is a value of a file, of whichever format.
type node struct {
	kind    kind
	at      position
	text    string   // of a scalar, as the user wrote it, without quotes
	items   []*node  // of a list
	members []member // of a mapping, in the order of the file
}

// member is one key of a mapping.
type member struct {
	key   string
	at    position
	value *node
}

// maxDepth is how deep a file may be: nothing that is wanted is deeper than four.
const maxDepth = 16
